"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum, orthogonalized."""

import math
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator
from torch import Tensor

from ds_optforge.orthogonalize import (
    Healthy,
    Method,
    Team,
    accurate_method,
    coefficient_set,
    flops,
    gram_dtype,
    healthy,
    orthogonalize,
    orthogonalize_rows,
    team_cost,
)
from ds_optforge.rules.base import Batch, Buffer, Hyperparameters, MatrixRule, State, Sums, Tensors
from ds_optforge.rules.error_feedback import ErrorFeedback
from ds_optforge.rules.flat import decay, descend
from ds_optforge.rules.normalization import Normalization, NormalizationSettings
from ds_optforge.rules.registry import register_rule
from ds_optforge.rules.settings import Beta, DecaySettings, DTypeName, Positive, Rate, RuleSettings
from ds_optforge.validation import Section

Scale = Literal["shape", "match_rms_adamw", "spectral", "none"]

# Factor of the orthogonal update by (out, in).
_SCALES: dict[Scale, Callable[[int, int], float]] = {
    "shape": lambda out, into: math.sqrt(max(1.0, out / into)),  # Keller Jordan
    "match_rms_adamw": lambda out, into: math.sqrt(max(out, into)),  # times `rms`: Moonlight, arXiv 2502.16982
    "spectral": lambda out, into: math.sqrt(out / into),  # Bernstein, jeremybernste.in/writing/deriving-muon
    "none": lambda out, into: 1.0,
}
_MOONLIGHTS_RMS = 0.2


@dataclass(frozen=True, slots=True)
class Orthogonalization:
    """The arguments of `orthogonalize`, and the scale of its result by the matrix's shape.

    Attributes:
        coefficients, steps, method, dtype: as in `orthogonalize`.
        scale: factor of the orthogonal matrix, for a weight of shape (out, in). ``shape``: sqrt(max(1, out / in)) (Jordan
            et al. 2024); ``match_rms_adamw``: rms sqrt(max(out, in)) (Liu et al. 2025, arXiv 2502.16982); ``spectral``:
            sqrt(out / in) (Bernstein, jeremybernste.in/writing/deriving-muon); ``none``: 1.
        compile: whether to go through torch.compile, once per shape.
        rms: of the update with ``match_rms_adamw``, where the matrix is orthogonal.
    """

    coefficients: str | tuple[tuple[float, float, float], ...] = "quintic"
    steps: int | None = None
    method: Method = "auto"
    dtype: torch.dtype = torch.bfloat16
    scale: Scale = "shape"
    compile: bool = False
    rms: float = _MOONLIGHTS_RMS

    def __call__(self, matrices: Tensor, team: Team | None = None) -> Tensor:
        """Return the orthogonal factors of ``matrices``, (n, rows, cols), in ``dtype``; the argument may be overwritten.

        With a ``team``, of one matrix, (1, own rows, cols). It is then collective, and never compiled.

        Raises:
            ValueError: see `orthogonalize`.
        """
        if team is not None:
            return orthogonalize_rows(matrices, team, self.coefficients, self.steps, self.method, self.dtype)
        function = _compiled() if self.compile else orthogonalize
        return function(matrices, self.coefficients, self.steps, self.method, self.dtype, overwrite=True)

    def scale_of(self, rows: int, cols: int, transposed: bool = False) -> float:
        """Return the factor of the orthogonal matrix of a weight stored as (rows, cols): (in, out) if ``transposed``."""
        factor = self.rms if self.scale == "match_rms_adamw" else 1.0
        return factor * (_SCALES[self.scale](cols, rows) if transposed else _SCALES[self.scale](rows, cols))

    def healthy(self, rows: int, cols: int) -> Healthy:
        """Return the bounds for ordinary momenta of shape (rows, cols): see `ds_optforge.orthogonalize.healthy`."""
        chosen = coefficient_set(self.coefficients)
        return healthy(chosen.sequence(self.steps), chosen.safety, min(rows, cols), torch.finfo(self.dtype).bits)

    def flops(self, rows: int, cols: int, device: str = "cpu") -> int:
        """Return the FLOPs of orthogonalizing one (rows, cols) matrix: see `ds_optforge.orthogonalize.flops`.

        Args:
            rows, cols: of the matrix.
            device: type of the device, which decides whether the Gram form is accurate: see `gram_dtype`.

        Raises:
            ValueError: see `orthogonalize`.
        """
        return flops(rows, cols, *self._form(device))

    def team_cost(self, device: str, rows: int, cols: int, blocks: Sequence[int]) -> tuple[int, int, int]:
        """Return FLOPs, gathers and gathered bytes of a member of a team: see `MatrixRule.team_cost`."""
        own, gathers, numel = team_cost(rows, cols, *self._form(device), blocks)
        return own, gathers, numel * self.dtype.itemsize

    def _form(self, device: str) -> tuple[int, Method]:
        """Return the number of steps, and a method that is accurate in ``dtype`` on a type of device."""
        chosen = coefficient_set(self.coefficients)
        steps = len(chosen.sequence(self.steps))
        return steps, accurate_method(self.method, steps, gram_dtype(self.dtype, device), chosen.steep)


