"""Muown (Lion et al. 2026, arXiv 2605.10797): Muon for the directions of a matrix's rows, Adam for their magnitudes."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ds_optforge.rules.base import Buffer, Hyperparameters, State, Statistic, Sum, Sums, Tensors, Values
from ds_optforge.rules.flat import products
from ds_optforge.rules.muon import MomentumSettings, Muon, OrthogonalizationSettings, Scale
from ds_optforge.rules.registry import register_rule
from ds_optforge.rules.settings import Betas, PlainDecaySettings, Positive, Rate


@dataclass(frozen=True, slots=True)
class Muown(Muon):
    """Muown: each output row is W = a V / ||V||, with a magnitude a and a direction V; at first a = ||V|| = ||W||.

    da = <g, W> / a; dV = a / ||V|| (g - da W / a); m <- lerp(m, dV, 1 - momentum); u as in `Muon`; V <- V - lr scale NS(u).
    p, q <- Adam's averages of da and da^2; a <- a - lr p' / (sqrt(q') + eps), where ' corrects their bias.
    W <- a V / ||V||; with weight decay, W <- W - lr wd (W before the step), and a <- ||W||. Only W is kept, not V.

    Numbers are those of the authors' code (github.com/kcc-lion/muown, class Muown), whose sum of gradients is this average
    times a factor, of which Newton-Schulz knows nothing. The paper analyses a step by the sign of da; its experiments, as the
    code, use Adam. The code's variant for many processes decays a too, and is not followed. A row of zeros, by which the code
    divides, counts as one of the norm ``eps``, as in NeMo AutoModel: it gets a direction in the first step, and a size from
    then on.

    Attributes:
        betas: decay rates of p and q.
        eps: least divisor of Adam, and least norm.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    buffers: ClassVar[tuple[Buffer, ...]] = (Buffer("momentum_buffer"),)
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("magnitude", given="direction"),
        Statistic("direction_norm", given="direction"),
        Statistic("magnitude_exp_avg", given="apply"),
        Statistic("magnitude_exp_avg_sq", given="apply"),
    )
    sums: ClassVar[tuple[Sum, ...]] = (
        Sum("weight_square", per="row"),
        Sum("weight_gradient", per="row"),
        Sum("weight_update", per="row", of_update=True),
        Sum("update_square", per="row", of_update=True),
    )
    reads_weights: ClassVar[bool] = True
    resizes: ClassVar[bool] = True

    def begin(self, group: Hyperparameters, scalars: MutableMapping[str, float], step: int) -> Hyperparameters:
        """Add the number of the step to what `Muon.begin` returns; arguments as in `Rule.begin`."""
        return {**Muon.begin(self, group, scalars, step), "step": step}

    def summand(self, name: str, weights: Tensors, values: Tensors, state: State, now: Hyperparameters) -> Tensors:
        """Return the terms of ||W||^2, <W, g>, <W, O> or ||O||^2 of a row; arguments as in `MatrixRule.summand`."""
        return products(weights if name.startswith("weight") else values, weights if name == "weight_square" else values)

    def settle(self, of_update: bool, values: Values, now: Hyperparameters) -> Values:
        """Return the factors of W and of g, or of W and of O and what is kept; arguments as in `MatrixRule.settle`."""
        magnitude, norm = self._kept(values)
        divisor = torch.where(magnitude < 0, magnitude.clamp(max=-self.eps), magnitude.clamp(min=self.eps))
        slope = values["weight_gradient"] / divisor
        if not of_update:
            return {"of_gradient": divisor / norm, "of_weight": slope / norm}
        first, second = self._moments(values, slope)
        correction, of_square = (1.0 - beta ** now["step"] for beta in self.betas)
        moved = magnitude - now["lr"] * (first / correction) / ((second / of_square).sqrt() + self.eps)
        whole = norm / divisor  # V = whole W
        length = _length(values, whole, now["lr"]).clamp(min=self.eps)
        of_weight, of_step = moved * whole / length, moved * now["lr"] / length
        if now["weight_decay"]:
            of_weight = of_weight - now["lr"] * now["weight_decay"]
            moved = _length(values, of_weight, of_step).clamp(min=self.eps)
        found = {
            "magnitude": (moved, values["magnitude"]),
            "direction_norm": (length, values["direction_norm"]),
            "magnitude_exp_avg": (first, values["magnitude_exp_avg"]),
            "magnitude_exp_avg_sq": (second, values["magnitude_exp_avg_sq"]),
            "of_weight": (of_weight, torch.ones_like(of_weight)),
            "of_step": (of_step, torch.zeros_like(of_step)),
        }
        active = values["active"] != 0
        return {name: torch.where(active, stepped, idle) for name, (stepped, idle) in found.items()}

    def _kept(self, values: Values) -> tuple[Tensor, Tensor]:
        """Return a and ||V||, which are ||W|| before the first step."""
        start, norm = values["weight_square"].sqrt().clamp(min=self.eps), values["direction_norm"]
        return torch.where(norm > 0, values["magnitude"], start), torch.where(norm > 0, norm, start)

    def _moments(self, values: Values, slope: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.lerp(values["magnitude_exp_avg"], slope, 1.0 - self.betas[0])
        return first, torch.lerp(values["magnitude_exp_avg_sq"], slope.square(), 1.0 - self.betas[1])

    def direction(self, gradients: Tensors, weights: Tensors, state: State, sums: Sums, now: Hyperparameters) -> Tensors:
        """Advance the average of dV and return u; arguments as in `MatrixRule.direction`."""
        found = list(sums["of_gradient"])  # (elements,) each, and nobody else's
        torch._foreach_mul_(found, list(gradients))
        torch._foreach_addcmul_(found, list(sums["of_weight"]), list(weights), value=-1.0)
        projected = [one.to(average.dtype) for one, average in zip(found, state["momentum_buffer"], strict=True)]
        return Muon.direction(self, projected, weights, state, sums, now)

    def apply(
        self, parameters: Tensors, updates: Tensors, active: Tensor, state: State, sums: Sums, now: Hyperparameters
    ) -> None:
        """Put the rows together from their magnitudes and directions; arguments as in `MatrixRule.apply`."""
        found = list(sums["of_weight"])
        torch._foreach_mul_(found, list(parameters))
        torch._foreach_addcmul_(found, list(sums["of_step"]), list(updates), value=-1.0)
        torch._foreach_copy_(list(parameters), found)


def _length(values: Values, of_weight: Tensor, of_update: Tensor | float) -> Tensor:
    """Return the norm of each row of ``of_weight`` W - ``of_update`` O."""
    square = of_weight.square() * values["weight_square"] - 2.0 * of_weight * of_update * values["weight_update"]
    return (square + of_update * of_update * values["update_square"]).clamp(min=0).sqrt()


class MatchingOrthogonalization(OrthogonalizationSettings):
    """Settings of an orthogonalization whose updates are as large as AdamW's unless another scale is asked for."""

    scale: Scale = Field("match_rms_adamw", description="factor of the update, from the matrix's shape")


@register_rule
class MuownSettings(MomentumSettings, PlainDecaySettings):
    """Fields of ``muown``."""

    rule = "muown"
    title = "Muown"
    builds = Muown
    decay_rates = ("momentum",)
    summary = ("rows' directions orthogonalized, their norms by Adam", "as Muon, with the norm of every row learned by itself")

    lr: Rate = Field(1e-3, description="learning rate, of directions and of magnitudes")
    betas: Betas = Field((0.9, 0.95), description="decay rates of Adam's averages, one value each per row")
    eps: Positive = Field(1e-8, description="added to Adam's divisor; the least norm of a row")
    orthogonalization: MatchingOrthogonalization = MatchingOrthogonalization()

    def build(self) -> Muown:
        """Return the rule with these settings."""
        return Muown(**self.arguments(), betas=self.betas, eps=self.eps)
