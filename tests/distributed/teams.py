"""What ranks do for tests of teams: train a few large matrices, and count what the last step computes and sends."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ds_optforge
from tests.distributed import cases
from tests.distributed.planned import Sent

BATCH = 8


class Sides(nn.Module):
    """Matrices side by side, each with its own inputs, and a bias for an elementwise rule."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(cols, rows, bias=False) for rows, cols in shapes)
        self.bias = nn.Parameter(torch.zeros(len(shapes)))

    def forward(self, inputs: Sequence[Tensor], skipped: int = -1) -> Tensor:
        """The loss; ``skipped``: number of a matrix whose gradient is zero."""
        terms = [
            (0.0 if index == skipped else 1.0) * (layer(x).tanh().square().mean(1) + bias).square()
            for index, (layer, x, bias) in enumerate(zip(self.layers, inputs, self.bias, strict=True))
        ]
        return torch.stack(terms).sum(0).mean()


def build(shapes: Sequence[tuple[int, int]]) -> Sides:
    torch.manual_seed(0)
    return Sides(shapes)


def inputs_of(step: int, shapes: Sequence[tuple[int, int]], share: slice = slice(None)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(BATCH, cols, generator=generator)[share] for _, cols in shapes]


def train(
    stage: int, shapes: Sequence[tuple[int, int]], params: Mapping[str, Any], steps: int, skipped: int = -1, **zero: Any
) -> dict[str, Any]:
    """Whole parameters after some steps; FLOPs and bytes of the last one on this rank; what telemetry has recorded."""
    config = cases.engine_config(stage, params, zero_optimization={"stage3_param_persistence_threshold": 0, **zero})
    engine = ds_optforge.initialize(model=build(shapes), config=config)[0]
    micro = BATCH // dist.get_world_size()
    share = slice(dist.get_rank() * micro, (dist.get_rank() + 1) * micro)
    for step in range(steps):
        engine.backward(engine(inputs_of(step, shapes, share), skipped if step == steps - 1 else -1))
        sent, flops = Sent(), FlopCounterMode(display=False)
        with sent, flops:
            engine.step()
    found = {"parameters": cases.full_parameters(engine.module), "flops": flops.get_total_flops(), "sent": sent.bytes}
    engine.destroy()
    return found


def one_process(shapes: Sequence[tuple[int, int]], params: Mapping[str, Any], steps: int, skipped: int = -1) -> dict[str, Tensor]:
    """Parameters of the same run in plain PyTorch, where each matrix has one owner."""
    model = build(shapes)
    optimizer = ds_optforge.build_optimizer(model, params)
    for step in range(steps):
        model(inputs_of(step, shapes), skipped if step == steps - 1 else -1).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
