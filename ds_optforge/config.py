"""The "params" of the optimizer and scheduler sections as pydantic models: one of settings per rule, unknown keys forbidden.

A bad section is one `ConfigError` that lists, for every problem, the path, what was found and what is allowed.
"""

import difflib
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, Strict, TypeAdapter, ValidationError, field_validator, model_validator

from ds_optforge.orthogonalize import Method, accurate_method, coefficient_set
from ds_optforge.rules.adamw import AdamW
from ds_optforge.rules.base import Rule
from ds_optforge.rules.lion import Lion
from ds_optforge.rules.muon import Muon, Orthogonalization, Scale
from ds_optforge.rules.normuon import NorMuon
from ds_optforge.rules.schedule_free_adamw import ScheduleFreeAdamW

Role: TypeAlias = Literal["matrix", "embedding", "unembedding", "scalar"]
ROLES: tuple[Role, ...] = ("matrix", "embedding", "unembedding", "scalar")
RuleName: TypeAlias = Literal["muon", "normuon", "adamw", "adamw_8bit", "lion", "schedule_free_adamw"]
DTypeName: TypeAlias = Literal["float32", "bfloat16"]
StateDType: TypeAlias = Literal["float32", "bfloat16", "8bit"]
DecaySchedule: TypeAlias = Literal["constant", "linear", "cosine"]

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Strict(False)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Triple: TypeAlias = tuple[Finite, Finite, Finite]


