"""Muon whose update is divided by its own second moment, and is as large as a share of the weight."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ds_optforge.orthogonalize import flops, orthogonalize
from ds_optforge.rules import (
    Batch,
    Buffer,
    DecaySettings,
    Hyperparameters,
    MatrixRule,
    State,
    Sum,
    Sums,
    Tensors,
    decay,
    register_rule,
)

EPS = 1e-8
STEPS = 5


@dataclass(frozen=True, slots=True)
class SteadyMuon(MatrixRule):
    """m <- lerp(m, g, 1 - momentum); O = NS(m); v <- lerp(v, O^2, 1 - beta2); u = O / (sqrt(v) + eps).

    W <- (1 - lr wd) W - lr ||W||_F / ||u||_F u: a step is the share lr of the weight, whatever its size.
    """

    beta2: float
    cautious: bool
    buffers: ClassVar[tuple[Buffer, ...]] = (
        Buffer("momentum_buffer", momentum=True),
        Buffer("second_moment", signed=False, of_update=True),
    )
    sums: ClassVar[tuple[Sum, ...]] = (Sum("weight_square"), Sum("update_square", of_update=True))
    scheduled: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "momentum")
    reads_weights: ClassVar[bool] = True

    def cost(self, rows: int, cols: int) -> int:
        return flops(rows, cols, STEPS, "standard")

    def direction(self, gradients: Tensors, weights: Tensors, state: State, sums: Sums, now: Hyperparameters) -> Tensors:
        averages = list(state["momentum_buffer"])
        torch._foreach_lerp_(averages, list(gradients), 1.0 - now["momentum"])
        return averages

    def update(self, batch: Batch, now: Hyperparameters) -> Tensor:
        orthogonal = orthogonalize(batch.matrices, "quintic", STEPS, "standard", torch.float32)
        batch.watch(orthogonal)
        return orthogonal * batch.active.view(-1, 1, 1)

    def rms(self, rows: int, cols: int, transposed: bool) -> float:
        return max(rows, cols) ** -0.5

    def summand(self, name: str, weights: Tensors, values: Tensors, state: State, now: Hyperparameters) -> Tensors:
        if name == "weight_square":
            return [weight.square() for weight in weights]
        moments = [self._moved(v, o) for v, o in zip(state["second_moment"], values, strict=True)]
        return [self._normalised(v, o).square() for v, o in zip(moments, values, strict=True)]

    def apply(
        self, parameters: Tensors, updates: Tensors, active: Tensor, state: State, sums: Sums, now: Hyperparameters
    ) -> None:
        decay(parameters, updates, now["lr"] * now["weight_decay"], self.cautious, active)
        for index, (parameter, update, moment) in enumerate(zip(parameters, updates, state["second_moment"], strict=True)):
            moment.copy_(torch.where(active[index] != 0, self._moved(moment, update), moment))
            size = (sums["weight_square"][index] / sums["update_square"][index].clamp(min=EPS)).sqrt()
            parameter.sub_(now["lr"] * size * active[index].float() * self._normalised(moment, update))

    def _moved(self, moment: Tensor, update: Tensor) -> Tensor:
        return torch.lerp(moment, update.to(moment).square(), 1.0 - self.beta2)

    def _normalised(self, moment: Tensor, update: Tensor) -> Tensor:
        return update.to(moment) / (moment.sqrt() + EPS)


@register_rule
class SteadyMuonSettings(DecaySettings):
    """Fields of ``steady_muon``."""

    rule = "steady_muon"
    title = "Steady Muon"
    builds = SteadyMuon
    decay_rates = ("momentum", "beta2")
    summary = ("orthogonalized, elements normalised", "an example of a rule of another package")

    lr: float = Field(0.01, ge=0, description="size of a step as a share of the weight's")
    momentum: float = Field(0.95, ge=0, lt=1, description="decay rate of the gradient's moving average")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay rate of the update's second moment")

    def build(self) -> SteadyMuon:
        return SteadyMuon(beta2=self.beta2, cautious=self.cautious_weight_decay)
