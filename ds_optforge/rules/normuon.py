"""NorMuon (Li et al. 2025, arXiv 2510.05491): Muon whose output rows are normalised by their own second moment."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ds_optforge.rules.base import Batch, Hyperparameters, MatrixRule, Statistic
from ds_optforge.rules.error_feedback import ErrorFeedback
from ds_optforge.rules.muon import Muon, MuonSettings
from ds_optforge.rules.registry import register_rule
from ds_optforge.rules.settings import Beta

_EPS = 1e-8


@dataclass(frozen=True, slots=True)
class NorMuon(Muon):
    """NorMuon: O = NS(u); v <- lerp(v, mean of O^2 per output row, 1 - beta2); O <- O / (sqrt(v) + eps).

    The result is rescaled to the Frobenius norm that O had before, and then scaled and applied as in `Muon`. v has one
    value per output row of the whole matrix, whatever the partition.

    Attributes:
        beta2: decay rate of v.
    """

    beta2: float = 0.95
    statistics: ClassVar[tuple[Statistic, ...]] = (Statistic("row_second_moment", per="row"),)

    def update(self, batch: Batch, now: Hyperparameters) -> Tensor:
        """Orthogonalize a batch and normalise its output rows; arguments as in `MatrixRule.update`."""
        orthogonal = self.orthogonal(batch).float()
        batch.watch(orthogonal)
        rows = batch.statistics["row_second_moment"]
        norm = torch.linalg.vector_norm(orthogonal, dim=(-2, -1), keepdim=True)
        into = -2 if batch.transposed else -1
        square = orthogonal.square().mean(into)
        moved, kept = torch.lerp(rows, square, 1.0 - self.beta2), rows
        if not batch.has_all:  # shard_local: a row that another rank keeps is normalised by its mean square of this step
            moved, kept = torch.where(rows < 0, square, moved), rows.clamp(min=0)
        torch.where((batch.active != 0).view(-1, 1), moved, kept, out=rows)
        orthogonal.div_((rows.sqrt() + _EPS).unsqueeze(into))
        factor = norm / (torch.linalg.vector_norm(orthogonal, dim=(-2, -1), keepdim=True) + _EPS)
        scale = self.orthogonalization.scale_of(*batch.shape, batch.transposed)
        if scale != 1.0:
            factor.mul_(scale)
        return orthogonal.mul_(factor.mul_(batch.active.view(-1, 1, 1)))


@dataclass(frozen=True, slots=True)
class RowNorMuon(ErrorFeedback, NorMuon):
    """NorMuon that steps the rows with the largest momentum, by error feedback; ``nesterov`` must be false.

    v of a row that is not chosen stays as it is; the Frobenius norm is that of the chosen rows.

    Attributes:
        share: of the output rows that a step updates.
    """

    share: float = 1.0


@register_rule
class NorMuonSettings(MuonSettings):
    """Fields of ``normuon``."""

    rule = "normuon"
    title = "NorMuon"
    builds = NorMuon
    summary = ("orthogonalized, rows normalised", "as Muon, with rows of equal size in every update")

    beta2: Beta = Field(0.95, description="decay rate of the second moment of each output row")

    @model_validator(mode="after")
    def _once(self) -> "NorMuonSettings":
        if self.normalize and self.normalize.when == "after":
            raise ValueError("normalize.when: got 'after', where normuon normalises rows by itself; allowed: 'before'")
        return self

    def build(self) -> NorMuon:
        """Return the rule with these settings."""
        return NorMuon(**self.arguments(), beta2=self.beta2)

    def _by_rows(self, share: float) -> MatrixRule:
        return RowNorMuon(**self.arguments(), beta2=self.beta2, share=share)
