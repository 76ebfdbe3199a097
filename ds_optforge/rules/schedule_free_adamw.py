"""Schedule-Free AdamW (Defazio & Mishchenko 2024, arXiv 2405.15682): averaging in place of a learning-rate schedule."""

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ds_optforge.rules.base import Buffer, Hyperparameters, State, Tensors


@dataclass(frozen=True, slots=True)
class ScheduleFreeAdamW:
    """The weight is y, where gradients are taken; z descends; x = average of z is never stored.

    v: moving average of g^2; d = g / (sqrt(v^) + eps) + wd y; c = w / sum w with w = (k + 1)^r lr_max^2;
    y <- lerp(y, z, c) + lr (beta1 (1 - c) - 1) d; z <- z - lr d. Evaluate at x = y + (1 - 1 / beta1) (z - y).
    """

    eps: float
    warmup_steps: int
    r: float = 0.0
    in_place: ClassVar[bool] = False
    buffers: ClassVar[tuple[Buffer, ...]] = (Buffer("exp_avg_sq", signed=False), Buffer("z", copies_weight=True))
    scheduled: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "betas")

    def begin(self, group: Hyperparameters, scalars: MutableMapping[str, float], step: int) -> Hyperparameters:
        lr = group["lr"] * min(step / max(self.warmup_steps, 1), 1.0)
        scalars["beta1"] = group["betas"][0]  # what the average is recovered with, also after a load
        scalars["lr_max"] = max(lr, scalars.get("lr_max", 0.0))
        weight = step**self.r * scalars["lr_max"] ** 2
        scalars["weight_sum"] = scalars.get("weight_sum", 0.0) + weight
        share = weight / scalars["weight_sum"] if scalars["weight_sum"] else 0.0
        return {**group, "lr": lr, "share": share, "bias_correction": 1.0 - group["betas"][1] ** step}

    def step(self, parameters: Tensors, gradients: Tensors, state: State, now: Hyperparameters) -> None:
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
    def averaged(y: Tensor, z: Tensor, beta1: float) -> Tensor:
        """x, the weights to evaluate and export, as a new tensor."""
        return torch.lerp(y, z, 1.0 - 1.0 / beta1)
