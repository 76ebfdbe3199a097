"""AdaMuon (Si, Zhang & Shen 2025, arXiv 2507.11005): signs of the momentum, orthogonalized, over a second moment."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ds_optforge.orthogonalize import Healthy
from ds_optforge.rules.base import Batch, Buffer, Hyperparameters, State, Sum, Sums, Tensors
from ds_optforge.rules.flat import decay, descend, side_by_side
from ds_optforge.rules.muon import Muon, OrthogonalizationSettings, OrthogonalSettings
from ds_optforge.rules.registry import register_rule
from ds_optforge.rules.settings import Positive, Rate

_SMALLEST_SQUARE = 1e-30  # a mean square of zeros


@dataclass(frozen=True, slots=True)
class AdaMuon(Muon):
    """AdaMuon: O = NS(sign(u)), u as in `Muon`; v <- lerp(v, O^2, 1 - momentum); Q = O / (sqrt(v) + eps).

    W <- (1 - lr wd) W - lr rms Q / RMS(Q), RMS being the root mean square over the matrix. As in the paper (Algorithm 1), one
    decay rate serves both moments and neither is corrected for its start at zero; the sum m <- momentum m + g of the paper
    has the same signs. Its u is m; the authors' code (Chongjie-Si/AdaMuon) looks ahead by default, and so does `nesterov`.
    The code adds eps to the norm of Q too, which is left out here.

    Attributes:
        eps: added to the root of v.
    """

    eps: float = 1e-8
    buffers: ClassVar[tuple[Buffer, ...]] = (*Muon.buffers, Buffer("second_moment", signed=False, of_update=True))
    sums: ClassVar[tuple[Sum, ...]] = (Sum("mean_square", of_update=True, mean=True),)  # of Q

    def direction(self, gradients: Tensors, weights: Tensors, state: State, sums: Sums, now: Hyperparameters) -> Tensors:
        """Advance the momentum and return the signs of u; arguments as in `MatrixRule.direction`."""
        return torch._foreach_sign(list(Muon.direction(self, gradients, weights, state, sums, now)))

    def update(self, batch: Batch, now: Hyperparameters) -> Tensor:
        """Orthogonalize a batch; arguments as in `MatrixRule.update`."""
        orthogonal = self.orthogonal(batch).to(batch.matrices.dtype)
        batch.watch(orthogonal)
        return orthogonal.mul_(batch.active.view(-1, 1, 1))

    def healthy(self, rows: int, cols: int) -> Healthy:
        """Return the bounds for the orthogonal factors; an update has one size. Arguments as in `MatrixRule.healthy`."""
        return replace(self.orthogonalization.healthy(rows, cols), largest=1.0)

    def summand(self, name: str, weights: Tensors, values: Tensors, state: State, now: Hyperparameters) -> Tensors:
        """Return the squares of Q; arguments as in `MatrixRule.summand`."""
        updates, moments = _blocks(values, state["second_moment"])
        roots = torch._foreach_lerp(moments, _squares(updates, moments), 1.0 - now["momentum"])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, self.eps)
        quotients = torch._foreach_div(updates, roots)
        torch._foreach_mul_(quotients, quotients)
        return [terms for block in quotients for terms in block.unbind()]

    def apply(
        self, parameters: Tensors, updates: Tensors, active: Tensor, state: State, sums: Sums, now: Hyperparameters
    ) -> None:
        """Advance v, decay the parameters and subtract lr rms Q / RMS(Q); arguments as in `MatrixRule.apply`."""
        factors = torch.cat(list(sums["mean_square"])).clamp_(min=_SMALLEST_SQUARE).rsqrt_().mul_(self.orthogonalization.rms)
        blocks, moments = _blocks(updates, state["second_moment"])
        counts = [len(block) for block in blocks]
        rates = (active * (1.0 - now["momentum"])).to(moments[0].dtype)
        for moment, square, rate in zip(moments, _squares(blocks, moments), _cut(rates, counts), strict=True):
            moment.lerp_(square, rate)
        roots = torch._foreach_sqrt(moments)
        torch._foreach_add_(roots, self.eps)
        torch._foreach_div_(blocks, roots)
        for block, factor in zip(blocks, _cut(factors, counts), strict=True):
            block.mul_(factor)
        decay(parameters, updates, now["lr"] * now["weight_decay"], self.cautious, active)
        descend(parameters, updates, now["lr"])


def _blocks(updates: Tensors, moments: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """Return (count, elements) views of the tensors, as many together as lie side by side: a kernel takes all of them."""
    pairs = side_by_side(updates, moments)
    return [update for update, _ in pairs], [moment for _, moment in pairs]


def _squares(updates: list[Tensor], moments: list[Tensor]) -> list[Tensor]:
    """Return the squares of the updates in the dtype of the moments."""
    squares = torch._foreach_mul(updates, updates)
    return [square.to(moment.dtype) for square, moment in zip(squares, moments, strict=True)]


def _cut(values: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    """Cut (tensors,) into (count, 1) for each block."""
    return torch.split(values.view(-1, 1), counts)


class AdaMuonOrthogonalizationSettings(OrthogonalizationSettings):
    """Settings of the orthogonalization of AdaMuon, whose updates have one size."""

    scale: Literal["match_rms_adamw"] = Field("match_rms_adamw", description="the update's root mean square is rms")


@register_rule
class AdaMuonSettings(OrthogonalSettings):
    """Fields of ``adamuon``."""

    rule = "adamuon"
    title = "AdaMuon"
    builds = AdaMuon
    signs = True
    summary = ("signs, orthogonalized, elements normalised", "Muon with second moments, at AdamW's learning rate and state")

    lr: Rate = Field(1e-3, description="learning rate, of AdamW's size")
    orthogonalization: AdaMuonOrthogonalizationSettings = AdaMuonOrthogonalizationSettings()
    eps: Positive = Field(1e-8, description="added to the root of the update's second moment")

    def build(self) -> AdaMuon:
        """Return the rule with these settings."""
        return AdaMuon(**self.arguments(), eps=self.eps)
