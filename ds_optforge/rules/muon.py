"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum, orthogonalized."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ds_optforge.orthogonalize import Method, coefficient_set, flops, orthogonalize
from ds_optforge.rules.base import Buffer, Hyperparameters, Tensors

Scale = Literal["shape", "match_rms_adamw", "spectral", "none"]

# (rows, cols) = (out, in) -> factor of the orthogonal update.
_SCALES: dict[Scale, Callable[[int, int], float]] = {
    "shape": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),  # Keller Jordan
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),  # Moonlight, arXiv 2502.16982
    "spectral": lambda rows, cols: math.sqrt(rows / cols),  # Bernstein, jeremybernste.in/writing/deriving-muon
    "none": lambda rows, cols: 1.0,
}


@dataclass(frozen=True, slots=True)
class Orthogonalization:
    """How a matrix is orthogonalized: the arguments of `orthogonalize`, and the shape scale of the result."""

    coefficients: str | tuple[tuple[float, float, float], ...] = "quintic"
    steps: int | None = None
    method: Method = "auto"
    dtype: torch.dtype = torch.bfloat16
    scale: Scale = "shape"

    def __call__(self, matrices: Tensor) -> Tensor:
        return orthogonalize(matrices, self.coefficients, self.steps, self.method, self.dtype)

    def scale_of(self, rows: int, cols: int) -> float:
        return _SCALES[self.scale](rows, cols)

    def flops(self, rows: int, cols: int) -> int:
        steps = len(coefficient_set(self.coefficients).sequence(self.steps))
        return flops(rows, cols, steps, self.method)


@dataclass(frozen=True, slots=True)
class Muon:
    """m <- lerp(m, g, 1 - momentum); u = lerp(g, m, momentum) (Nesterov) or m; W <- (1 - lr wd) W - lr scale NS(u)."""

    nesterov: bool
    orthogonalization: Orthogonalization
    buffers: ClassVar[tuple[Buffer, ...]] = (Buffer("momentum_buffer"),)
    scheduled: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "momentum")

    def cost(self, rows: int, cols: int) -> int:
        return self.orthogonalization.flops(rows, cols)

    def direction(self, gradients: Tensors, state: Mapping[str, Tensors], group: Hyperparameters) -> Tensors:
        momentum, averages = group["momentum"], list(state["momentum_buffer"])
        torch._foreach_lerp_(averages, list(gradients), 1.0 - momentum)
        return torch._foreach_lerp(list(gradients), averages, momentum) if self.nesterov else averages

    def update(self, matrices: Tensor, active: Tensor) -> Tensor:
        rows, cols = matrices.shape[-2:]
        # Scaled in the wire's precision: the compute dtype may be narrower.
        orthogonal = self.orthogonalization(matrices).to(matrices.dtype)
        return orthogonal.mul_((active.float() * self.orthogonalization.scale_of(rows, cols)).view(-1, 1, 1))

    def apply(self, parameters: Tensors, updates: Tensors, active: Tensor, group: Hyperparameters) -> None:
        decay(parameters, active, group)
        torch._foreach_add_(list(parameters), list(updates), alpha=-group["lr"])


def decay(parameters: Sequence[Tensor], active: Tensor, group: Hyperparameters) -> None:
    """Decoupled weight decay: W <- (1 - lr wd) W where active."""
    rate = group["lr"] * group["weight_decay"]
    if rate:
        factors = 1.0 - rate * active.to(parameters[0])
        torch._foreach_mul_(list(parameters), list(factors.unbind()))
