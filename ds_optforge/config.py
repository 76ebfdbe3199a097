"""The "params" of the optimizer and scheduler sections, validated, and resolved for one parameter at a time."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Field, Strict, field_validator, model_validator

from ds_optforge.rules.base import MatrixRule
from ds_optforge.rules.registry import rule_names, rule_settings
from ds_optforge.rules.settings import DTypeName, RuleSettings
from ds_optforge.validation import ConfigError, Section, refuse_auto, validate

Role: TypeAlias = Literal["matrix", "embedding", "unembedding", "scalar"]
ROLES: tuple[Role, ...] = ("matrix", "embedding", "unembedding", "scalar")

# What a rule beside the main one takes over from the top level, where it reads it at all.
_SHARED = ("lr", "weight_decay", "weight_decay_schedule", "state_dtype")


# With fewer whole rows on a rank, what shard_local does is row normalisation rather than Muon.
THIN_ROWS = 32


class ShardingSettings(Section):
    """How the matrices that ZeRO has cut are orthogonalized."""

    mode: Literal["gather", "shard_local"] = Field(
        "gather", description="gather: whole, by the rank that owns the matrix; shard_local: each rank its own rows, no traffic"
    )
    gather_every: int | None = Field(
        None, ge=2, description="shard_local: every how many steps to gather, from the first on (block-periodic); null: never"
    )
    wire_dtype: DTypeName = Field("bfloat16", description="fragments and updates are rounded to it, travelling or not")
    bucket_numel: int = Field(
        2**26, ge=1, description="elements of a bucket's send and of its receive buffer; a step works in two buckets"
    )

    @model_validator(mode="after")
    def _periodic(self) -> "ShardingSettings":
        if self.gather_every and self.mode == "gather":
            raise ValueError(f"gather_every: got {self.gather_every} with mode 'gather'; allowed: mode 'shard_local'")
        return self

    @property
    def travels(self) -> bool:
        """Whether matrices are ever gathered."""
        return self.mode == "gather" or self.gather_every is not None

    def gathers(self, step: int) -> bool:
        """Whether the matrices are gathered in this step (from 1)."""
        return self.mode == "gather" or (self.gather_every is not None and (step - 1) % self.gather_every == 0)


class TelemetrySettings(Section):
    """Numbers about the steps, for the whole model."""

    every: int = Field(ge=1, description="steps from one record to the next; 10 cost less than 1% of a step's time")


class Override(Section):
    """Settings for the parameters whose name matches a regular expression (searched anywhere in the name)."""

    model_config = ConfigDict(extra="allow")

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

    name: str = Field(description="the rule of the model's matrices, or of all parameters")
    adamw: dict[str, Any] = Field(default_factory=dict, description="for parameters that a matrix rule does not take")
    roles: dict[Role, dict[str, Any]] = Field(default_factory=dict, description="settings by role, name included")
    overrides: Annotated[tuple[Override, ...], Strict(False)] = Field((), description="settings by parameter name")
    sharding: ShardingSettings = ShardingSettings()
    telemetry: TelemetrySettings | None = Field(None, description='numbers about every k-th step: {"every": 10}')
    max_aspect_ratio: Annotated[float, Field(ge=1)] = Field(10.0, description="a longer, thinner matrix falls back to adamw")


def _names() -> str:
    return f"{', '.join(rule_names())} (a rule of another package: install it, or import it first)"


def _settings_of(name: Any, path: str) -> type[RuleSettings]:
    """The settings of a rule. Raises ConfigError for a name that nothing offers."""
    found = rule_settings(name)
    if found is None:
        raise ConfigError(f"{path}.name: got {name!r}; allowed: {_names()}")
    return found


class OptimizerConfig:
    """The validated "params" of an OptForge section; `settings` resolves them for one parameter."""

    def __init__(self, section: Mapping[str, Any], path: str = "optimizer.params") -> None:
        """Raises ConfigError for anything that a parameter could run into later, whatever its role."""
        self._path = path
        refuse_auto(section, path)
        common = {key: value for key, value in section.items() if key in CommonSettings.model_fields}
        if "name" not in common:
            raise ConfigError(f"{path}.name: missing; allowed: {', '.join(rule_names())}")
        _settings_of(common["name"], path)
        self.common = validate(CommonSettings, common, path)
        self._top = {key: value for key, value in section.items() if key not in common}
        self.main = self._resolve(self.common.name, [(path, self._top)])
        if self.common.adamw and not self.main.needs_matrix():
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
        if _settings_of(name, path).needs_matrix() and ((too_thin and not for_itself) or (role != "matrix" and not names)):
            name = "adamw"
            if too_thin and role == "matrix":  # what was said of matrices does not hold for it
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
            fields = _settings_of(name, self._path).model_fields
            readable = [key for key in _SHARED if key in fields]
            top = {key: value for key, value in top.items() if key in readable}
            if name == "adamw":
                top.setdefault("lr", self.main.lr)
        beside = [(f"{self._path}.adamw", self.common.adamw)] if name == "adamw" else []
        # Decay is for matrices and tables, unless the scalar role itself asks for it.
        decays = role != "scalar" or "weight_decay" not in _settings_of(name, self._path).model_fields
        no_decay = [] if decays else [(self._path, {"weight_decay": 0.0})]
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
        return self._checked(validate(_settings_of(name, self._path), merged, self._path, paths, CommonSettings.model_fields))

    def _checked(self, settings: RuleSettings) -> RuleSettings:
        """Refuse a sharding mode that the rule cannot have."""
        rule, mode = settings.builds, self.common.sharding.mode
        if mode != "gather" and issubclass(rule, MatrixRule) and rule.sums:
            raise ConfigError(
                f"{self._path}.sharding.mode: got '{mode}' with '{settings.rule}', which needs sums over whole matrices; "
                "allowed: 'gather'"
            )
        return settings


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
        if self.cooldown_num_steps or not self.cooldown_ratio:
            return self.cooldown_num_steps
        return max(int(self.cooldown_ratio * (self.total_num_steps or 0)), 1)  # down, where a warm-up rounds up


def schedule_config(section: Mapping[str, Any], path: str = "scheduler.params") -> ScheduleConfig:
    """Validate the "params" of an OptForgeSchedule section. Raises ConfigError."""
    refuse_auto(section, path)
    return validate(ScheduleConfig, section, path)
