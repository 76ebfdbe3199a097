"""Training runs that the checks compare: on an engine of a given ZeRO stage, and in plain PyTorch. All ranks call together."""

import contextlib
import copy
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_optforge
from ds_optforge.testing import model as awkward

STEPS, HALF = 8, 4
IDLE = 3  # the number, from 0, of a step in which a layer has no part
ROWS = 12  # of a global batch, so that 1, 2, 3, 4, 6 and 12 ranks can share it

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Place:
    """An engine: its ZeRO stage, and what else is asked of it."""

    stage: int
    offload: bool = False
    sub_groups: bool = False
    bf16: bool = False

    def __str__(self) -> str:
        parts = [f"ZeRO-{self.stage}", "CPU offload" * self.offload, "sub-groups" * self.sub_groups, "bf16" * self.bf16]
        return ", ".join(filter(None, parts))

    def config(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """A DeepSpeed configuration."""
        zero: dict[str, Any] = {"stage": self.stage}
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.sub_groups:
            zero["sub_group_size"] = 2000
        config = {"train_batch_size": ROWS, "gradient_clipping": 0.0, "zero_optimization": zero}
        return {**config, "bf16": {"enabled": self.bf16}, "optimizer": {"type": "OptForge", "params": dict(params)}}


PLACES = (Place(0), *(Place(stage, offload) for stage in (1, 2, 3) for offload in (False, True)))


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What a training run left.

    Attributes:
        losses: of each step, the mean over the ranks.
        weights: whole parameters after so many steps.
        averages: the weights to evaluate after half of the steps; empty where that was not asked.
        telemetry: what was recorded last.
        state: name and dtype of each state tensor of this rank.
    """

    losses: list[float]
    weights: dict[int, Weights] = field(default_factory=dict)
    averages: Weights = field(default_factory=dict)
    telemetry: dict[str, Any] = field(default_factory=dict)
    state: list[tuple[str, str]] = field(default_factory=list)

    @property
    def end(self) -> Weights:
        """The whole parameters after the last step."""
        return self.weights[max(self.weights)]


def device() -> torch.device:
    """Where engines put the model."""
    accelerator = deepspeed.get_accelerator()
    return torch.device(accelerator.current_device_name())


@contextlib.contextmanager
def engine_at(place: Place, params: Mapping[str, Any]) -> Iterator[Any]:
    """An engine on the awkward model, destroyed at the end."""
    engine = ds_optforge.initialize(model=awkward.build(), config=place.config(params))[0]
    try:
        yield engine
    finally:
        engine.destroy()


def optimizer_of(engine: Any) -> ds_optforge.OptForge:
    """The OptForge under an engine's wrapper."""
    wrapper = engine.optimizer
    return wrapper if isinstance(wrapper, ds_optforge.OptForge) else wrapper.optimizer


def whole_weights(model: nn.Module) -> Weights:
    """Copies of all parameters, whole, in float32 on the CPU."""
    weights = {}
    for name, parameter in model.named_parameters():
        gathers = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters(parameter) if gathers else contextlib.nullcontext():
            weights[name] = parameter.detach().float().cpu().clone()
    return weights


def advance(engine: Any, first: int, last: int) -> list[float]:
    """Train on this rank's share of each global batch; the mean loss over the ranks of each step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in range(first, last):
        engine.module.calls = step
        share = [part.chunk(world)[rank].to(engine.device) for part in awkward.batch(step, ROWS)]
        loss = engine(*share)
        engine.backward(loss)
        engine.step()
        total = loss.detach().float()
        dist.all_reduce(total)
        losses.append(total.item() / world)
    return losses


def trained(place: Place, params: Mapping[str, Any]) -> Run:
    """An undisturbed run. Kept for other checks of the same ranks."""
    return _trained(place, json.dumps(params, sort_keys=True))


@cache
def _trained(place: Place, params: str) -> Run:
    with engine_at(place, json.loads(params)) as engine:
        run = Run([], {0: whole_weights(engine.module)})
        for first, last in ((0, IDLE), (IDLE, HALF), (HALF, STEPS)):
            run.losses.extend(advance(engine, first, last))
            run.weights[last] = whole_weights(engine.module)
        run.state.extend(state_formats(engine))
        run.telemetry.update(copy.deepcopy(optimizer_of(engine).telemetry))
        return run


def state_formats(engine: Any) -> list[tuple[str, str]]:
    """Name and dtype of every state tensor, in order."""
    states = optimizer_of(engine).state.values()
    return [(key, str(getattr(value, "dtype", "number"))) for state in states for key, value in state.items()]


def plain(params: Mapping[str, Any]) -> Run:
    """The same run in this process alone, in plain PyTorch."""
    return _plain(json.dumps(params, sort_keys=True))


@cache
def _plain(params: str) -> Run:
    model = awkward.build().to(device())
    optimizer = ds_optforge.build_optimizer(model, json.loads(params))
    run = Run([], {0: whole_weights(model)})
    for step in range(STEPS):
        model.calls = step
        loss = model(*(part.to(device()) for part in awkward.batch(step, ROWS)))
        loss.backward()
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:  # ZeRO counts it as zeros, plain PyTorch would skip it
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(loss.item())
        run.weights[step + 1] = whole_weights(model)
        if step + 1 == HALF and optimizer.averages_weights:
            optimizer.eval()
            run.averages.update(whole_weights(model))  # type: ignore[attr-defined]
            optimizer.train()
    run.telemetry.update(copy.deepcopy(optimizer.telemetry))
    return run


def forget_runs() -> None:
    """After a failure ranks may remember different runs, and would not make the same ones again."""
    _trained.cache_clear()
    _plain.cache_clear()


@contextlib.contextmanager
def shared_folder() -> Iterator[str]:
    """The path of a folder of all ranks of one machine, which is not there yet."""
    made = [tempfile.mkdtemp(prefix="ds_optforge_check_") if dist.get_rank() == 0 else None]
    try:
        dist.broadcast_object_list(made)
        yield f"{made[0]}/checkpoint"
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(str(made[0]), ignore_errors=True)
