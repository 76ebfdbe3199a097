"""Muon² (Liu et al. 2026, arXiv 2604.09967): Muon whose momentum is divided by the root of a second moment first."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field

from ds_optforge.rules.base import Buffer, Hyperparameters, State, Sums, Tensors
from ds_optforge.rules.muon import Muon, MuonSettings
from ds_optforge.rules.registry import register_rule
from ds_optforge.rules.settings import Beta, Positive


@dataclass(frozen=True, slots=True)
class MuonSquared(Muon):
    """Muon²: u as in `Muon`; v <- lerp(v, g^2, 1 - beta2); W <- (1 - lr wd) W - lr scale NS(u / (sqrt(v) + eps)).

    As the code of modded-nanogpt's track 3 has it (records/track_3_optimization/results/20260501_muonsq): u looks ahead
    before it is divided, and the moments are not corrected for their start at zero, which would scale a matrix and no more.
    The state holds sqrt(v), which spans half as many orders of magnitude as v does: 8 bits hold it more finely.

    Attributes:
        beta2: decay rate of v.
        eps: added to the root of v.
    """

    beta2: float = 0.95
    eps: float = 1e-10
    buffers: ClassVar[tuple[Buffer, ...]] = (*Muon.buffers, Buffer("second_moment_root", signed=False))

    def direction(self, gradients: Tensors, weights: Tensors, state: State, sums: Sums, now: Hyperparameters) -> Tensors:
        """Advance both moments and return u / (sqrt(v) + eps); arguments as in `MatrixRule.direction`."""
        # The unbound form: slots make this class a new one, which `super()` without arguments does not find.
        ahead, roots = Muon.direction(self, gradients, weights, state, sums, now), list(state["second_moment_root"])
        torch._foreach_mul_(roots, roots)
        torch._foreach_lerp_(roots, torch._foreach_mul(list(gradients), list(gradients)), 1.0 - self.beta2)
        torch._foreach_sqrt_(roots)
        return torch._foreach_div(list(ahead), torch._foreach_add(roots, self.eps))


@register_rule
class MuonSquaredSettings(MuonSettings):
    """Fields of ``muon_squared``."""

    rule = "muon_squared"
    title = "Muon²"
    builds = MuonSquared
    decay_rates = ("momentum", "beta2")
    summary = ("elements normalised, orthogonalized", "as Muon, of gradients whose elements get one size first; AdamW's state")

    beta2: Beta = Field(0.95, description="decay rate of the gradient's second moment")
    eps: Positive = Field(1e-10, description="added to the root of the second moment")

    def build(self) -> MuonSquared:
        """Return the rule with these settings."""
        return MuonSquared(**self.arguments(), beta2=self.beta2, eps=self.eps)
