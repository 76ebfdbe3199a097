"""What ranks do for tests of steps that DeepSpeed skips, or takes before there is a gradient."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import ds_optforge
from tests import models
from tests.distributed import cases

STEPS = 4  # of which the first is skipped
USED, IDLE = 2, 3  # calls of `models.AwkwardNet` before it uses, or leaves out, its layer "sometimes"


def infinite_then_idle(config: dict[str, Any]) -> dict[str, Any]:
    """A step with infinite gradients of all layers, one in which a layer has no part, and two more."""
    engine = cases.build_engine(config, {"sometimes": True})
    try:
        engine.module.calls = USED
        hook = engine.module.sometimes.register_forward_hook(_make_infinite)
        engine.backward(engine(*models.batch(0, size=1)))  # of a single sample, so that nothing adds up to NaN
        engine.step()
        hook.remove()
        cases.run_steps(engine, 1, STEPS - 1)
        return {"parameters": cases.full_parameters(engine.module), "skipped": engine.skipped_steps}
    finally:
        engine.destroy()


def _make_infinite(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
    """Let the gradients of a layer be infinite, and those of all layers before it infinite or NaN."""
    output.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))


def in_one_process(params: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same without the first step, in plain PyTorch."""
    model = models.build(sometimes=True)
    optimizer = ds_optforge.build_optimizer(model, params)
    model.calls = IDLE
    for step in range(1, STEPS):
        model(*models.batch(step)).backward()
        models.fill_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def counts(config: dict[str, Any], steps: int) -> set[int]:
    """The numbers of steps that the state has, after so many."""
    engine = cases.build_engine(config, {})
    try:
        cases.run_steps(engine, 0, steps)
        return {int(state["step"]) for state in cases.base_optimizer(engine).state.values()}
    finally:
        engine.destroy()


def save(config: dict[str, Any], folder: str, steps: int) -> dict[str, Any]:
    """Some steps and one of infinite gradients, which is skipped; what a portable checkpoint of that moment must bring."""
    engine = cases.build_engine(config, {})
    try:
        cases.run_steps(engine, 0, steps)
        engine.backward(engine(*models.batch(steps, engine.train_micro_batch_size_per_gpu())) * float("inf"))
        engine.step()
        ds_optforge.save_checkpoint(engine, folder)
        return _numbers(engine)
    finally:
        engine.destroy()


def load(config: dict[str, Any], folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The numbers of a fresh engine, and those after it has loaded."""
    engine = cases.build_engine(config, {})
    try:
        fresh = _numbers(engine)
        ds_optforge.load_checkpoint(engine, folder)
        return fresh, _numbers(engine)
    finally:
        engine.destroy()


def _numbers(engine: Any) -> dict[str, Any]:
    """DeepSpeed's counters, and everything in its loss scaler, as it keeps them."""
    counters = {key: getattr(engine, key) for key in ("global_steps", "global_samples", "skipped_steps")}
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return counters | {key: value for key, value in vars(scaler).items() if isinstance(value, int | float)}


def load_into_a_run(config: dict[str, Any], folder: str) -> list[int]:
    """Load other groups into an engine that has taken steps: the steps that are left in its state."""
    engine = cases.build_engine(config, {})
    try:
        cases.run_steps(engine, 0, 2)
        ds_optforge.load_checkpoint(engine, folder, strict=False)
        states = cases.base_optimizer(engine).state.values()
        return [int(state["step"]) for state in states if torch.is_tensor(state.get("step"))]
    finally:
        engine.destroy()
