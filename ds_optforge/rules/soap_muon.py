"""SOAP-Muon (nikhilvyas.github.io/SOAP_Muon.pdf): SOAP's preconditioning of the momentum, before it is orthogonalized."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ds_optforge.rules.base import Batch, Buffer, Hyperparameters, State, Sums, Tensors
from ds_optforge.rules.factor import Factor
from ds_optforge.rules.muon import Muon, OrthogonalSettings
from ds_optforge.rules.registry import register_rule
from ds_optforge.rules.settings import Beta, Positive


@dataclass(frozen=True, slots=True)
class SoapMuon(Muon):
    """SOAP-Muon: u of `Muon`; P = A^T u B; v <- lerp(v, P^2, 1 - beta2); W <- (1 - lr wd) W - lr scale NS(A (P / v^(1/2)) B^T).

    Then L <- lerp(L, g g^T, 1 - beta2), R <- lerp(R, g^T g, 1 - beta2), and A and B follow the eigenvectors of L and R: columns
    in the order of diag(A^T L A), the largest first, and v with them; A <- Q of the QR decomposition of L A. v^(1/2) is at
    least eps. In the first step of a group the update is Muon's, and A and B are the eigenvectors of L and R.

    As the code of modded-nanogpt's record 44 has it (records/track_3_optimization/results/20260609_soap_f1_auxb2_clean),
    without what that record adds: the gate for attn.proj, the floor and the radius of updates, EMA-Nesterov, its initial values
    and its coefficients of Newton-Schulz. It gives the preconditioned u the size of u, which the orthogonalization undoes: left
    out here. Eigenvectors are computed in float64. A matrix whose first gradient comes later than its group's first step begins
    with A = B = I, before the first QR: the host does not know which do.

    What travels to the owner is g. Momentum and v, as large as the matrix, are the owner's, and so are L, R, A and B.

    Attributes:
        beta2: decay rate of v, L and R.
        eps: least root of v.
        every: steps from one QR to the next.
    """

    beta2: float = 0.9
    eps: float = 1e-8
    every: int = 1
    buffers: ClassVar[tuple[Buffer, ...]] = ()
    factors: ClassVar[tuple[Factor, ...]] = (
        Factor("momentum", of="matrix"),
        Factor("second_moment", of="matrix"),
        Factor("row_covariance", of="rows"),
        Factor("col_covariance", of="cols"),
        Factor("row_basis", of="rows"),
        Factor("col_basis", of="cols"),
    )

    def cost(self, rows: int, cols: int) -> int:
        """Return the FLOPs of a step of one (rows, cols) matrix on a CPU, without the eigenvectors of the first step."""
        return Muon.cost(self, rows, cols) + self._of_bases(rows, cols)

    def cost_on(self, device: str, rows: int, cols: int) -> int:
        """Return the FLOPs of a step of one (rows, cols) matrix; arguments as in `MatrixRule.cost_on`."""
        return Muon.cost_on(self, device, rows, cols) + self._of_bases(rows, cols)

    def _of_bases(self, rows: int, cols: int) -> int:
        """FLOPs of g g^T, g^T g and four products with bases; and of L A and its QR (Golub & Van Loan, 5.2), per step."""
        return 6 * rows * cols * (rows + cols) + 14 * (rows**3 + cols**3) // (3 * self.every)

    def begin(self, group: Hyperparameters, scalars: MutableMapping[str, float], step: int) -> Hyperparameters:
        """Tell ``update`` the step; arguments as in `Rule.begin`."""
        return {**Muon.begin(self, group, scalars, step), "step": step}

    def direction(self, gradients: Tensors, weights: Tensors, state: State, sums: Sums, now: Hyperparameters) -> Tensors:
        """Return the gradients; arguments as in `MatrixRule.direction`."""
        return gradients

    def update(self, batch: Batch, now: Hyperparameters) -> Tensor:
        """Precondition, orthogonalize and scale a batch, and advance its factors; arguments as in `MatrixRule.update`."""
        gradients, active = batch.matrices.float(), (batch.active != 0).view(-1, 1, 1)
        begun = batch.factors["row_basis"][:, :1].ne(0).any(-1, keepdim=True)  # a row of an orthogonal matrix is not zero
        ahead = self._ahead(gradients, active, batch.factors["momentum"], now["momentum"])
        if now["step"] > 1:
            ahead = torch.where(begun, self._preconditioned(ahead, active & begun, batch.factors), ahead)
        self._accumulate(gradients, active, batch.factors)
        if now["step"] == 1:
            _begin(active, batch.factors)
        elif (now["step"] - 1) % self.every == 0:
            _turn(active, active & ~begun, batch.factors)
        return Muon.update(self, replace(batch, matrices=ahead), now)

    def _ahead(self, gradients: Tensor, active: Tensor, average: Tensor, momentum: float) -> Tensor:
        """Advance the momentum and return u, (n, rows, cols)."""
        average.lerp_(gradients, (1.0 - momentum) * active.float())
        return torch.lerp(gradients, average, momentum) if self.nesterov else average.clone()

    def _preconditioned(self, ahead: Tensor, active: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        """Advance v and return A (P / v^(1/2)) B^T, (n, rows, cols)."""
        rows, cols, moment = factors["row_basis"], factors["col_basis"], factors["second_moment"]
        projected = rows.mT @ ahead @ cols
        moment.lerp_(projected.square(), (1.0 - self.beta2) * active.float())
        return rows @ projected.div_(moment.sqrt().clamp_(min=self.eps)) @ cols.mT

    def _accumulate(self, gradients: Tensor, active: Tensor, factors: Mapping[str, Tensor]) -> None:
        weight = (1.0 - self.beta2) * active.float()
        factors["row_covariance"].lerp_(gradients @ gradients.mT, weight)
        factors["col_covariance"].lerp_(gradients.mT @ gradients, weight)


def _begin(active: Tensor, factors: Mapping[str, Tensor]) -> None:
    """Make the bases of the eigenvectors, those of the largest eigenvalues first."""
    for side in ("row", "col"):
        vectors = torch.linalg.eigh(factors[f"{side}_covariance"].double()).eigenvectors.flip(-1)
        factors[f"{side}_basis"].mul_(~active).add_(vectors * active)


def _turn(active: Tensor, fresh: Tensor, factors: Mapping[str, Tensor]) -> None:
    """Turn the bases towards the eigenvectors by a step of orthogonal iteration; ``fresh`` ones begin with the identity."""
    moment = factors["second_moment"]
    for side, along in (("row", -2), ("col", -1)):
        covariance, basis = factors[f"{side}_covariance"], factors[f"{side}_basis"]
        basis.diagonal(dim1=-2, dim2=-1).add_(fresh.view(-1, 1))
        image = covariance @ basis
        order = (basis * image).sum(-2).argsort(dim=-1, descending=True, stable=True)
        order = torch.where(active.view(-1, 1), order, torch.arange(order.shape[-1], device=order.device))
        moment.copy_(moment.gather(along, order.unsqueeze(-1 if along == -2 else -2).expand_as(moment)))
        turned = torch.linalg.qr(image.gather(-1, order.unsqueeze(-2).expand_as(image))).Q
        basis.copy_(torch.where(active, turned, basis))


@register_rule
class SoapMuonSettings(OrthogonalSettings):
    """Fields of ``soap_muon``."""

    rule = "soap_muon"
    title = "SOAP-Muon"
    builds = SoapMuon
    decay_rates = ()
    # Of eigenvectors to equal eigenvalues, as all zero ones, rounding chooses which; above the roots eps undoes the choice.
    steady: ClassVar[Mapping[str, Any]] = {"eps": 100.0}
    summary = (
        "preconditioned by SOAP, orthogonalized",
        "fewest steps; owners keep two more matrices and four factors in float32",
    )

    state_dtype: Literal["float32"] = Field("float32", description="of what owners keep")
    beta2: Beta = Field(0.9, description="decay rate of the second moment in the eigenbasis, and of both covariances")
    eps: Positive = Field(1e-8, description="least root of the second moment")
    every: int = Field(1, ge=1, description="steps from one QR decomposition of the bases to the next")

    def build(self) -> SoapMuon:
        """Return the rule with these settings."""
        return SoapMuon(**self.arguments(), beta2=self.beta2, eps=self.eps, every=self.every)
