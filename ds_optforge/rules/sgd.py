"""SGD with momentum, as in torch.optim.SGD: dampening, Nesterov momentum, and weight decay that is added to the gradient."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field, model_validator

from ds_optforge.rules.base import Buffer, ElementwiseRule, Hyperparameters, State, Tensors
from ds_optforge.rules.registry import register_rule
from ds_optforge.rules.settings import Beta, NonNegative, Rate, RuleSettings


@dataclass(frozen=True, slots=True)
class SGD(ElementwiseRule):
    """SGD: g <- g + wd W; m <- momentum m + (1 - dampening) g, but m <- g in the first step; W <- W - lr m.

    Attributes:
        dampening: fraction of a gradient that does not enter m, from the second step on.
        nesterov: whether the last step is W <- W - lr (g + momentum m).
    """

    dampening: float = 0.0
    nesterov: bool = False
    buffers: ClassVar[tuple[Buffer, ...]] = (Buffer("momentum_buffer", momentum=True),)
    scheduled: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "momentum")

    def begin(self, group: Hyperparameters, scalars: MutableMapping[str, float], step: int) -> Hyperparameters:
        """Add the factor of the gradient in m; arguments as in `Rule.begin`."""
        return {**group, "share": 1.0 if step == 1 else 1.0 - self.dampening}

    def step(self, parameters: Tensors, gradients: Tensors, state: State, now: Hyperparameters) -> None:
        """Update the parameters and the momentum in place; arguments as in `ElementwiseRule.step`."""
        weights, averages, directions = list(parameters), list(state["momentum_buffer"]), list(gradients)
        if now["weight_decay"]:
            directions = list(torch._foreach_add(directions, weights, alpha=now["weight_decay"]))
        torch._foreach_mul_(averages, now["momentum"])
        torch._foreach_add_(averages, directions, alpha=now["share"])
        if self.nesterov:
            directions = list(torch._foreach_add(directions, averages, alpha=now["momentum"]))
        torch._foreach_add_(weights, directions if self.nesterov else averages, alpha=-now["lr"])


@register_rule
class SGDSettings(RuleSettings):
    """Fields of ``sgd``."""

    rule = "sgd"
    title = "SGD"
    builds = SGD
    decay_rates = ("momentum",)
    summary = ("elementwise", "a reference; convolutional networks")

    lr: Rate = Field(0.01, description="learning rate")
    weight_decay: NonNegative = Field(0.0, description="added to the gradient, times the weight, as in torch.optim.SGD")
    momentum: Beta = Field(0.9, description="decay rate of the sum of gradients")
    dampening: float = Field(0.0, ge=0, lt=1, description="share of a gradient that does not enter the sum, after the first")
    nesterov: bool = Field(False, description="step along gradient + momentum times the sum; not with dampening")

    @model_validator(mode="after")
    def _as_torch(self) -> "SGDSettings":
        if self.dampening and not self.momentum:
            raise ValueError(f"dampening: got {self.dampening:g} without momentum; allowed: 0, or a momentum above 0")
        if self.nesterov and (self.dampening or not self.momentum):
            raise ValueError("nesterov: got true with dampening, or without momentum; allowed: dampening 0 and a momentum")
        return self

    def build(self) -> SGD:
        """Return the rule with these settings."""
        return SGD(dampening=self.dampening, nesterov=self.nesterov)