@cache
def _compiled() -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # one graph per shape and batch
    return torch.compile(orthogonalize, dynamic=False)


@dataclass(frozen=True, slots=True)
class Muon(MatrixRule):
    """Muon: m <- lerp(m, g, 1 - momentum); u = lerp(g, m, momentum) (Nesterov) or m; W <- (1 - lr wd) W - lr scale NS(u).

    NS is the Newton-Schulz orthogonalization, and the scale a factor by the shape: see `Orthogonalization`.

    Attributes:
        nesterov: whether u looks ahead.
        orthogonalization: NS and the scale.
        cautious: whether weight decay is cautious: see `decay`.
        momentum_warmup: (start, steps): the momentum rises linearly from ``start`` over that many steps; None: constant.
        normalization: of the rows or columns of u, or of NS(u); None: they are as they are.
    """

    nesterov: bool
    orthogonalization: Orthogonalization
    cautious: bool = False
    momentum_warmup: tuple[float, int] | None = None
    normalization: Normalization | None = None
    buffers: ClassVar[tuple[Buffer, ...]] = (Buffer("momentum_buffer", momentum=True, gradient_average=True),)
    scheduled: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "momentum")
    in_teams: ClassVar[bool] = True

    @property
    def needs_owner(self) -> bool:
        """Whether rows or columns are normalized: the sizes of whole ones are known to one owner."""
        return self.normalization is not None

    def cost(self, rows: int, cols: int) -> int:
        """Return the FLOPs of orthogonalizing one (rows, cols) matrix on a CPU."""
        return self.orthogonalization.flops(rows, cols)

    def cost_on(self, device: str, rows: int, cols: int) -> int:
        """Return the FLOPs of orthogonalizing one (rows, cols) matrix; arguments as in `MatrixRule.cost_on`."""
        return self.orthogonalization.flops(rows, cols, device)

    def team_cost(self, device: str, rows: int, cols: int, blocks: Sequence[int]) -> tuple[int, int, int]:
        """Return FLOPs, gathers and gathered bytes of a member; arguments as in `MatrixRule.team_cost`."""
        return self.orthogonalization.team_cost(device, rows, cols, blocks)

    def begin(self, group: Hyperparameters, scalars: MutableMapping[str, float], step: int) -> Hyperparameters:
        """Lower ``momentum`` during its warm-up; arguments as in `Rule.begin`."""
        if self.momentum_warmup is None:
            return group
        start, steps = self.momentum_warmup
        progress = min((step - 1) / steps, 1.0)
        return {**group, "momentum": start + progress * (group["momentum"] - start)}

    def direction(self, gradients: Tensors, weights: Tensors, state: State, sums: Sums, now: Hyperparameters) -> Tensors:
        """Advance the momentum and return u; arguments as in `MatrixRule.direction`."""
        momentum, averages = now["momentum"], list(state["momentum_buffer"])
        torch._foreach_lerp_(averages, list(gradients), 1.0 - momentum)
        return torch._foreach_lerp(list(gradients), averages, momentum) if self.nesterov else averages

    def update(self, batch: Batch, now: Hyperparameters) -> Tensor:
        """Orthogonalize and scale a batch; arguments as in `MatrixRule.update`."""
        # Scaled in the wire's precision: the compute dtype may be narrower.
        orthogonal = self.orthogonal(batch).to(batch.matrices.dtype)
        batch.watch(orthogonal)
        scale = self.orthogonalization.scale_of(*batch.shape, batch.transposed)
        active = batch.active
        if (
            scale != torch.tensor(scale, dtype=orthogonal.dtype).item()
        ):  # it mostly is a power of two, which avoids mixed dtypes
            active = active.float()
        factors = (active if scale == 1.0 else active * scale).view(-1, 1, 1)
        sizes = self.normalization.after(orthogonal, batch.transposed) if self.normalization else None
        return orthogonal.mul_(factors if sizes is None else sizes.mul_(factors))

    def orthogonal(self, batch: Batch) -> Tensor:
        """Return the orthogonal factors of a batch, (n, rows, cols), in the dtype of the products; its matrices may be lost.

        With a team, this member's rows of them.
        """
        matrices = batch.matrices
        if self.normalization:
            matrices = self.normalization.before(matrices, batch.transposed)
        return self.orthogonalization(matrices, batch.team)

    def rms(self, rows: int, cols: int, transposed: bool) -> float:
        """Return scale / sqrt(max(rows, cols)); arguments as in `MatrixRule.rms`."""
        return self.orthogonalization.scale_of(rows, cols, transposed) / math.sqrt(max(rows, cols))

    def healthy(self, rows: int, cols: int) -> Healthy:
        """Return the bounds for the orthogonal factors; arguments as in `MatrixRule.healthy`."""
        bounds = self.orthogonalization.healthy(rows, cols)
        normalized = self.normalization and self.normalization.when == "after"
        return replace(bounds, largest=1.0) if normalized else bounds

    def apply(
        self, parameters: Tensors, updates: Tensors, active: Tensor, state: State, sums: Sums, now: Hyperparameters
    ) -> None:
        """Decay the parameters and subtract lr times the updates; arguments as in `MatrixRule.apply`."""
        decay(parameters, updates, now["lr"] * now["weight_decay"], self.cautious, active)
        descend(parameters, updates, now["lr"])


