"""Muon Hyperball, or MuonH (Wen et al. 2026, arXiv 2606.16899): Muon's update on the sphere on which a matrix starts."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ds_optforge.rules.base import Hyperparameters, State, Statistic, Sum, Sums, Tensors, Values
from ds_optforge.rules.flat import combine, products
from ds_optforge.rules.muon import MomentumSettings, Muon
from ds_optforge.rules.registry import register_rule
from ds_optforge.rules.settings import Rate

_FACTORS = {"weight_square": "ww", "update_square": "uu", "product": "wu"}


@dataclass(frozen=True, slots=True)
class MuonHyperball(Muon):
    """MuonH: O = NS(u) as in `Muon`; W <- R n(W - lr R n(O)), where n(X) = X / ||X||_F and R = ||W||_F before the first step.

    So a step is the share lr of the weight, whose norm stays as it is, and there is no weight decay. R is kept: what rounding
    adds in one step is not there in the next. (The authors' code of modded-nanogpt, track 3, takes the norm of the weight
    before each step in its place.)

    A matrix of zeros would stay zeros, and is refused: the authors' experiments start all matrices from other values.
    """

    statistics: ClassVar[tuple[Statistic, ...]] = (Statistic("radius", per="matrix", given="apply"),)
    sums: ClassVar[tuple[Sum, ...]] = tuple(Sum(name, of_update=True) for name in _FACTORS)
    scheduled: ClassVar[tuple[str, ...]] = ("lr", "momentum")
    refuses_zeros: ClassVar[bool] = True
    resizes: ClassVar[bool] = True

    def summand(self, name: str, weights: Tensors, values: Tensors, state: State, now: Hyperparameters) -> Tensors:
        """Return the terms of ||W||^2, ||O||^2 or <W, O>; arguments as in `MatrixRule.summand`."""
        one, other = ({"w": weights, "u": values}[factor] for factor in _FACTORS[name])
        return products(one, other)

    def settle(self, of_update: bool, values: Values, now: Hyperparameters) -> Values:
        """Return the factors of W and of O, and R; arguments as in `MatrixRule.settle`."""
        active, kept, size = values["active"] != 0, values["radius"], values["update_square"].sqrt()
        # Rounded at once, as it will be read in the next step.
        radius = torch.where(kept > 0, kept, values["weight_square"].sqrt().float().double())
        step = torch.where(size > 0, now["lr"] * radius / size, 0.0)
        square = values["weight_square"] - 2.0 * step * values["product"] + (step * size).square()
        back = torch.where(square > 0, radius / square.sqrt(), 0.0)
        return {
            "radius": torch.where(active, radius, kept),
            "of_weight": torch.where(active, back, 1.0),
            "of_step": torch.where(active, back * step, 0.0),
        }

    def apply(
        self, parameters: Tensors, updates: Tensors, active: Tensor, state: State, sums: Sums, now: Hyperparameters
    ) -> None:
        """Step the parameters and bring them back to their sphere; arguments as in `MatrixRule.apply`."""
        combine(parameters, updates, torch.cat(list(sums["of_weight"])), torch.cat(list(sums["of_step"])))


@register_rule
class MuonHyperballSettings(MomentumSettings):
    """Fields of ``muon_hyperball``."""

    rule = "muon_hyperball"
    title = "Muon Hyperball"
    builds = MuonHyperball
    decay_rates = ("momentum",)
    summary = ("orthogonalized, on a sphere", "as Muon, with steps that are a share of the weight's norm, which stays as it is")

    lr: Rate = Field(0.018, description="size of a step as a share of the matrix's norm")

    @model_validator(mode="after")
    def _without_scale(self) -> "MuonHyperballSettings":
        given = self.orthogonalization.model_fields_set & {"scale", "rms"}
        if given:
            raise ValueError(
                f"orthogonalization.{min(given)}: got a value; allowed: none, since the update is given the size lr ||W||"
            )
        return self

    def build(self) -> MuonHyperball:
        """Return the rule with these settings."""
        arguments = self.arguments()
        return MuonHyperball(**{**arguments, "orthogonalization": self.orthogonalization.unscaled()})
