"""Rows or columns of equal size, before Newton-Schulz or after it: no state, and whole matrices at their owner."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from ds_optforge.validation import Section

By: TypeAlias = Literal["rows", "columns"]
When: TypeAlias = Literal["before", "after"]

_SMALLEST_NORM = 1e-7
_EPS = 1e-7  # of a squared norm


@dataclass(frozen=True, slots=True)
class Normalization:
    """Rows or columns of a weight's update that are made equal in size.

    Attributes:
        by: ``rows`` are those of the outputs, ``columns`` those of the inputs, whatever the order in which a weight is stored.
        when: ``before`` Newton-Schulz (MuonEq, arXiv 2603.28254) or ``after`` it (Muon+, arXiv 2602.21545).
    """

    by: By
    when: When

    def before(self, matrices: Tensor, transposed: bool) -> Tensor:
        """Give rows or columns norm 1, or less where it was below 1e-7, in place and if it is time for that.

        Args:
            matrices: (n, rows, cols) as stored.
            transposed: whether they are stored (in, out).

        Returns:
            ``matrices``.
        """
        return matrices if self.when == "after" else matrices.mul_(inverse_norms(matrices, self._along(transposed)))

    def after(self, orthogonal: Tensor, transposed: bool) -> Tensor | None:
        """Return factors that give all rows or columns one size, if it is time for that.

        Muon+ gives them norm 1. Here the matrix then has the norm of an exactly orthogonal one, so that the scale and the
        learning rate of a rule mean what they mean without normalisation: Muon+'s times sqrt(min(rows, cols) / count), which
        is 1 for the rows of a wide weight and for the columns of a tall one. 1e-7 is added to a squared norm, as there.

        Args:
            orthogonal: (n, rows, cols) as stored; left unchanged.
            transposed: whether they are stored (in, out).

        Returns:
            (n, rows, 1) or (n, 1, cols) in float32 or wider; None with ``before``.
        """
        if self.when == "before":
            return None
        along = self._along(transposed)
        count = orthogonal.shape[-1] if along == -2 else orthogonal.shape[-2]
        squares = _norms(orthogonal, along).square_().add_(_EPS)
        return squares.rsqrt_().mul_(math.sqrt(min(orthogonal.shape[-2:]) / count))

    def _along(self, transposed: bool) -> int:
        """Return the dimension, as stored, of which an element's place within its row or column is the index."""
        return -1 if (self.by == "rows") != transposed else -2


def inverse_norms(matrices: Tensor, along: int) -> Tensor:
    """Return 1 / max(norm, 1e-7) of each row (``along`` -1: (n, rows, 1)) or column (-2: (n, 1, cols)), in float32 or wider."""
    return _norms(matrices, along).clamp_(min=_SMALLEST_NORM).reciprocal_()


def _norms(matrices: Tensor, along: int) -> Tensor:
    wide = torch.promote_types(matrices.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(matrices, dim=along, keepdim=True, dtype=wide)
    return norms


class NormalizationSettings(Section):
    """Settings of the normalisation of rows or columns."""

    by: By = Field(description="rows, of the outputs, or columns, of the inputs")
    when: When = Field(description="before Newton-Schulz (MuonEq) or after it (Muon+)")

    def build(self) -> Normalization:
        """Return the normalisation that a rule is constructed with."""
        return Normalization(self.by, self.when)
