"""Schedule-Free AdamW (Defazio & Mishchenko 2024, arXiv 2405.15682): averaging in place of a learning-rate schedule."""

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field, Strict
from torch import Tensor

from ds_optforge.rules.base import Buffer, ElementwiseRule, Hyperparameters, State, Tensors
from ds_optforge.rules.registry import register_rule
from ds_optforge.rules.settings import Beta, NonNegative, Positive, Rate, RuleSettings


@dataclass(frozen=True, slots=True)
class ScheduleFreeAdamW(ElementwiseRule):
    """Schedule-Free AdamW. The trained weight is y, at which gradients are taken; z descends; x averages z and is not stored.

    In step t, counted from 1: d = g / (sqrt(v^) + eps) + wd y, with v^ the bias-corrected moving average of g^2;
    c = w / (sum of w over the steps so far), with w = t^r lr_max^2 and lr_max the largest learning rate so far;
    y <- lerp(y, z, c) + lr (beta1 (1 - c) - 1) d; z <- z - lr d. The weight to evaluate is x = y + (1 - 1 / beta1) (z - y).

    Attributes:
        eps: added to the root of v^.
        warmup_steps: steps of the linear warm-up of lr.
        r: exponent of the step in w.
    """

    eps: float
    warmup_steps: int
    r: float = 0.0
    buffers: ClassVar[tuple[Buffer, ...]] = (
        Buffer("exp_avg_sq", signed=False),
        Buffer("z", copies_weight=True, full_precision=True),
    )
    averages: ClassVar[tuple[str, ...]] = ("z",)
    replaces_schedule: ClassVar[bool] = True
    scheduled: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "betas")

    def begin(self, group: Hyperparameters, scalars: MutableMapping[str, float], step: int) -> Hyperparameters:
        """Add c as ``share``, 1 - beta2^t as ``bias_correction``, and the warm-up to ``lr``; arguments as in `Rule.begin`."""
        lr = group["lr"] * min(step / max(self.warmup_steps, 1), 1.0)
        scalars["beta1"] = group["betas"][0]  # `averaged` reads it, also after a load
        scalars["lr_max"] = max(lr, scalars.get("lr_max", 0.0))
        weight = step**self.r * scalars["lr_max"] ** 2
        scalars["weight_sum"] = scalars.get("weight_sum", 0.0) + weight
        share = weight / scalars["weight_sum"] if scalars["weight_sum"] else 0.0
        return {**group, "lr": lr, "share": share, "bias_correction": 1.0 - group["betas"][1] ** step}

    def step(self, parameters: Tensors, gradients: Tensors, state: State, now: Hyperparameters) -> None:
        """Update y, z and v in place; arguments as in `ElementwiseRule.step`."""
        (beta1, beta2), lr, share = now["betas"], now["lr"], now["share"]
        y, gradients = list(parameters), list(gradients)
        squares, z = list(state["exp_avg_sq"]), list(state["z"])
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1.0 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, math.sqrt(now["bias_correction"]))
        torch._foreach_add_(roots, self.eps)
        directions = torch._foreach_div(gradients, roots)
        if now["weight_decay"]:
            torch._foreach_add_(directions, y, alpha=now["weight_decay"])
        torch._foreach_lerp_(y, z, weight=share)
        torch._foreach_add_(y, directions, alpha=lr * (beta1 * (1.0 - share) - 1.0))
        torch._foreach_add_(z, directions, alpha=-lr)

    @staticmethod
    def averaged(weight: Tensor, buffers: Mapping[str, Tensor], scalars: Mapping[str, float]) -> Tensor:
        """Compute x from y and z; arguments as in `Rule.averaged`."""
        return torch.lerp(weight, buffers["z"], 1.0 - 1.0 / scalars["beta1"])


@register_rule
class ScheduleFreeAdamWSettings(RuleSettings):
    """Fields of ``schedule_free_adamw``."""

    rule = "schedule_free_adamw"
    title = "Schedule-Free AdamW"
    builds = ScheduleFreeAdamW
    decay_rates = ("betas",)
    summary = ("elementwise", "runs whose length is not known in advance")

    lr: Rate = Field(2.5e-3, description="learning rate; no schedule on top")
    weight_decay: NonNegative = Field(0.0, description="decoupled weight decay, times the learning rate")
    betas: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], Beta], Strict(False)] = Field(
        (0.9, 0.999), description="interpolation between average and descent point, and decay rate of the second moment"
    )
    eps: Positive = Field(1e-8, description="added to the root of the second moment")
    warmup_steps: int = Field(0, ge=0, description="steps of its own linear warm-up")

    def build(self) -> ScheduleFreeAdamW:
        """Return the rule with these settings."""
        return ScheduleFreeAdamW(eps=self.eps, warmup_steps=self.warmup_steps)
