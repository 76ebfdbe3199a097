"""Lion (Chen et al. 2023, arXiv 2302.06675): the sign of an interpolated momentum; one buffer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field

from ds_optforge.rules.base import Buffer, ElementwiseRule, Hyperparameters, State, Tensors
from ds_optforge.rules.flat import decay
from ds_optforge.rules.registry import register_rule
from ds_optforge.rules.settings import Betas, DecaySettings, Rate


@dataclass(frozen=True, slots=True)
class Lion(ElementwiseRule):
    """Lion: u = sign(lerp(m, g, 1 - beta1)); W <- (1 - lr wd) W - lr u; m <- lerp(m, g, 1 - beta2).

    Attributes:
        cautious: whether weight decay is cautious: see `decay`.
    """

    cautious: bool = False
    buffers: ClassVar[tuple[Buffer, ...]] = (Buffer("exp_avg", momentum=True, gradient_average=True),)
    scheduled: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "betas")
    update_at_most: ClassVar[float | None] = 1.0

    def step(self, parameters: Tensors, gradients: Tensors, state: State, now: Hyperparameters) -> None:
        """Update the parameters and the momentum in place; arguments as in `ElementwiseRule.step`."""
        beta1, beta2 = now["betas"]
        averages = list(state["exp_avg"])
        updates = torch._foreach_lerp(averages, list(gradients), 1.0 - beta1)
        torch._foreach_sign_(updates)
        decay(parameters, updates, now["lr"] * now["weight_decay"], self.cautious)
        torch._foreach_add_(list(parameters), updates, alpha=-now["lr"])
        torch._foreach_lerp_(averages, list(gradients), 1.0 - beta2)


@register_rule
class LionSettings(DecaySettings):
    """Fields of ``lion``."""

    rule = "lion"
    title = "Lion"
    builds = Lion
    decay_rates = ("betas",)
    summary = ("elementwise", "one buffer, sign updates")

    lr: Rate = Field(1e-4, description="learning rate; 3 to 10 times smaller than AdamW's")
    betas: Betas = Field((0.9, 0.99), description="interpolation of the update, and decay rate of the momentum")

    def build(self) -> Lion:
        """Return the rule with these settings."""
        return Lion(cautious=self.cautious_weight_decay)