@dataclass(frozen=True, slots=True)
class RowMuon(ErrorFeedback, Muon):
    """Muon that steps the rows with the largest momentum, by error feedback; ``nesterov`` must be false.

    Attributes:
        share: of the output rows that a step updates.
    """

    share: float = 1.0


_Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Triple: TypeAlias = tuple[_Finite, _Finite, _Finite]


class OrthogonalizationSettings(Section):
    """Settings of the orthogonalization of a matrix rule."""

    coefficients: str | tuple[tuple[float, float, float], ...] = Field(
        "quintic", description="name of a coefficient set, or a list of triples [a, b, c]"
    )
    # The triples of all steps are a tuple: without an end, a short file could ask for any amount of memory.
    steps: int | None = Field(
        None, ge=1, le=100, description="Newton-Schulz steps; null takes the set's own number (quintic: 5)"
    )
    method: Method = Field("auto", description="standard, gram, or auto: the one with fewer FLOPs for the shape")
    dtype: DTypeName = Field("bfloat16", description="of the matrix products")
    scale: Scale = Field("shape", description="factor of the update, from the matrix's shape")
    rms: Positive | None = Field(None, description="root mean square of the update with match_rms_adamw; null: 0.2")
    compile: bool = Field(False, description="through torch.compile, once per shape")

    @field_validator("coefficients", mode="wrap")
    @classmethod
    def _triples(cls, value: Any, handler: Any) -> Any:
        if isinstance(value, str):
            return value
        try:
            return TypeAdapter(list[_Triple]).validate_python(value) and tuple(map(tuple, value))
        except (ValidationError, TypeError):
            raise ValueError("the name of a set, or a list of triples [a, b, c] of finite numbers") from None

    @model_validator(mode="after")
    def _known_set(self) -> "OrthogonalizationSettings":
        if self.rms is not None and self.scale != "match_rms_adamw":
            raise ValueError(f"rms: got {self.rms:g} with scale '{self.scale}'; allowed: scale 'match_rms_adamw'")
        chosen = coefficient_set(self.coefficients)
        accurate_method(self.method, len(chosen.sequence(self.steps)), getattr(torch, self.dtype))
        return self

    def build(self) -> Orthogonalization:
        """Return the orthogonalization that a rule is constructed with."""
        dtype = getattr(torch, self.dtype)
        rms = _MOONLIGHTS_RMS if self.rms is None else self.rms
        return Orthogonalization(self.coefficients, self.steps, self.method, dtype, self.scale, self.compile, rms)

    def unscaled(self) -> Orthogonalization:
        """Return the same without a scale, for a rule that gives its updates another size."""
        return replace(self.build(), scale="none")


