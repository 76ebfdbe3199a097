"""What ranks do for tests of teams: train a few large matrices, and count what the last step computes and sends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ds_optforge
from ds_optforge.optimizer import groups_of
from ds_optforge.rules.base import Batch, Hyperparameters
from ds_optforge.rules.muon import Muon, MuonSettings
from tests.distributed import cases, pipelines
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


def idle_in_the_last_step(stage: int, shapes: Shapes, params: Mapping[str, Any]) -> dict[str, list[bool]]:
    """Two steps, and one in which the first matrix has no gradient: which weights, and rows' moments, that leaves equal."""
    sub_groups = {"stage3_param_persistence_threshold": 0, "sub_group_size": 1}  # a slice for each matrix
    engine = ds_optforge.initialize(
        model=build(shapes, 0), config=cases.engine_config(stage, params, zero_optimization=sub_groups)
    )[0]
    optimizer = cases.base_optimizer(engine)
    try:
        seen = []
        for step in range(3):
            engine.backward(engine(inputs_of(step, shapes), 0 if step == 2 else -1))
            engine.step()
            moments = [state["row_second_moment"] for state in optimizer.state.values() if "row_second_moment" in state]
            weights = [weight for name, weight in cases.full_parameters(engine.module).items() if name != "bias"]
            seen.append(([moment.clone() for moment in moments], weights))
        (moments, weights), (moments_now, weights_now) = seen[1:]
        return {
            "weights": list(map(torch.equal, weights, weights_now)),
            "moments": list(map(torch.equal, moments, moments_now)),
        }
    finally:
        engine.destroy()


SEED = 1234  # of the first layer of a pipeline; each has its own
LAYERS = 4


def in_pipeline(params: Mapping[str, Any], size: int, steps: int) -> dict[str, Any]:
    """Train two layers on each of two stages of two ranks; this stage's, and the sizes of the teams that plans have."""
    layers = [LayerSpec(nn.Linear, size, size, bias=False) for _ in range(LAYERS)]
    model = PipelineModule(
        layers, num_stages=2, loss_fn=_distance, seed_layers=True, base_seed=SEED, partition_method="uniform"
    )
    engine = ds_optforge.initialize(model=model, config=pipelines.configuration(1, params))[0]
    try:
        for step in range(steps):
            rank, ranks = engine.grid.get_data_parallel_rank(), engine.grid.get_data_parallel_world_size()
            inputs, wanted = inputs_of(step, [(size, size)] * 2)
            micro = BATCH // (ranks * engine.gradient_accumulation_steps())
            batches = zip(inputs.split(micro), wanted.split(micro), strict=True)
            engine.train_batch(iter(list(batches)[rank::ranks]))
        bound = groups_of(cases.base_optimizer(engine)).bound
        found = [team for slices in bound for bucket in slices.travelling for team in bucket.exchange.bucket.teams]
        return {"parameters": pipelines.parameters(engine), "members": [len(team.ranks) for team in found]}
    finally:
        engine.destroy()


def _distance(outputs: Tensor, wanted: Tensor) -> Tensor:
    return (outputs - wanted).square().mean()


def without_pipeline(params: Mapping[str, Any], size: int, steps: int) -> dict[str, Tensor]:
    """The same in one process, with the names of the pipeline's layers."""
    layers = []
    for index in range(LAYERS):
        torch.manual_seed(SEED + index)
        layers.append(nn.Linear(size, size, bias=False))
    model = nn.Sequential(*layers)
    optimizer = ds_optforge.build_optimizer(model, params)
    for step in range(steps):
        inputs, wanted = inputs_of(step, [(size, size)] * 2)
        _distance(model(inputs), wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
