"""What ranks run for the patches of docs/upstream: with the installed DeepSpeed, and with a patched copy of it.

`main` prints what the copy does, as a line of JSON, where PYTHONPATH begins with the copy.
"""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import deepspeed
import torch

from benchmarks.incumbent.ranks import BUILT_IN, configuration, engine_of, universal_error
from tests import models
from tests.distributed import experts, tensor_parallel
from tests.distributed.cases import run_steps
from tests.distributed.pool import Pool

SGD = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}
HALF = 3  # steps before the checkpoint, and after it


def untested(stage: int, optimizer: dict[str, Any], **zero: Any) -> dict[str, Any]:
    """A configuration that takes any optimizer."""
    return {**configuration(stage, optimizer, **zero), "zero_allow_untested_optimizer": True}


MUON_ON_ZERO_3 = untested(3, BUILT_IN, reduce_scatter=False)
MUON_ON_ZERO_2 = untested(2, BUILT_IN)
SGD_ON_ZERO_2 = untested(2, SGD)
ADAMW_ON_ZERO_3 = configuration(3, {"type": "AdamW", "params": {"lr": 0.003, "torch_adam": True}})


def save(config: dict[str, Any], folder: str) -> list[float]:
    """Half of the steps, an engine checkpoint, the other half: the losses of the latter."""
    engine = engine_of(config)
    try:
        run_steps(engine, 0, HALF)
        engine.save_checkpoint(folder, tag="saved")
        return run_steps(engine, HALF, HALF)
    finally:
        engine.destroy()


def load(config: dict[str, Any], folder: str) -> list[float]:
    """Load a universal checkpoint into a fresh engine, and take the other half of the steps."""
    engine = engine_of({**config, "checkpoint": {"load_universal": True}})
    try:
        engine.load_checkpoint(folder)
        return run_steps(engine, HALF, HALF)
    finally:
        engine.destroy()


def after_autotp() -> dict[str, Any]:
    """What is left of a caller's mark and of DeepSpeed's own tag on a weight that AutoTP has replaced under zero.Init.

    The weight has 8 heads, of which each of the two ranks gets 4.
    """
    section = {**BUILT_IN, "params": {**BUILT_IN["params"], "per_head_muon": True}}
    config = tensor_parallel.autotp_config(2, 3, {}, optimizer=section, zero_optimization={"reduce_scatter": False})
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = tensor_parallel.llama()
    model.model.layers[0].self_attn.q_proj.weight.mark = "a caller's"
    engine = deepspeed.initialize(model=model, config=config)[0]
    try:
        weight = engine.module.model.layers[0].self_attn.q_proj.weight
        return {"mark": getattr(weight, "mark", None), "heads": weight.muon_num_heads}
    finally:
        engine.destroy()


def unmarked_after_autoep() -> list[str]:
    """The last names of parameters that lost a caller's mark when AutoEP replaced them."""
    model = experts.mixture()
    for parameter in model.parameters():
        parameter.mark = "a caller's"
    config = experts.without_optimizer(experts.autoep_config(2, 2, {}))
    engine = deepspeed.initialize(model=model, config=config, optimizer=experts.grouped_control)[0]
    try:
        lost = [name for name, parameter in engine.module.named_parameters() if not hasattr(parameter, "mark")]
        return sorted({name.partition(".mlp.")[2] for name in lost})
    finally:
        engine.destroy()


class Signs(torch.optim.Optimizer):
    """An optimizer of another package: the sign of the gradient."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


def named_in_json() -> list[float] | str:
    """Train with `Signs` by its name, registered where DeepSpeed can; the losses, or the error."""
    if hasattr(deepspeed, "register_optimizer"):
        deepspeed.register_optimizer("Signs", Signs, zero_supported=True)
    config = configuration(2, {"type": "Signs", "params": {"lr": 0.003}})
    try:
        engine = deepspeed.initialize(model=models.build(), config=config)[0]
    except AssertionError as error:
        return str(error)
    try:
        return run_steps(engine, 0, 10)
    finally:
        engine.destroy()


def clipping(path: str, stage: int) -> bool:
    """Run the test that patch 4 adds, on these ranks in place of those of DeepSpeed's own runner; whether it passes."""
    unit, common = ModuleType("unit"), ModuleType("unit.common")
    common.DistributedTest = object  # type: ignore[attr-defined]
    sys.modules |= {"unit": unit, "unit.common": common}
    try:
        runpy.run_path(path)["TestMuonClipping"]().test_clipping_leaves_the_first_step_as_it_is(stage)
    except AssertionError:
        return False
    finally:
        del sys.modules["unit"], sys.modules["unit.common"]
    return True


def universal(config: dict[str, Any], two: Pool, one: Pool, folder: Path) -> float:
    """From two ranks to one through a universal checkpoint: the largest difference of a loss to the run that went on."""
    expected = two.run(save, config, str(folder))[0]
    error = one.run(universal_error, str(folder / "saved"), str(folder / "universal"))[0]
    assert not error, error
    resumed = one.run(load, config, str(folder))[0]
    return max(abs(a - b) for a, b in zip(resumed, expected, strict=True))


def refused(config: dict[str, Any], two: Pool, one: Pool, folder: Path) -> str:
    two.run(save, config, str(folder))
    error: str = one.run(universal_error, str(folder / "saved"), str(folder / "universal"))[0]
    return error


def main() -> None:
    """Do all of it on ranks of their own."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("two", "one", "a", "b", "c", "d")]
        for folder in folders:
            folder.mkdir()
        two, one = Pool(2, folders[0]), Pool(1, folders[1])
        found: dict[str, Callable[[], Any]] = {
            "file": lambda: deepspeed.__file__,
            "muon_on_zero_3": lambda: universal(MUON_ON_ZERO_3, two, one, folders[2]),
            "sgd_on_zero_2": lambda: universal(SGD_ON_ZERO_2, two, one, folders[3]),
            "adamw_on_zero_3": lambda: universal(ADAMW_ON_ZERO_3, two, one, folders[5]),
            "muon_on_zero_2": lambda: refused(MUON_ON_ZERO_2, two, one, folders[4]),
            "after_autotp": lambda: two.run(after_autotp)[0],
            "unmarked_after_autoep": lambda: two.run(unmarked_after_autoep)[0],
            "named_in_json": lambda: two.run(named_in_json)[0],
        }
        try:
            print(json.dumps({name: ask() for name, ask in found.items()}))
        finally:
            two.close()
            one.close()
