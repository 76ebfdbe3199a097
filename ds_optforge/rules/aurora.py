"""Aurora (Tilde Research 2026, arXiv 2606.27715): an orthogonal update whose rows, along the longer side, are alike in size."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_optforge.rules.base import Batch
from ds_optforge.rules.muon import Muon, OrthogonalSettings
from ds_optforge.rules.normalization import inverse_norms
from ds_optforge.rules.registry import register_rule

_SMALLEST_NORM = 1e-7
_RUNS = 2  # of Newton-Schulz: the authors' pp_iterations


@dataclass(frozen=True, slots=True)
class Aurora(Muon):
    """Aurora: D = 1 / |row of u|; O = NS(D u), then D <- D (n/m / |row of O|^2)^(1/2) and O = NS(D u) once more.

    For a tall (m, n) u; rows of an (m, n) orthogonal matrix have the squared norm n/m on average. As the authors' code has it
    (tilde-research/aurora-release): a wide matrix is balanced along its columns, a square one, whose rows all are of norm 1
    once it is orthogonal, is orthogonalized as in `Muon`; so are u, the scale and the step. Norms are at least 1e-7.
    """

    @property
    def needs_owner(self) -> bool:
        """True: balancing takes the whole factor."""
        return True

    def cost(self, rows: int, cols: int) -> int:
        """Return the FLOPs of all runs of Newton-Schulz on one (rows, cols) matrix."""
        return self.cost_on("cpu", rows, cols)

    def cost_on(self, device: str, rows: int, cols: int) -> int:
        """Return the same on a type of device; arguments as in `MatrixRule.cost_on`."""
        return self.orthogonalization.flops(rows, cols, device) * (1 if rows == cols else _RUNS)

    def orthogonal(self, batch: Batch) -> Tensor:
        """Return the balanced orthogonal factors of a batch; see `Muon.orthogonal`."""
        rows, cols = batch.matrices.shape[-2:]
        if rows == cols:
            return self.orthogonalization(batch.matrices)
        along = -1 if rows > cols else -2
        target = min(rows, cols) / max(rows, cols)
        weights = inverse_norms(batch.matrices, along)
        for _ in range(_RUNS - 1):
            first = self.orthogonalization(batch.matrices * weights)
            norms = torch.linalg.vector_norm(first, dim=along, keepdim=True, dtype=weights.dtype)
            weights.div_(norms.clamp_(min=_SMALLEST_NORM)).mul_(target**0.5)
        return self.orthogonalization(batch.matrices * weights)


@register_rule
class AuroraSettings(OrthogonalSettings):
    """Fields of ``aurora``."""

    rule = "aurora"
    title = "Aurora"
    builds = Aurora
    summary = ("orthogonalized, longer side balanced", "as Muon, with rows of equal size in updates that are no square")

    def build(self) -> Aurora:
        """Return the rule with these settings."""
        return Aurora(**self.arguments())
