"""What the ranks of `tests/soak.py` run: a tiny model of one family, from its newest checkpoint on, with a fault on a rank.

A family is a model that portable checkpoints carry from each of its places to each other one; `PLACES` has them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor

import ds_optforge
from tests.distributed import experts, pipelines, tensor_parallel
from tests.distributed.cases import build_engine, engine_config
from tests.processes import at_call

KEPT = 2  # checkpoints
CHANGED = 0.3  # of the targets, by chance: a loss that goes to 0 would have no relative difference


@dataclass(frozen=True, order=True)
class Place:
    """Where a model is trained. ``share``: tensor ranks, stages of a pipeline (0: none), ranks that share the experts."""

    ranks: int
    stage: int
    share: int = 1
    offload: bool = False

    def __str__(self) -> str:
        return f"ZeRO-{self.stage}{' offload' * self.offload}, {self.ranks} ranks, share {self.share}"


@dataclass(frozen=True)
class Fault:
    """``kind`` on one rank, at a call of a function of that file: the place is the same in each repetition."""

    kind: str  # "kill", "stop" (SIGTERM), "pause" (SIGSTOP for a second)
    rank: int
    file: str
    function: str
    count: int

    def prepare(self) -> None:
        """Wait for that call."""
        at_call(self.file, self.function, self.count, {"kill": _kill, "stop": _stop, "pause": _pause}[self.kind])


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _pause() -> None:
    with subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {os.getpid()}"]):
        os.kill(os.getpid(), signal.SIGSTOP)


# ------------------------------------------------------------------------------------------------------ families


@dataclass(frozen=True)
class Family:
    """How a model is built, and how it takes a step: ``step(engine, number)`` is the mean loss of the global batch."""

    places: tuple[Place, ...]
    build: Callable[[Place, Mapping[str, Any]], Any]
    step: Callable[[Any, int], float]


def noisy(tokens: Tensor, targets: Tensor, vocabulary: int, generator: torch.Generator) -> Tensor:
    """The targets, some of which are any."""
    changed = torch.rand(targets.shape, generator=generator) < CHANGED
    return torch.where(changed, torch.randint(vocabulary, targets.shape, generator=generator), targets)


def batch_of(step: int, size: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """(size,) tokens and what follows them."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(vocabulary, (size,), generator=generator)
    return tokens, noisy(tokens, (tokens * 7 + 3) % vocabulary, vocabulary, generator)


def text_of(step: int, samples: int, length: int, vocabulary: int) -> Tensor:
    """(samples, length) tokens, of which most follow from the one before."""
    generator = torch.Generator().manual_seed(step)
    columns = [torch.randint(vocabulary, (samples,), generator=generator)]
    while len(columns) < length:
        columns.append(noisy(columns[-1], (columns[-1] * 7 + 3) % vocabulary, vocabulary, generator))
    return torch.stack(columns, dim=1)


def mean_of(losses: list[Tensor]) -> float:
    """Over this rank's micro-batches and all ranks."""
    total = torch.stack([loss.detach().float() for loss in losses]).mean()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def zero_of(place: Place) -> dict[str, Any]:
    return {"offload_optimizer": {"device": "cpu"}} if place.offload else {}


def build_odd(place: Place, sections: Mapping[str, Any]) -> Any:
    """Matrices of odd shapes, a bank, a convolution, a tied and an unused weight."""
    config = engine_config(place.stage, {}, zero_optimization=zero_of(place), gradient_clipping=1.0)
    return build_engine({**config, "train_batch_size": 12, **sections}, {"tied": True, "unused": True, "shapes": True})


def step_odd(engine: Any, number: int, vocabulary: int = 50) -> float:
    rows = engine.train_micro_batch_size_per_gpu()
    tokens, targets = batch_of(number, engine.train_batch_size(), vocabulary)
    losses = []
    for part in range(engine.gradient_accumulation_steps()):
        first = (part * dist.get_world_size() + dist.get_rank()) * rows
        losses.append(engine(tokens[first : first + rows], targets[first : first + rows]))
        engine.backward(losses[-1])
        engine.step()
    return mean_of(losses)


def build_tensor(place: Place, sections: Mapping[str, Any]) -> Any:
    """A Llama of transformers under AutoTP."""
    config = tensor_parallel.autotp_config(place.share, place.stage, {}, zero_optimization=zero_of(place))
    return tensor_parallel.autotp_engine({**config, **sections}, {})


def build_experts(place: Place, sections: Mapping[str, Any]) -> Any:
    """A DeepSeek-V3 of transformers under AutoEP."""
    config = experts.autoep_config(place.share, place.stage, {}, zero_optimization=zero_of(place))
    return experts.autoep_engine({**config, **sections}, {})


def step_text(engine: Any, number: int, length: int, vocabulary: int) -> float:
    """Each data rank takes its rows, on all its tensor ranks alike."""
    tokens = text_of(number, engine.train_batch_size(), length, vocabulary)
    data = groups._get_data_parallel_world_size(), groups._get_data_parallel_rank()
    mine = tokens.chunk(data[0])[data[1]]
    loss = engine(mine, labels=mine).loss
    engine.backward(loss)
    engine.step()
    return mean_of([loss])


