"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum, orthogonalized."""

import math
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ds_optforge.orthogonalize import Method, accurate_method, coefficient_set, flops, orthogonalize
from ds_optforge.rules.base import Buffer, Hyperparameters, State, Tensors, decay

Scale = Literal["shape", "match_rms_adamw", "spectral", "none"]

# (out, in) -> factor of the orthogonal update.
_SCALES: dict[Scale, Callable[[int, int], float]] = {
    "shape": lambda out, into: math.sqrt(max(1.0, out / into)),  # Keller Jordan
    "match_rms_adamw": lambda out, into: 0.2 * math.sqrt(max(out, into)),  # Moonlight, arXiv 2502.16982
    "spectral": lambda out, into: math.sqrt(out / into),  # Bernstein, jeremybernste.in/writing/deriving-muon
    "none": lambda out, into: 1.0,
}


@dataclass(frozen=True, slots=True)
class Orthogonalization:
    """How a matrix is orthogonalized: the arguments of `orthogonalize`, and the shape scale of the result."""

    coefficients: str | tuple[tuple[float, float, float], ...] = "quintic"
    steps: int | None = None
    method: Method = "auto"
    dtype: torch.dtype = torch.bfloat16
    scale: Scale = "shape"
    compile: bool = False

    def __call__(self, matrices: Tensor) -> Tensor:
        """The orthogonal factors; ``matrices`` serve as workspace."""
        function = _compiled() if self.compile else orthogonalize
        return function(matrices, self.coefficients, self.steps, self.method, self.dtype, overwrite=True)

    def scale_of(self, rows: int, cols: int, transposed: bool = False) -> float:
        """The factor for a weight of this shape, which is stored (in, out) if ``transposed``."""
        return _SCALES[self.scale](cols, rows) if transposed else _SCALES[self.scale](rows, cols)

    def flops(self, rows: int, cols: int) -> int:
        chosen = coefficient_set(self.coefficients)
        steps = len(chosen.sequence(self.steps))
        return flops(rows, cols, steps, accurate_method(self.method, steps, self.dtype, chosen.steep))


@cache
def _compiled() -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # one for each shape and batch
    return torch.compile(orthogonalize, dynamic=False)


@dataclass(frozen=True, slots=True)
class Muon:
    """m <- lerp(m, g, 1 - momentum); u = lerp(g, m, momentum) (Nesterov) or m; W <- (1 - lr wd) W - lr scale NS(u).

    ``momentum_warmup`` (start, steps): the momentum rises linearly from ``start`` over that many steps.
    """

    nesterov: bool
    orthogonalization: Orthogonalization
    cautious: bool = False
    momentum_warmup: tuple[float, int] | None = None
    buffers: ClassVar[tuple[Buffer, ...]] = (Buffer("momentum_buffer"),)
    row_buffer: ClassVar[str] = ""
    scheduled: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "momentum")

    def cost(self, rows: int, cols: int) -> int:
        return self.orthogonalization.flops(rows, cols)

    def begin(self, group: Hyperparameters, scalars: MutableMapping[str, float], step: int) -> Hyperparameters:
        if self.momentum_warmup is None:
            return group
        start, steps = self.momentum_warmup
        progress = min((step - 1) / steps, 1.0)
        return {**group, "momentum": start + progress * (group["momentum"] - start)}

    def direction(self, gradients: Tensors, state: State, now: Hyperparameters) -> Tensors:
        momentum, averages = now["momentum"], list(state["momentum_buffer"])
        torch._foreach_lerp_(averages, list(gradients), 1.0 - momentum)
        return torch._foreach_lerp(list(gradients), averages, momentum) if self.nesterov else averages

    def update(
        self, matrices: Tensor, active: Tensor, rows: Tensor, transposed: bool, watch: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        # Scaled in the wire's precision: the compute dtype may be narrower.
        orthogonal = self.orthogonalization(matrices).to(matrices.dtype)
        if watch is not None:
            watch(orthogonal)
        scale = self.orthogonalization.scale_of(matrices.shape[-2], matrices.shape[-1], transposed)
        factors = (active.float() * scale).view(-1, 1, 1)
        if scale == torch.tensor(scale, dtype=orthogonal.dtype).item():  # a power of two, mostly: no mixed dtypes
            factors = factors.to(orthogonal.dtype)
        return orthogonal.mul_(factors)

    def rms(self, rows: int, cols: int, transposed: bool) -> float:
        return self.orthogonalization.scale_of(rows, cols, transposed) / math.sqrt(max(rows, cols))

    def apply(self, parameters: Tensors, updates: Tensors, active: Tensor, now: Hyperparameters) -> None:
        decay(parameters, updates, now["lr"] * now["weight_decay"], self.cautious, active)
        torch._foreach_add_(list(parameters), list(updates), alpha=-now["lr"])
