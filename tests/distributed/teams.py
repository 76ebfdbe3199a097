"""What ranks do for tests of teams: train a few large matrices, and count what the last step computes and sends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ds_optforge
from ds_optforge.rules.base import Batch, Hyperparameters
from ds_optforge.rules.muon import Muon, MuonSettings
from tests.distributed import cases
from tests.distributed.planned import Sent
from tests.rules.registering import registered

BATCH = 8
Shapes = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Lonely(Muon):
    """Muon with an `update` of its own, which knows of no teams."""

    def update(self, batch: Batch, now: Hyperparameters) -> Tensor:
        return Muon.update(self, batch, now)


class LonelySettings(MuonSettings):
    rule = "lonely"
    title = "Muon alone"
    builds = Lonely

    def build(self) -> Lonely:
        return Lonely(**self.arguments())


class Sides(nn.Module):
    """Matrices side by side, each with its own inputs, and a bias for an elementwise rule.

    Args:
        shapes: of the matrices.
        few: number of the matrices of which only the first two rows ever have a gradient.
    """

    def __init__(self, shapes: Shapes, few: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(cols, rows, bias=False) for rows, cols in shapes)
        self.bias = nn.Parameter(torch.zeros(len(shapes)))
        self.few = few

    def forward(self, inputs: Sequence[Tensor], skipped: int = -1) -> Tensor:
        """The loss; ``skipped``: number of a matrix whose whole gradient is zero."""
        terms = []
        for index, (layer, x, bias) in enumerate(zip(self.layers, inputs, self.bias, strict=True)):
            y = layer(x)[:, :2] if index < self.few else layer(x)
            terms.append((0.0 if index == skipped else 1.0) * (y.tanh().square().mean(1) + bias).square())
        return torch.stack(terms).sum(0).mean()


def build(shapes: Shapes, few: int) -> Sides:
    torch.manual_seed(0)
    return Sides(shapes, few)


def inputs_of(step: int, shapes: Shapes, share: slice = slice(None)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(BATCH, cols, generator=generator)[share] for _, cols in shapes]


def train(
    stage: int, shapes: Shapes, params: Mapping[str, Any], steps: int, skipped: int = -1, few: int = 0, **zero: Any
) -> dict[str, Any]:
    """Whole parameters after some steps; FLOPs and bytes of the last one on this rank; what telemetry has recorded.

    ``skipped``: number of the matrix that has no gradient in the last step.
    """
    with registered(LonelySettings):
        zero = {"stage3_param_persistence_threshold": 0, **zero}
        config = cases.engine_config(stage, params, zero_optimization=zero)
        engine = ds_optforge.initialize(model=build(shapes, few), config=config)[0]
        micro = BATCH // dist.get_world_size()
        share = slice(dist.get_rank() * micro, (dist.get_rank() + 1) * micro)
        for step in range(steps):
            engine.backward(engine(inputs_of(step, shapes, share), skipped if step == steps - 1 else -1))
            sent, flops = Sent(), FlopCounterMode(display=False)
            with sent, flops:
                engine.step()
        telemetry = cases.base_optimizer(engine).telemetry
        parameters = cases.full_parameters(engine.module)
        engine.destroy()
    return {"parameters": parameters, "flops": flops.get_total_flops(), "sent": sent.bytes, "telemetry": telemetry}


def one_process(shapes: Shapes, params: Mapping[str, Any], steps: int, skipped: int = -1, few: int = 0) -> dict[str, Tensor]:
    """Parameters of the same run in plain PyTorch, where each matrix has one owner."""
    model = build(shapes, few)
    optimizer = ds_optforge.build_optimizer(model, params)
    for step in range(steps):
        model(inputs_of(step, shapes), skipped if step == steps - 1 else -1).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
