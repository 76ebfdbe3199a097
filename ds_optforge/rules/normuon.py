"""NorMuon (Li et al. 2025, arXiv 2510.05491): Muon whose rows are normalised by their own second moment."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ds_optforge.rules.muon import Muon

_EPS = 1e-8


@dataclass(frozen=True, slots=True)
class NorMuon(Muon):
    """O = NS(u); v <- lerp(v, mean(O^2 over the in side), 1 - beta2); O <- O / (sqrt(v) + eps), rescaled to its norm before.

    v has one value per output row of the whole matrix, whatever the partition.
    """

    beta2: float = 0.95
    row_buffer: ClassVar[str] = "row_second_moment"

    def update(
        self, matrices: Tensor, active: Tensor, rows: Tensor, transposed: bool, watch: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        orthogonal = self.orthogonalization(matrices).float()
        if watch is not None:
            watch(orthogonal)
        norm = torch.linalg.vector_norm(orthogonal, dim=(-2, -1), keepdim=True)
        into = -2 if transposed else -1
        square = orthogonal.square().mean(into)
        # A row whose statistic is kept elsewhere (shard_local) is normalised by its own square of this step.
        moved = torch.where(rows < 0, square, torch.lerp(rows, square, 1.0 - self.beta2))
        rows.copy_(torch.where((active != 0).view(-1, 1), moved, rows.clamp(min=0)))
        orthogonal.div_((rows.sqrt() + _EPS).unsqueeze(into))
        factor = norm / (torch.linalg.vector_norm(orthogonal, dim=(-2, -1), keepdim=True) + _EPS)
        factor.mul_(self.orthogonalization.scale_of(matrices.shape[-2], matrices.shape[-1], transposed))
        return orthogonal.mul_(factor.mul_(active.view(-1, 1, 1)))
