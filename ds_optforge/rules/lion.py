"""Lion (Chen et al. 2023, arXiv 2302.06675): the sign of an interpolated momentum; one buffer."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ds_optforge.rules.base import Buffer, Hyperparameters, State, Tensors, decay


@dataclass(frozen=True, slots=True)
class Lion:
    """u = sign(lerp(m, g, 1 - beta1)); W <- (1 - lr wd) W - lr u; m <- lerp(m, g, 1 - beta2)."""

    cautious: bool = False
    in_place: ClassVar[bool] = False
    buffers: ClassVar[tuple[Buffer, ...]] = (Buffer("exp_avg"),)
    scheduled: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "betas")

    def begin(self, group: Hyperparameters, scalars: MutableMapping[str, float], step: int) -> Hyperparameters:
        return group

    def step(self, parameters: Tensors, gradients: Tensors, state: State, now: Hyperparameters) -> None:
        beta1, beta2 = now["betas"]
        averages = list(state["exp_avg"])
        updates = torch._foreach_lerp(averages, list(gradients), 1.0 - beta1)
        torch._foreach_sign_(updates)
        decay(parameters, updates, now["lr"] * now["weight_decay"], self.cautious)
        torch._foreach_add_(list(parameters), updates, alpha=-now["lr"])
        torch._foreach_lerp_(averages, list(gradients), 1.0 - beta2)