M = TypeVar("M", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that cannot be used. The message has a line per problem: path, what was found, what is allowed."""


class Section(BaseModel):
    """A JSON object with known keys only; numbers are numbers, not strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class OrthogonalizationSettings(Section):
    """How the matrices of a matrix rule are orthogonalized."""

    coefficients: str | tuple[tuple[float, float, float], ...] = Field(
        "quintic", description="name of a coefficient set, or a list of triples [a, b, c]"
    )
    steps: int | None = Field(None, ge=1, description="Newton-Schulz steps; null takes the set's own number (quintic: 5)")
    method: Method = Field("auto", description="standard, gram, or auto: the one with fewer FLOPs for the shape")
    dtype: DTypeName = Field("bfloat16", description="of the matrix products")
    scale: Scale = Field("shape", description="factor of the update, from the matrix's shape")

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
        chosen.sequence(self.steps)
        accurate_method(self.method, chosen, getattr(torch, self.dtype))
        return self

    def build(self) -> Orthogonalization:
        return Orthogonalization(self.coefficients, self.steps, self.method, getattr(torch, self.dtype), self.scale)


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

    @property
    def needs_schedule(self) -> str:
        """The decay schedule that only an OptForgeSchedule can follow, or ""."""
        return ""

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

# What a rule beside the main one takes over from the top level, where it reads it at all.
_SHARED = ("lr", "weight_decay", "weight_decay_schedule", "state_dtype")


class ShardingSettings(Section):
    """How matrices meet their owners. (mode `gather`: every matrix is orthogonalized whole, exactly once.)"""

    mode: Literal["gather"] = "gather"
    wire_dtype: DTypeName = Field("bfloat16", description="fragments and updates are rounded to it, travelling or not")
    bucket_numel: int = Field(2**26, ge=1, description="elements per rank of one bucket; bounds the workspace")


class Override(BaseModel):
    """Settings for the parameters whose name matches a regular expression (searched anywhere in the name)."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    match: str = Field(description="a regular expression")
    role: Role | None = None
    split: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Strict(False)] | None = Field(
        None, description="rows of each matrix that is fused into the parameter"
    )
    heads: int | tuple[int, ...] | None = Field(
        None, description="equal row blocks that each matrix is cut into; a list: one count per entry of split"
    )

    @field_validator("heads", mode="wrap")
    @classmethod
    def _counts(cls, value: Any, handler: Any) -> Any:
        counts = value if isinstance(value, list | tuple) else [value]
        if not counts or any(type(count) is not int or count < 1 for count in counts):
            raise ValueError("an integer of at least 1, or a list of them")
        return value if isinstance(value, int) else tuple(value)

    @field_validator("match")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"a regular expression ({error})") from None
        return pattern

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class CommonSettings(Section):
    """The keys of "params" that belong to no rule."""

    name: RuleName
    adamw: dict[str, Any] = Field(default_factory=dict, description="for parameters that a matrix rule does not take")
    roles: dict[Role, dict[str, Any]] = Field(default_factory=dict, description="settings by role, name included")
    overrides: Annotated[tuple[Override, ...], Strict(False)] = Field((), description="settings by parameter name")
    sharding: ShardingSettings = ShardingSettings()
    max_aspect_ratio: Annotated[float, Field(ge=1)] = Field(10.0, description="a longer, thinner matrix falls back to adamw")


class OptimizerConfig:
    """The validated "params" of an OptForge section; `settings` resolves them for one parameter."""

    def __init__(self, section: Mapping[str, Any], path: str = "optimizer.params") -> None:
        """Raises ConfigError for anything that a parameter could run into later, whatever its role."""
        self._path = path
        _refuse_auto(section, path)
        common = {key: value for key, value in section.items() if key in CommonSettings.model_fields}
        if "name" not in common:
            raise ConfigError(f"{path}.name: missing; allowed: {', '.join(SETTINGS)}")
        self.common = validate(CommonSettings, common, path)
        self._top = {key: value for key, value in section.items() if key not in common}
        self.main = self._resolve(self.common.name, [(path, self._top)])
        if self.common.adamw and not self.main.needs_matrix:
            raise ConfigError(f"{path}.adamw: got a section; allowed: none, '{self.main.rule}' takes every parameter itself")
        for role in ROLES:
            self.settings(role)
        for index, override in enumerate(self.common.overrides):
            self._check_override(index, (override.role,) if override.role else ROLES)

    def settings(
        self,
        role: Role,
        overrides: Sequence[int] = (),
        too_thin: bool = False,
        own: Mapping[str, Any] | None = None,
        place: str = "param_groups",
    ) -> RuleSettings:
        """The rule and its settings for a parameter.

        Args:
            role: of the parameter.
            overrides: indices of the overrides that match it; later ones win.
            too_thin: the parameter's aspect ratio is beyond ``max_aspect_ratio``, so a matrix rule does not take it.
            own: settings of its own parameter group, weaker than overrides and stronger than everything else.
            place: names that group in messages.
        """
        layers = [(f"{self._path}.roles.{role}", dict(self.common.roles.get(role, {}))), (place, dict(own or {}))]
        layers += [(f"{self._path}.overrides[{i}]", self.common.overrides[i].settings) for i in overrides]
        for_itself = any("name" in layer for _, layer in layers[1:])
        names = [(path, layer.pop("name")) for path, layer in layers if "name" in layer]
        path, name = names[-1] if names else (self._path, self.common.name)
        if not isinstance(name, str) or name not in SETTINGS:
            raise ConfigError(f"{path}.name: got {name!r}; allowed: {', '.join(SETTINGS)}")
        if SETTINGS[name].needs_matrix and ((too_thin and not for_itself) or (role != "matrix" and not names)):
            name = "adamw"
            if too_thin:  # what was said of matrices does not hold for it
                layers = layers[1:]
        return self._resolve(name, [*self._base(role, name), *layers])

    def _check_override(self, index: int, roles: Sequence[Role]) -> None:
        """Its parameters are not known yet: it must make sense for at least one role."""
        problems = []
        for role in roles:
            try:
                self.settings(role, (index,))
            except ConfigError as error:
                problems.append(error)
        if len(problems) == len(roles):
            raise problems[0]

    def _base(self, role: Role, name: str) -> list[tuple[str, Mapping[str, Any]]]:
        """What a rule's settings start from: the top level for the main rule, the ``adamw`` section beside a matrix rule."""
        top = self._top
        if name != self.common.name:
            readable = [key for key in _SHARED if key in SETTINGS[name].model_fields]
            top = {key: value for key, value in top.items() if key in readable}
            if name == "adamw":
                top.setdefault("lr", self.main.lr)
        beside = [(f"{self._path}.adamw", self.common.adamw)] if name == "adamw" else []
        # Decay is for matrices and tables, unless the scalar role itself asks for it.
        no_decay = [(self._path, {"weight_decay": 0.0})] if role == "scalar" else []
        return [(self._path, top), *beside, *no_decay]

    def _resolve(self, name: str, layers: Sequence[tuple[str, Mapping[str, Any]]]) -> RuleSettings:
        merged: dict[str, Any] = {}
        paths: dict[str, str] = {}
        for path, layer in layers:
            for key, value in layer.items():
                if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
                    value = {**merged[key], **value}
                merged[key] = value
                paths[key] = path
        return validate(SETTINGS[name], merged, self._path, paths)


class ScheduleConfig(Section):
    """The "params" of an OptForgeSchedule section; the fields are named as frameworks fill them.

    The curve runs from the end of the warm-up to the last step; a cool-down replaces its end.
    """

    name: Literal["none", "constant", "linear", "cosine", "wsd", "rex"] = Field(
        "constant", description="the curve after the warm-up; wsd is constant with a cool-down"
    )
    warmup_num_steps: int = Field(0, ge=0, description="steps of linear warm-up; the first step is not zero")
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="the same as a fraction of all steps")
    total_num_steps: int | None = Field(None, ge=1, description="optimizer steps of the whole run, warm-up included")
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="of the initial rate, at the last step")
    cooldown_num_steps: int = Field(0, ge=0, description="steps at the end that fall from where the curve is")
    cooldown_ratio: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="the same as a fraction of all steps")
    cooldown_shape: Literal["linear", "cosine", "1-sqrt"] = Field("linear", description="how the cool-down falls")
    exponent: Annotated[float, Field(gt=0)] = Field(0.5, description="of rex: (1 - progress) ** exponent")

    @model_validator(mode="after")
    def _consistent(self) -> "ScheduleConfig":
        if self.name == "none" and (self.warmup_num_steps or self.warmup_ratio or self.cools_down):
            raise ValueError("name: got 'none' with a warm-up or cool-down; allowed: 'constant', or 'none' alone")
        for part in ("warmup", "cooldown"):
            if getattr(self, f"{part}_num_steps") and getattr(self, f"{part}_ratio"):
                raise ValueError(f"{part}_ratio: got both {part}_num_steps and {part}_ratio; allowed: one of them")
        if self.name == "wsd" and not self.cools_down:
            raise ValueError("cooldown_ratio: missing; allowed: cooldown_num_steps or cooldown_ratio ('wsd' needs one)")
        falls = self.name in ("linear", "cosine", "rex") or self.cools_down
        if self.total_num_steps is None and (falls or self.warmup_ratio):
            raise ValueError(f"total_num_steps: missing; allowed: an integer of at least 1 ('{self.name}' needs it)")
        falling = max(self.cooldown, 1 if falls else 0)
        if self.total_num_steps is not None and self.warmup + falling > self.total_num_steps:
            needed = f"{self.warmup} steps of warm-up and {falling} to fall"
            raise ValueError(f"total_num_steps: got {self.total_num_steps}; allowed: at least {needed}")
        return self

    @property
    def cools_down(self) -> bool:
        return bool(self.cooldown_num_steps or self.cooldown_ratio)

    @property
    def decays(self) -> bool:
        """Whether the rate ever falls."""
        return self.name not in ("none", "constant") or self.cools_down

    @property
    def warmup(self) -> int:
        """Steps of warm-up, however they were given."""
        return self.warmup_num_steps or round(self.warmup_ratio * (self.total_num_steps or 0))

    @property
    def cooldown(self) -> int:
        """Steps of cool-down, however they were given."""
        return self.cooldown_num_steps or round(self.cooldown_ratio * (self.total_num_steps or 0))


