"""What many ranks run: a model of a few thousand elements, of which most ranks hold next to nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import ds_optforge
from ds_optforge.checkpoint.live import LiveEngine
from tests.distributed.cases import disagree, full_parameters
from tests.models import batch

BATCH = 32
STEPS = 3


class TinyNet(nn.Module):
    """Three matrices for Muon; on 32 ranks ZeRO-3 gives each of them one element of ``narrow``, and most none of ``norm``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(24, 8)
        self.narrow = nn.Linear(8, 4, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 50, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(F.gelu(self.up(x)))
        return F.cross_entropy(self.lm_head(self.norm(self.narrow(x) * self.scale)), targets)


def build() -> TinyNet:
    torch.manual_seed(0)
    return TinyNet()


def train_and_disagree(configs: dict[int, dict[str, Any]]) -> tuple[dict[int, dict[str, Any]], str]:
    """What `train` returns of each configuration, and the error of the first step of ranks that have other layouts.

    One job: cleaning up behind a job takes many ranks longer than all of this.
    """
    trained = {stage: train(config) for stage, config in configs.items()}
    try:
        disagree(stage=2, train_batch_size=BATCH)
    except ds_optforge.LayoutError as error:
        return trained, str(error)
    return trained, ""


def train(config: dict[str, Any]) -> dict[str, Any]:
    """Losses, whole parameters (of the first and the last rank), and how many elements of each parameter this rank steps."""
    engine = ds_optforge.initialize(model=build(), config=config)[0]
    rank, world = dist.get_rank(), dist.get_world_size()
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    losses = []
    try:
        for step in range(STEPS):
            tokens, targets = batch(step, BATCH)
            loss = engine(tokens[share], targets[share])
            engine.backward(loss)
            engine.step()
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(total.item() / world)
        whole = full_parameters(engine.module)
        return {"losses": losses, "parameters": whole if rank in (0, world - 1) else {}, "held": held(engine)}
    finally:
        engine.destroy()


def held(engine: Any) -> dict[str, int]:
    """The number of elements of each parameter in this rank's slices."""
    found = {}
    for stepped in LiveEngine(engine).stepped:
        placement = stepped.slices.placement
        for parameter, name in enumerate(placement.layout.names):
            own = placement.held(parameter)
            found[name] = own.numel if own is not None else 0
    return found


def trained_by_one_process(params: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """The same without ranks and without DeepSpeed."""
    model = build()
    optimizer = ds_optforge.build_optimizer(model, params)
    losses = []
    for step in range(STEPS):
        loss = model(*batch(step, BATCH))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
