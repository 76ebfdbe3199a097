"""What each rule reads from the configuration: one pydantic model per rule name, which builds the rule object."""

import importlib.util
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field, Strict, TypeAdapter, ValidationError, field_validator, model_validator

from ds_optforge.orthogonalize import Method, accurate_method, coefficient_set
from ds_optforge.rules.adamw import AdamW
from ds_optforge.rules.base import Rule
from ds_optforge.rules.lion import Lion
from ds_optforge.rules.muon import Muon, Orthogonalization, Scale
from ds_optforge.rules.normuon import NorMuon
from ds_optforge.rules.schedule_free_adamw import ScheduleFreeAdamW
from ds_optforge.validation import Section

RuleName: TypeAlias = Literal["muon", "normuon", "adamw", "adamw_8bit", "lion", "schedule_free_adamw"]
DTypeName: TypeAlias = Literal["float32", "bfloat16"]
StateDType: TypeAlias = Literal["float32", "bfloat16", "8bit"]
DecaySchedule: TypeAlias = Literal["constant", "linear", "cosine"]

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Strict(False)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Triple: TypeAlias = tuple[Finite, Finite, Finite]


# A moving average stops short of a constant by 2**-9 / (1 - rate) of it, where a step is less than half the spacing of
# bfloat16: by 4% at 0.95, 20% at 0.99, and it would stand still at 0.999.
_SLOWEST_IN_BFLOAT16 = 0.99

# The keys of "params" that belong to no rule (see `ds_optforge.config.CommonSettings`).
COMMON_KEYS = ("name", "adamw", "roles", "overrides", "sharding", "telemetry", "max_aspect_ratio")


class OrthogonalizationSettings(Section):
    """How the matrices of a matrix rule are orthogonalized."""

    coefficients: str | tuple[tuple[float, float, float], ...] = Field(
        "quintic", description="name of a coefficient set, or a list of triples [a, b, c]"
    )
    steps: int | None = Field(None, ge=1, description="Newton-Schulz steps; null takes the set's own number (quintic: 5)")
    method: Method = Field("auto", description="standard, gram, or auto: the one with fewer FLOPs for the shape")
    dtype: DTypeName = Field("bfloat16", description="of the matrix products")
    scale: Scale = Field("shape", description="factor of the update, from the matrix's shape")
    compile: bool = Field(False, description="through torch.compile, once per shape")

    @field_validator("coefficients", mode="wrap")
    @classmethod
    def _triples(cls, value: Any, handler: Any) -> Any:
        if isinstance(value, str):
            return value
        try:
            return TypeAdapter(list[Triple]).validate_python(value) and tuple(map(tuple, value))
        except (ValidationError, TypeError):
            raise ValueError("the name of a set, or a list of triples [a, b, c] of finite numbers") from None

    @model_validator(mode="after")
    def _known_set(self) -> "OrthogonalizationSettings":
        chosen = coefficient_set(self.coefficients)
        accurate_method(self.method, len(chosen.sequence(self.steps)), getattr(torch, self.dtype))
        return self

    def build(self) -> Orthogonalization:
        dtype = getattr(torch, self.dtype)
        return Orthogonalization(self.coefficients, self.steps, self.method, dtype, self.scale, self.compile)


class RuleSettings(Section):
    """What every rule reads."""

    rule: ClassVar[RuleName]
    needs_matrix: ClassVar[bool] = False

    lr: NonNegative = Field(1e-3, description="learning rate")
    weight_decay: NonNegative = Field(0.0, description="decoupled weight decay, times the learning rate")
    state_dtype: StateDType = Field("float32", description="how the elementwise state is kept; 8bit needs bitsandbytes")

    @field_validator("state_dtype")
    @classmethod
    def _installed(cls, state_dtype: str) -> str:
        if state_dtype == "8bit" and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("'float32' or 'bfloat16', or install bitsandbytes: pip install 'ds-optforge[8bit]'")
        return state_dtype

    @model_validator(mode="after")
    def _representable(self) -> "RuleSettings":
        rates = [*getattr(self, "betas", ()), getattr(self, "momentum", 0.0)]
        if self.state_dtype == "bfloat16" and max(rates) > _SLOWEST_IN_BFLOAT16:
            raise ValueError(
                f"state_dtype: got 'bfloat16' with a moving average of decay rate {max(rates):g}, which would stand still in "
                f"its 8 bits; allowed: rates up to {_SLOWEST_IN_BFLOAT16}, or 'float32' or '8bit'"
            )
        return self

    @property
    def needs_schedule(self) -> str:
        """The decay schedule that only an OptForgeSchedule can follow, or ""."""
        return ""

    @classmethod
    def refuse_key(cls, key: str, top_level: bool) -> tuple[str, list[str]]:
        readers = [name for name, other in SETTINGS.items() if key in other.model_fields]
        reason = f"'{cls.rule}' does not read it" + (f" (read by {', '.join(readers)})" if readers else "")
        return reason, [*cls.model_fields, *(COMMON_KEYS if top_level else ())]

    def build(self) -> Rule:
        """The rule object with everything that no schedule may change."""
        raise NotImplementedError

    def scheduled(self) -> dict[str, Any]:
        """The values that live in the parameter group."""
        return {name: getattr(self, name) for name in self.build().scheduled}


