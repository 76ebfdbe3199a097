"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) through torch's own fused kernel."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch.optim.adamw import adamw

from ds_optforge.rules.base import Buffer, Hyperparameters, Tensors


@dataclass(frozen=True, slots=True)
class AdamW:
    """m, v: moving averages of g and g^2; W <- (1 - lr wd) W - lr m^ / (sqrt(v^) + eps), ^ being bias-corrected."""

    eps: float
    buffers: ClassVar[tuple[Buffer, ...]] = (Buffer("exp_avg"), Buffer("exp_avg_sq"))
    scheduled: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "betas")

    def step(
        self,
        parameters: Tensors,
        gradients: Tensors,
        state: Mapping[str, Tensors],
        steps: Tensors,
        group: Hyperparameters,
    ) -> None:
        beta1, beta2 = group["betas"]
        adamw(
            list(parameters),
            list(gradients),
            list(state["exp_avg"]),
            list(state["exp_avg_sq"]),
            [],
            list(steps),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.eps,
            maximize=False,
        )
