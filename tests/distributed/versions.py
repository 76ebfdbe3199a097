"""The selection of `make test-versions`: whether one release of DeepSpeed trains, saves and loads exactly.

Run by tests/versions.py in a process that imports that release. A cell gives an error, or raises what the ranks raised; its
control does the same with torch.optim.AdamW, and tells whether a failure is DeepSpeed's own.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

import ds_optforge
from tests import models
from tests.distributed import cases, checkpoints, pipelines, tensor_parallel
from tests.distributed.pool import Pool, RankFailure
from tests.distributed.tensor_parallel import difference
from tests.oracles import EXACT

ADAMW = {"lr": 3e-3, "eps": 1e-5}
MUON = {"name": "muon", "lr": 0.02, "weight_decay": 0.1, "adamw": ADAMW, **EXACT}
STEPS = 6
EXACTLY = 1e-5  # as in test_parity
BFLOAT16 = 0.02  # of a loss: weights have 8 bits
LIMIT = 300.0  # seconds, on a busy machine
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
GATHERED = {"stage3_param_persistence_threshold": 0}
REFUSALS = ("LayoutError", "ConfigError")
OF_THE_POOL = ("NotStarted", "Hung", "Died")


@dataclass(frozen=True)
class Result:
    """What came of a cell: "exact", "refused" by name, "DeepSpeed" (which fails with AdamW too), or "wrong"."""

    cell: str
    verdict: str
    error: float | None = None
    message: str = ""


@dataclass(frozen=True)
class Cell:
    """One combination.

    Attributes:
        name: as the table calls it.
        run: takes a pool of two ranks and an empty folder; returns the error.
        control: the same with torch.optim.AdamW; returns nothing of interest.
        tolerance: the largest error that is none.
    """

    name: str
    run: Callable[[Pool, Path], float]
    control: Callable[[Pool], Any]
    tolerance: float = EXACTLY

    def result(self, pool: Pool, folder: Path) -> Result:
        try:
            error = self.run(pool, folder)
        except RankFailure as failure:
            return self._of_failure(failure, pool)
        return Result(self.name, "exact" if error <= self.tolerance else "wrong", error)

    def _of_failure(self, failure: RankFailure, pool: Pool) -> Result:
        rank = min(failure.types)
        kind, message = failure.types[rank], f"{failure.types[rank]}: {failure.messages[rank]}"
        if set(failure.types.values()) <= set(REFUSALS):
            return Result(self.name, "refused", message=message)
        if kind not in OF_THE_POOL:
            try:
                self.control(pool)
            except RankFailure as other:
                if kind in other.types.values():
                    return Result(self.name, "DeepSpeed", message=message)
        return Result(self.name, "wrong", message=f"{message}\n{failure}")


@cache
def one_process() -> tuple[list[float], dict[str, Tensor]]:
    """Losses and parameters in plain PyTorch."""
    model = models.build()
    optimizer = ds_optforge.build_optimizer(model, dict(MUON))
    losses = []
    for step in range(STEPS):
        loss = model(*models.batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@cache
def pipeline_in_one_process() -> dict[str, Tensor]:
    model = pipelines.whole()
    return pipelines.one_process(ds_optforge.build_optimizer(model, dict(MUON)), model)[1]


def config_of(stage: int, **extra: Any) -> dict[str, Any]:
    """On ZeRO-3 nothing is kept whole between steps: older releases do not wait until that has arrived (on gloo)."""
    zero = {**GATHERED, **extra.pop("zero_optimization", {})} if stage == 3 else extra.pop("zero_optimization", {})
    return cases.engine_config(stage, MUON, gradient_clipping=1.0, zero_optimization=zero, **extra)


def train_adamw(config: dict[str, Any]) -> list[float]:
    """On the ranks: the control."""
    model = models.build()
    given = {key: value for key, value in config.items() if key != "optimizer"}
    given |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    engine = deepspeed.initialize(model=model, config=given, optimizer=torch.optim.AdamW(model.parameters(), **ADAMW))[0]
    try:
        return cases.run_steps(engine, 0, 2)
    finally:
        engine.destroy()


def trained(config: dict[str, Any], pool: Pool, folder: Path, **options: Any) -> float:
    results = pool.run(cases.train, config, STEPS, timeout_s=LIMIT, **options)
    return max(difference(result["parameters"], one_process()[1]) for result in results)


def losses_in_bf16(stage: int, pool: Pool, folder: Path) -> float:
    found = pool.run(cases.train, config_of(stage, bf16={"enabled": True}), STEPS, timeout_s=LIMIT)[0]["losses"]
    return max(abs(loss / expected - 1) for loss, expected in zip(found, one_process()[0], strict=True))


def engine_checkpoint(stage: int, pool: Pool, folder: Path) -> float:
    """The number of parameters that are not the same bit for bit."""
    results = pool.run(cases.save_and_load, config_of(stage), str(folder), timeout_s=LIMIT)
    pairs = [(result["resumed"]["parameters"], result["uninterrupted"]["parameters"]) for result in results]
    return float(sum(not torch.equal(found[name], value) for found, kept in pairs for name, value in kept.items()))


def portable_checkpoint(saved: int, loaded: int, pool: Pool, folder: Path) -> float:
    target = str(folder / "portable")
    expected = pool.run(checkpoints.run_and_save, config_of(saved), target, timeout_s=LIMIT)[0]["parameters"]
    return max(
        difference(result["parameters"], expected)
        for result in pool.run(checkpoints.resume, config_of(loaded), target, timeout_s=LIMIT)
    )


def _gathered(stage: int) -> dict[str, Any]:
    return {"zero_optimization": GATHERED} if stage == 3 else {}


def autotp(stage: int, pool: Pool, folder: Path) -> float:
    expected = tensor_parallel.one_process(MUON, STEPS)
    return max(
        difference(found, expected)
        for found in pool.run(tensor_parallel.autotp, 2, stage, MUON, STEPS, timeout_s=LIMIT, **_gathered(stage))
    )


def megatron(stage: int, pool: Pool, folder: Path) -> float:
    expected = tensor_parallel.megatron_in_one_process(MUON, STEPS)
    return max(
        difference(found, expected)
        for found in pool.run(tensor_parallel.megatron, 2, stage, MUON, STEPS, timeout_s=LIMIT, **_gathered(stage))
    )


def pipeline(stage: int, pool: Pool, folder: Path) -> float:
    expected = pipeline_in_one_process()
    results = pool.run(pipelines.train, pipelines.configuration(stage, MUON), 2, timeout_s=LIMIT)
    return max(difference(found, {name: expected[name] for name in found}) for found in (r["parameters"] for r in results))


def cells() -> Iterator[Cell]:
    """In the order of the table."""
    for stage in (0, 1, 2, 3):
        for zero in ({}, OFFLOAD) if stage > 1 else ({},):
            config = config_of(stage, zero_optimization=zero)
            yield Cell(f"ZeRO-{stage}{', offload' if zero else ''}", partial(trained, config), _control(config))
    config = config_of(3, zero_optimization={"sub_group_size": 2000})
    yield Cell("ZeRO-3, `zero.Init`, several sub-groups", partial(trained, config, zero_init=True), _control(config))
    config = config_of(3, zero_optimization={"stage3_param_persistence_threshold": 100_000})
    yield Cell("ZeRO-3, small parameters kept whole (DeepSpeed's default)", partial(trained, config), _control(config))
    for stage in (2, 3):
        control = _control(config_of(stage, bf16={"enabled": True}))
        yield Cell(f"bf16, ZeRO-{stage}", partial(losses_in_bf16, stage), control, BFLOAT16)
    for stage in (2, 3):
        yield Cell(f"engine checkpoint, ZeRO-{stage}", partial(engine_checkpoint, stage), _control(config_of(stage)))
    for saved, loaded in ((2, 3), (3, 2)):
        run = partial(portable_checkpoint, saved, loaded)
        yield Cell(f"portable checkpoint, ZeRO-{saved} to {loaded}", run, _control(config_of(2)))
    for stage in (0, 2, 3):
        tp = partial(_run, tensor_parallel.autotp, 2, stage, None, 2)
        yield Cell(f"AutoTP on 2 ranks, ZeRO-{stage}", partial(autotp, stage), tp)
    for stage in (0, 2, 3):
        tp = partial(_run, tensor_parallel.megatron, 2, stage, None, 2)
        yield Cell(f"tensor parallelism with an `mpu`, ZeRO-{stage}", partial(megatron, stage), tp)
    for stage in (0, 1):
        control = partial(_run, pipelines.train, pipelines.configuration(stage, None), 2, 2, door="control")
        yield Cell(f"pipeline of 2 stages, ZeRO-{stage}", partial(pipeline, stage), control)


def _run(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    *given, pool = args
    return pool.run(function, *given, timeout_s=LIMIT, **kwargs)


def _control(config: dict[str, Any]) -> Callable[[Pool], Any]:
    return partial(_run, train_adamw, config)


def main(wanted: str) -> None:
    """Print a result per cell whose name holds ``wanted``, as a line of JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        pool = Pool(2, Path(scratch))
        try:
            for number, cell in enumerate(cells()):
                if wanted in cell.name:
                    folder = Path(scratch) / str(number)
                    folder.mkdir()
                    print(json.dumps(asdict(cell.result(pool, folder))), flush=True)
        finally:
            pool.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