class DecaySettings(RuleSettings):
    """How the rules that decay towards zero do it."""

    cautious_weight_decay: bool = Field(False, description="decay only where the update points towards zero too")
    weight_decay_schedule: DecaySchedule = Field("constant", description="over the run: linear is 1 - progress")

    @property
    def needs_schedule(self) -> str:
        return "" if self.weight_decay_schedule == "constant" else self.weight_decay_schedule


class AdamWSettings(DecaySettings):
    """Fields of ``adamw``."""

    rule: ClassVar[RuleName] = "adamw"
    betas: Betas = Field((0.9, 0.95), description="decay rates of the first and second moment")
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(1e-8, description="added to the root of the second moment")

    def build(self) -> Rule:
        return AdamW(eps=self.eps, cautious=self.cautious_weight_decay)


class AdamW8bitSettings(AdamWSettings):
    """Fields of ``adamw_8bit``: adamw with 8-bit state."""

    rule: ClassVar[RuleName] = "adamw_8bit"
    state_dtype: StateDType = Field("8bit", description="how the elementwise state is kept", validate_default=True)


class LionSettings(DecaySettings):
    """Fields of ``lion``."""

    rule: ClassVar[RuleName] = "lion"
    lr: NonNegative = Field(1e-4, description="learning rate; 3 to 10 times smaller than AdamW's")
    betas: Betas = Field((0.9, 0.99), description="interpolation of the update, and decay rate of the momentum")

    def build(self) -> Rule:
        return Lion(cautious=self.cautious_weight_decay)


class ScheduleFreeAdamWSettings(RuleSettings):
    """Fields of ``schedule_free_adamw``."""

    rule: ClassVar[RuleName] = "schedule_free_adamw"
    lr: NonNegative = Field(2.5e-3, description="learning rate; no schedule on top")
    betas: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], Beta], Strict(False)] = Field(
        (0.9, 0.999), description="interpolation between average and descent point, and decay rate of the second moment"
    )
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(1e-8, description="added to the root of the second moment")
    warmup_steps: int = Field(0, ge=0, description="steps of its own linear warm-up")

    def build(self) -> Rule:
        return ScheduleFreeAdamW(eps=self.eps, warmup_steps=self.warmup_steps)


class MomentumWarmup(Section):
    """The momentum rises linearly to its value."""

    start: Beta = Field(0.85, alias="from", description="momentum of the first step")
    steps: int = Field(300, ge=1, description="steps until the full momentum")


class MuonSettings(DecaySettings):
    """Fields of ``muon``."""

    rule: ClassVar[RuleName] = "muon"
    needs_matrix: ClassVar[bool] = True
    lr: NonNegative = Field(0.02, description="learning rate")
    momentum: Beta = Field(0.95, description="decay rate of the gradient's moving average")
    momentum_warmup: MomentumWarmup | None = Field(None, description='{"from": 0.85, "steps": 300}')
    nesterov: bool = Field(True, description="orthogonalize lerp(gradient, average, momentum) rather than the average")
    orthogonalization: OrthogonalizationSettings = OrthogonalizationSettings()

    def build(self) -> Rule:
        return Muon(**self._arguments())

    def _arguments(self) -> dict[str, Any]:
        warmup = self.momentum_warmup
        return {
            "nesterov": self.nesterov,
            "orthogonalization": self.orthogonalization.build(),
            "cautious": self.cautious_weight_decay,
            "momentum_warmup": (warmup.start, warmup.steps) if warmup else None,
        }


class NorMuonSettings(MuonSettings):
    """Fields of ``normuon``."""

    rule: ClassVar[RuleName] = "normuon"
    beta2: Beta = Field(0.95, description="decay rate of the second moment of each output row")

    def build(self) -> Rule:
        return NorMuon(**self._arguments(), beta2=self.beta2)


SETTINGS: dict[str, type[RuleSettings]] = {
    settings.rule: settings
    for settings in (
        MuonSettings,
        NorMuonSettings,
        AdamWSettings,
        AdamW8bitSettings,
        LionSettings,
        ScheduleFreeAdamWSettings,
    )
}
