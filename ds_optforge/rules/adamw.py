"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) through torch's own fused kernel."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch.optim.adamw import adamw

from ds_optforge.rules.base import Buffer, ElementwiseRule, Hyperparameters, State, Tensors
from ds_optforge.rules.flat import decay
from ds_optforge.rules.registry import register_rule
from ds_optforge.rules.settings import Betas, DecaySettings, Positive, StateDType


@dataclass(frozen=True, slots=True)
class AdamW(ElementwiseRule):
    """AdamW: W <- (1 - lr wd) W - lr m^ / (sqrt(v^) + eps), with m and v the moving averages of g and g^2.

    m^ = m / (1 - beta1^t) and v^ = v / (1 - beta2^t) are corrected for their start at zero.

    Attributes:
        eps: added to the root of v^.
        cautious: whether weight decay is cautious: see `decay`.
    """

    eps: float
    cautious: bool = False
    buffers: ClassVar[tuple[Buffer, ...]] = (
        Buffer("exp_avg", momentum=True, gradient_average=True),
        Buffer("exp_avg_sq", signed=False),
    )
    scheduled: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "betas")
    update_at_most: ClassVar[float | None] = 1.0

    @property
    def in_place(self) -> bool:
        """True unless cautious decay needs a copy of the weights."""
        return not self.cautious

    def begin(self, group: Hyperparameters, scalars: MutableMapping[str, float], step: int) -> Hyperparameters:
        """Add the number of the step, for the bias correction; arguments as in `Rule.begin`."""
        return {**group, "step": step}

    def step(self, parameters: Tensors, gradients: Tensors, state: State, now: Hyperparameters) -> None:
        """Update the parameters and both moments in place; arguments as in `ElementwiseRule.step`."""
        before = [parameter.clone() for parameter in parameters] if self.cautious and now["weight_decay"] else []
        self._fused(parameters, gradients, state, now, 0.0 if before else now["weight_decay"])
        if before:  # the update does not depend on the weight, so it can be computed before the decay
            updates = torch._foreach_sub(before, list(parameters))
            torch._foreach_copy_(list(parameters), before)
            decay(parameters, updates, now["lr"] * now["weight_decay"], cautious=True)
            torch._foreach_sub_(list(parameters), updates)

    def _fused(self, parameters: Tensors, gradients: Tensors, state: State, now: Hyperparameters, weight_decay: float) -> None:
        # The kernel adds 1 to each of these counters itself.
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


@register_rule
class AdamWSettings(DecaySettings):
    """Fields of ``adamw``."""

    rule = "adamw"
    title = "AdamW"
    builds = AdamW
    decay_rates = ("betas",)
    summary = ("elementwise", "the baseline, and everything that is no matrix")

    betas: Betas = Field((0.9, 0.95), description="decay rates of the first and second moment")
    eps: Positive = Field(1e-8, description="added to the root of the second moment")

    def build(self) -> AdamW:
        """Return the rule with these settings."""
        return AdamW(eps=self.eps, cautious=self.cautious_weight_decay)


@register_rule
class AdamW8bitSettings(AdamWSettings):
    """Fields of ``adamw_8bit``: adamw with 8-bit state."""

    rule = "adamw_8bit"
    title = "AdamW 8-bit"
    summary = ("elementwise", "AdamW where state must be small")

    state_dtype: StateDType = Field("8bit", description="how the elementwise state is kept", validate_default=True)
