"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) through torch's own fused kernel."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.optim.adamw import adamw

from ds_optforge.rules.base import Buffer, Hyperparameters, State, Tensors, decay


@dataclass(frozen=True, slots=True)
class AdamW:
    """m, v: moving averages of g and g^2; W <- (1 - lr wd) W - lr m^ / (sqrt(v^) + eps), ^ being bias-corrected."""

    eps: float
    cautious: bool = False
    buffers: ClassVar[tuple[Buffer, ...]] = (Buffer("exp_avg"), Buffer("exp_avg_sq", signed=False))
    scheduled: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "betas")

    @property
    def in_place(self) -> bool:
        return not self.cautious

    def begin(self, group: Hyperparameters, scalars: MutableMapping[str, float], step: int) -> Hyperparameters:
        return {**group, "step": step}

    def step(self, parameters: Tensors, gradients: Tensors, state: State, now: Hyperparameters) -> None:
        before = [parameter.clone() for parameter in parameters] if self.cautious and now["weight_decay"] else []
        self._fused(parameters, gradients, state, now, 0.0 if before else now["weight_decay"])
        if before:  # the update does not depend on the weight, so it may come first
            updates = torch._foreach_sub(before, list(parameters))
            torch._foreach_copy_(list(parameters), before)
            decay(parameters, updates, now["lr"] * now["weight_decay"], cautious=True)
            torch._foreach_sub_(list(parameters), updates)

    def _fused(self, parameters: Tensors, gradients: Tensors, state: State, now: Hyperparameters, weight_decay: float) -> None:
        # The kernel counts for itself: it adds 1 to each counter.
        steps = torch.full((len(parameters),), now["step"] - 1.0, dtype=torch.float32, device=parameters[0].device)
        beta1, beta2 = now["betas"]
        adamw(
            list(parameters),
            list(gradients),
            list(state["exp_avg"]),
            list(state["exp_avg_sq"]),
            [],
            list(steps.unbind()),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=now["lr"],
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )
