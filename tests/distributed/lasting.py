"""What the ranks of a pool run to see whether a long training grows: tiny engines, many steps, and what the process holds."""

import ctypes
import gc
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

import ds_optforge
from tests.distributed import cases, clipped

HELD = ("memory", "files", "threads", "tensors", "objects")  # memory in bytes
SETTLED_S = 0.5  # for the threads of a save and of its process group, which end a moment after it
SAMPLES = 12


def held() -> tuple[int, ...]:
    """What this process holds, in the order of HELD; a tuple of numbers, which is none of the objects that are counted.

    Garbage is collected first, and memory that is free, but still the process's own, given back to the system.
    """
    time.sleep(SETTLED_S)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    process = psutil.Process()
    things = gc.get_objects()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in things)
    return (process.memory_info().rss, process.num_fds(), process.num_threads(), tensors, len(things))


def last(
    config: Mapping[str, Any], steps: int, folder: str, save: str = "", every: int = 20, samples: int = SAMPLES
) -> list[tuple[int, ...]]:
    """Train, and say what was held (`HELD`) at ``samples`` moments, equally far apart, the last one at the end.

    ``save``: "wait" or "background", for a checkpoint after each ``every`` steps, of which the two newest stay; "load" also
    loads it into the running engine. With "qk_clip" in the configuration the model is a Llama.
    """
    with_attention = "qk_clip" in config["optimizer"]["params"]
    built = dict(config)
    engine = clipped.build(built, "llama") if with_attention else cases.build_engine(built, {"tied": True, "shapes": True})
    step: Callable[[Any, int, int], object] = clipped.run_steps if with_attention else cases.run_steps
    found: list[tuple[int, ...]] = []
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