class MomentumWarmup(Section):
    """Settings of a momentum that rises linearly to its value."""

    start: Beta = Field(0.85, alias="from", description="momentum of the first step")
    steps: int = Field(300, ge=1, description="steps until the full momentum")


class MomentumSettings(RuleSettings):
    """Settings of the rules that orthogonalize a momentum."""

    decay_rates: ClassVar[tuple[str, ...]] = ("momentum",)

    momentum: Beta = Field(0.95, description="decay rate of the gradient's moving average")
    momentum_warmup: MomentumWarmup | None = Field(None, description='{"from": 0.85, "steps": 300}')
    nesterov: bool = Field(True, description="orthogonalize lerp(gradient, average, momentum) rather than the average")
    orthogonalization: OrthogonalizationSettings = OrthogonalizationSettings()

    @property
    def matches_adamw(self) -> bool:
        """Whether the scale makes updates as large as AdamW's."""
        return self.orthogonalization.scale == "match_rms_adamw"

    def arguments(self) -> dict[str, Any]:
        """Return the arguments with which `Muon` and the rules that derive from it are constructed."""
        warmup = self.momentum_warmup
        return {
            "nesterov": self.nesterov,
            "orthogonalization": self.orthogonalization.build(),
            "momentum_warmup": (warmup.start, warmup.steps) if warmup else None,
        }


class OrthogonalSettings(MomentumSettings, DecaySettings):
    """Fields of the rules that orthogonalize a momentum and decay the weights."""

    lr: Rate = Field(0.02, description="learning rate")

    def arguments(self) -> dict[str, Any]:
        """Return the arguments with which `Muon` and the rules with its decay are constructed."""
        return {**MomentumSettings.arguments(self), "cautious": self.cautious_weight_decay}


@register_rule
class MuonSettings(OrthogonalSettings):
    """Fields of ``muon``."""

    rule = "muon"
    title = "Muon"
    builds = Muon
    summary = ("orthogonalized", "hidden matrices of a transformer; half of AdamW's state")

    normalize: NormalizationSettings | None = Field(None, description='{"by": "rows", "when": "after"}; null: not at all')

    def build(self) -> Muon:
        """Return the rule with these settings."""
        return Muon(**self.arguments())

    def build_rows(self, share: float) -> MatrixRule:
        """Return the rule that steps a share of the rows; see `RuleSettings.build_rows`."""
        found = self._by_rows(share)
        if isinstance(found, self.builds):  # a rule that derives from it has rows of its own, or none
            if self.nesterov:
                raise ValueError("nesterov true, which error feedback does not have; allowed: nesterov false")
            if self.normalize:
                raise ValueError("normalize, which takes whole matrices; allowed: normalize null")
        return found

    def _by_rows(self, share: float) -> MatrixRule:
        return RowMuon(**self.arguments(), share=share)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments with which `Muon` and the rules that derive from it are constructed."""
        return {**super().arguments(), "normalization": self.normalize.build() if self.normalize else None}
