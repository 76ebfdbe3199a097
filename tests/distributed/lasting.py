"""What the ranks of a pool run to see whether a long training grows: tiny engines, many steps, and what the process holds."""

import ctypes
import gc
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

import ds_optforge
from tests.distributed import cases, clipped


@dataclass(frozen=True)
class Held:
    """What a process holds after garbage has been collected: bytes of memory, open files, threads, tensors, any objects."""

    memory: int
    files: int
    threads: int
    tensors: int
    objects: int


def held() -> Held:
    """Of this process. Memory that is free, but still the process's own, is given back to the system first."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    process = psutil.Process()
    things = gc.get_objects()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in things)
    return Held(process.memory_info().rss, process.num_fds(), process.num_threads(), tensors, len(things))


def last(config: Mapping[str, Any], steps: int, samples: int, folder: str, save: str = "", every: int = 20) -> list[Held]:
    """Train, and say what was held at ``samples`` moments, equally far apart, the last one at the end.

    ``save``: "wait" or "background", for a checkpoint after each ``every`` steps, of which the two newest stay; "load" also
    loads it into the running engine. With "qk_clip" in the configuration the model is a Llama.
    """
    with_attention = "qk_clip" in config["optimizer"]["params"]
    built = dict(config)
    engine = clipped.build(built, "llama") if with_attention else cases.build_engine(built, {"tied": True, "shapes": True})
    step: Callable[[Any, int, int], object] = clipped.run_steps if with_attention else cases.run_steps
    found: list[Held] = []
    writing: Future[None] | None = None
    for number in range(1, steps + 1):
        step(engine, number, 1)
        if save and number % every == 0:
            if writing is not None:
                writing.result()
            writing = _save(engine, Path(folder), number, save)
        if number % (steps // samples) == 0:
            if writing is not None:
                writing.result()
            writing = None
            dist.barrier()
            found.append(held())
    engine.destroy()
    return found


def _save(engine: Any, folder: Path, number: int, how: str) -> "Future[None] | None":
    writing = ds_optforge.save_checkpoint(engine, folder / str(number), {"next": number}, wait=how != "background")
    if how == "load":
        assert ds_optforge.load_checkpoint(engine, folder / str(number)) == {"next": number}
    dist.barrier()
    if dist.get_rank() == 0:
        for old in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)[:-2]:
            shutil.rmtree(old)
    dist.barrier()
    return writing