def build_pipeline(place: Place, sections: Mapping[str, Any]) -> Any:
    """A PipelineModule, or the same layers without one."""
    return pipelines.build_any({**pipelines.configuration(place.stage, {}), **sections}, place.share, "plain")


def step_pipeline(engine: Any, number: int) -> float:
    if not hasattr(engine, "grid"):
        return step_odd(engine, number)
    tokens, targets = batch_of(number, pipelines.BATCH, 50)
    data = engine.grid.get_data_parallel_rank(), engine.grid.get_data_parallel_world_size()

    def micro_batches() -> Iterator[tuple[Tensor, Tensor]]:
        for part in range(engine.gradient_accumulation_steps()):
            first = (part * data[1] + data[0]) * pipelines.MICRO_BATCH
            yield tokens[first : first + pipelines.MICRO_BATCH], targets[first : first + pipelines.MICRO_BATCH]

    return float(engine.train_batch(micro_batches()))


def places(ranks: Mapping[int, tuple[int, ...]], stages: tuple[int, ...]) -> tuple[Place, ...]:
    """All with these shares by number of ranks; offload from ZeRO-1 on."""
    return tuple(
        Place(number, stage, share, offload)
        for number, shares in ranks.items()
        for share in shares
        for stage in stages
        for offload in (False, True)
        if stage or not offload
    )


# The undisturbed run of a family is at its first place.
FAMILIES = {
    "zero": Family(places(dict.fromkeys((2, 1, 3, 4), (1,)), (2, 0, 1, 3)), build_odd, step_odd),
    "tensor": Family(
        places({2: (1, 2), 1: (1,), 4: (1, 2, 4)}, (2, 0, 1, 3)),
        build_tensor,
        partial(step_text, length=tensor_parallel.LENGTH, vocabulary=tensor_parallel.VOCABULARY),
    ),
    "experts": Family(
        places({2: (1, 2), 4: (1, 2, 4)}, (2, 0, 1, 3)),
        build_experts,
        partial(step_text, length=experts.LENGTH, vocabulary=experts.VOCABULARY),
    ),
    "pipeline": Family(
        tuple(
            place
            for place in places({2: (0, 1, 2), 1: (0, 1), 3: (3,), 4: (0, 2, 4)}, (1, 0, 2, 3))
            if not place.offload and (place.stage < 2 or not place.share)
        ),
        build_pipeline,
        step_pipeline,
    ),
}


# ----------------------------------------------------------------------------------------------------- training


def go_on(
    family: str,
    place: Place,
    sections: Mapping[str, Any],
    folder: str,
    last: int,
    every: int,
    *,
    strict: bool = True,
    background: bool = False,
    fault: Fault | None = None,
) -> int:
    """Train from the newest checkpoint to step ``last``, or to a SIGTERM; the steps then taken.

    Every loss is a line of metrics.jsonl; of two for one step, the later one counts. ``background``: saves do not wait.
    """
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    out = Path(folder)
    if fault is not None and fault.rank == dist.get_rank():
        fault.prepare()
    engine = FAMILIES[family].build(place, sections)
    first = _load(engine, out, strict)
    writing: Future[None] | None = None
    with open(out / "metrics.jsonl" if dist.get_rank() == 0 else os.devnull, "a", buffering=1) as metrics:
        for step in range(first, last):
            loss = FAMILIES[family].step(engine, step)
            metrics.write(json.dumps({"step": step + 1, "loss": loss}) + "\n")
            stop = torch.tensor(float(len(asked)))
            dist.all_reduce(stop)
            if stop or (step + 1) % every == 0 or step + 1 == last:
                if writing is not None:
                    writing.result()
                writing = _save(engine, out, step + 1, background)
            if stop:
                break
    if writing is not None:
        writing.result()
    sys.setprofile(None)
    signal.signal(signal.SIGTERM, before)
    return int(engine.global_steps)


def complete(out: Path) -> list[Path]:
    """The checkpoints that are whole, the newest last."""
    return [path.parent for path in sorted(out.glob("checkpoints/step_" + "[0-9]" * 8 + "/checkpoint.json"))]


def _load(engine: Any, out: Path, strict: bool) -> int:
    """The steps of the newest checkpoint, as rank 0 sees them."""
    found = [complete(out)]
    dist.broadcast_object_list(found, src=0)
    if not found[0]:
        return 0
    newest = found[0][-1]
    taken = int(newest.name.removeprefix("step_"))
    assert ds_optforge.load_checkpoint(engine, newest, strict) == {"steps": taken}
    assert engine.global_steps == taken
    return taken


def _save(engine: Any, out: Path, step: int, background: bool) -> "Future[None] | None":
    folder = out / "checkpoints" / f"step_{step:08d}"
    if dist.get_rank() == 0:
        folder.parent.mkdir(exist_ok=True)
        for old in complete(out)[:-KEPT]:
            shutil.rmtree(old.rename(old.with_name(old.name + ".incomplete")))
    dist.barrier()
    return ds_optforge.save_checkpoint(engine, folder, {"steps": step}, wait=not background)
