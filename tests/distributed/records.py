"""What the ranks of a pool run for the tests of telemetry. Every function returns plain data."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_optforge
from tests.distributed import cases


class OneScalar(nn.Module):
    """Two matrices, and a group of one element: all ranks but the first have nothing of it but padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 24)
        self.up = nn.Linear(24, 40, bias=False)
        self.down = nn.Linear(40, 50, bias=False)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.down(self.scale * self.up(self.embed(tokens)).tanh()), targets)


def train(config: dict[str, Any], steps: int, model_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The record of the last steps, and how many all-reduces each step made."""
    return _steps(cases.build_engine(config, model_options or {}), steps)


def train_one_scalar(config: dict[str, Any], steps: int) -> dict[str, Any]:
    """The same on `OneScalar`."""
    return _steps(ds_optforge.initialize(model=OneScalar(), config=config)[0], steps)


def train_mixture(config: dict[str, Any], expert_parallel_size: int, steps: int) -> dict[str, Any]:
    """The same on experts."""
    return _steps(ds_optforge.initialize(model=cases.MixtureNet(expert_parallel_size), config=config)[0], steps)


def train_with_own_interval(config: dict[str, Any]) -> None:
    """Rank 1 records every third step, whatever the configuration says."""
    if dist.get_rank() == 1:
        config["optimizer"]["params"]["telemetry"] = {"every": 3}
    cases.run_steps(cases.build_engine(config, {}), 0, 1)


def train_on_one_token(config: dict[str, Any], steps: int) -> list[str]:
    """What is warned of on this rank where every gradient is of one token, the same one: a momentum of one direction."""
    heard = _Heard()
    logger = logging.getLogger("ds_optforge")
    engine = ds_optforge.initialize(model=OneScalar(), config=config)[0]
    logger.addHandler(heard)
    try:
        token = torch.tensor([3])
        for _ in range(steps):
            engine.backward(engine(token, token))
            engine.step()
    finally:
        logger.removeHandler(heard)
        engine.destroy()
    return heard.messages


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def spoil_padding(engine: Any) -> None:
    """ZeRO-3 pads each parameter's partition with what was in memory: here with something that shows."""
    for flat, parameters in zip(*(getattr(engine.optimizer, name, ()) for name in PARTITIONS), strict=True):
        end = 0
        for parameter in parameters:
            size = parameter.partition_numel()
            held = min(max(parameter.ds_numel - dist.get_rank() * size, 0), size)
            flat.data[end + held : end + size] = 1e30
            end += size


PARTITIONS = ("fp32_partitioned_groups_flat", "fp16_groups")


def _steps(engine: Any, steps: int) -> dict[str, Any]:
    spoil_padding(engine)
    all_reduces = []
    for step in range(steps):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            cases.run_steps(engine, step, 1)
        all_reduces.append(sum(event.name == "c10d::allreduce_" for event in profile.events()))
    telemetry = cases.base_optimizer(engine).telemetry
    engine.destroy()
    return {"telemetry": telemetry, "all_reduces": all_reduces}