def schedule_config(section: Mapping[str, Any], path: str = "scheduler.params") -> ScheduleConfig:
    """Validate the "params" of an OptForgeSchedule section. Raises ConfigError."""
    _refuse_auto(section, path)
    return validate(ScheduleConfig, section, path)


def validate(model: type[M], values: Mapping[str, Any], path: str, paths: Mapping[str, str] | None = None) -> M:
    """``model(**values)``, or a ConfigError whose lines start with ``path`` (``paths[key]`` where the key came from there)."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            origin = (paths or {}).get(str(detail["loc"][0]), path) if detail["loc"] else path
            where = _join(origin, [part for part in detail["loc"] if part != "[key]"])
            problems.append(_problem(model, detail, where, top_level=origin == path))
        raise ConfigError("\n".join(dict.fromkeys(problems))) from None


def _join(path: str, location: Sequence[int | str]) -> str:
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path


def _problem(model: type[BaseModel], detail: Any, where: str, top_level: bool) -> str:
    found = detail["input"]
    if detail["type"] == "extra_forbidden":
        return f"{where}: {_unknown_key(model, detail['loc'], top_level)}"
    if detail["type"] == "missing":
        return f"{where}: missing; allowed: {_model_at(model, detail['loc']).model_fields[str(detail['loc'][-1])].description}"
    if detail["type"] == "value_error":  # of ours: about one field of the section, or about the value itself
        message = str(detail["ctx"]["error"])
        return f"{where}.{message}" if isinstance(found, Mapping) else f"{where}: {_got(found)}; allowed: {message}"
    allowed = detail["msg"].removeprefix("Input should be ").removeprefix("Input should ")
    return f"{where}: {_got(found)}; allowed: {allowed}"


def _got(found: Any) -> str:
    return f"got {found!r} ({type(found).__name__})"


def _model_at(model: type[BaseModel], location: Sequence[int | str]) -> Any:
    """The section that the last part of ``location`` is a key of."""
    inner: Any = model
    for part in location[:-1]:
        if isinstance(part, str):
            annotation = inner.model_fields[part].annotation
            inner = next(kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields"))
    return inner


def _unknown_key(model: type[BaseModel], location: Sequence[int | str], top_level: bool) -> str:
    inner = _model_at(model, location)
    allowed = list(inner.model_fields)
    if issubclass(inner, RuleSettings):
        others = [name for name, other in SETTINGS.items() if location[-1] in other.model_fields]
        reason = f"'{inner.rule}' does not read it" + (f" (read by {', '.join(others)})" if others else "")
        allowed += [key for key in CommonSettings.model_fields if top_level and key not in allowed]
    else:
        reason = "unknown key"
    close = difflib.get_close_matches(str(location[-1]), allowed, n=1)
    return f"{reason}; " + (f"did you mean '{close[0]}'? " if close else "") + f"allowed: {', '.join(allowed)}"


def _refuse_auto(value: Any, path: str) -> None:
    """A framework fills "auto" before it builds an optimizer; one that is left is a mistake."""
    left = list(_autos(value, path))
    if left:
        raise ConfigError("\n".join(f'{where}: got "auto" that no framework filled; allowed: a value' for where in left))


def _autos(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _autos(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _autos(inner, f"{path}[{index}]")
    elif value == "auto" and not path.endswith((".orthogonalization.method", ".match")):
        yield path
