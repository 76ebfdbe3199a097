"""The "params" of an OptForge section, validated, and resolved for one parameter at a time."""

from collections.abc import Mapping, Sequence
from typing import Any

from ds_optforge.config.sections import ROLES, CommonSettings, Override, Role
from ds_optforge.errors import ConfigError, did_you_mean
from ds_optforge.rules.around import KEYS, Around
from ds_optforge.rules.base import MatrixRule
from ds_optforge.rules.registry import rule_names, rule_settings
from ds_optforge.rules.settings import RuleSettings
from ds_optforge.validation import refuse_auto, validate

# Keys that a rule beside the main one inherits from the top level, if it reads them.
_INHERITED = ("lr", "weight_decay", "weight_decay_schedule", "state_dtype")


class OptimizerConfig:
    """The validated "params" of an OptForge section; `settings` resolves them for one parameter.

    Every role and every override is validated at once, before any parameter is known.

    Args:
        section: the "params".
        path: of the section, for messages.

    Attributes:
        common: the keys that belong to no rule.
        main: settings of the rule that ``name`` asks for.

    Raises:
        ConfigError: unknown keys, bad values, or settings that their rule does not read.
    """

    def __init__(self, section: Mapping[str, Any], path: str = "optimizer.params") -> None:
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
        if self.common.lora and not self.main.needs_matrix():
            raise ConfigError(
                f"{path}.lora: got '{self.common.lora}' with '{self.main.rule}', which is no matrix rule; allowed: none"
            )
        for role in ROLES:
            self.settings(role)
        for index, override in enumerate(self.common.overrides):
            self._check_override(index, (override.role,) if override.role else ROLES)

    @property
    def around(self) -> Around:
        """What stands around the rule of every parameter."""
        return Around(self.common.average, self.common.ema_nesterov)

    def settings(
        self,
        role: Role,
        overrides: Sequence[int] = (),
        left: bool = False,
        own: Mapping[str, Any] | None = None,
        place: str = "param_groups",
    ) -> RuleSettings:
        """Return the settings of a parameter's rule, which name the rule.

        Args:
            role: of the parameter.
            overrides: indices of the overrides that match it; later ones win.
            left: whether a matrix rule leaves the parameter to adamw, unless a rule is named for it: a router, or a matrix
                beyond ``max_aspect_ratio``.
            own: settings of its own parameter group, weaker than overrides and stronger than everything else.
            place: names that group in messages.

        Raises:
            ConfigError: an unknown rule, or settings that the rule does not read.
        """
        layers = [(f"{self._path}.roles.{role}", dict(self.common.roles.get(role, {}))), (place, dict(own or {}))]
        layers += [(f"{self._path}.overrides[{i}]", self.common.overrides[i].settings) for i in overrides]
        for_itself = any("name" in layer for _, layer in layers[1:])
        names = [(path, layer.pop("name")) for path, layer in layers if "name" in layer]
        path, name = names[-1] if names else (self._path, self.common.name)
        if _settings_of(name, path).needs_matrix() and ((left and not for_itself) or (role != "matrix" and not names)):
            name = "adamw"
            if left and role == "matrix":  # settings of the matrix role are not meant for it
                layers = layers[1:]
        return self._resolve(name, [*self._base(role, name), *layers])

    def _check_override(self, index: int, roles: Sequence[Role]) -> None:
        """Refuse an override that is valid for none of the roles; its parameters are not known yet."""
        problems = []
        for role in roles:
            try:
                self.settings(role, (index,))
            except ConfigError as error:
                problems.append(error)
        if len(problems) == len(roles):
            raise problems[0]

    def _base(self, role: Role, name: str) -> list[tuple[str, Mapping[str, Any]]]:
        """Return the weakest layers of a rule's settings: the top level, the ``adamw`` section, no decay of scalars."""
        top = self._top
        if name != self.common.name:
            fields = _settings_of(name, self._path).model_fields
            readable = [key for key in _INHERITED if key in fields]
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
        """Refuse a rule that the configuration cannot have: a field of its own names, an average, or a sharding mode."""
        taken = {*CommonSettings.model_fields, *Override.model_fields} & type(settings).model_fields.keys()
        if taken:
            raise ConfigError(
                f"rule '{settings.rule}': its field '{min(taken)}' is a key of every configuration; allowed: another name"
            )
        rule, mode = settings.builds, self.common.sharding.mode
        if rule.averages and self.around.buffers:
            key = KEYS[self.around.buffers[0].name]
            raise ConfigError(
                f"{self._path}.{key}: got a section with '{settings.rule}', which averages its weights itself; allowed: none"
            )
        if mode != "gather" and issubclass(rule, MatrixRule) and (rule.sums or rule.factors):
            needs = "needs sums over whole matrices" if rule.sums else "keeps factors of whole matrices at their owners"
            raise ConfigError(
                f"{self._path}.sharding.mode: got '{mode}' with '{settings.rule}', which {needs}; allowed: 'gather'"
            )
        if issubclass(rule, MatrixRule) and self.common.sharding.share < 1:
            self._check_rows(settings)
        return settings

    def _check_rows(self, settings: RuleSettings) -> None:
        """Refuse a rule that cannot step a share of the rows: also one whose base can, but that is not built by it."""
        share = self.common.sharding.share
        where = f"{self._path}.sharding.rows: got {share:g} with"
        if settings.state_dtype == "8bit":
            raise ConfigError(
                f"{where} state_dtype '8bit', whose blocks depend on the cuts, so that the rows would; "
                "allowed: 'float32' or 'bfloat16', or null"
            )
        try:
            found = settings.build_rows(share)
        except ValueError as error:
            raise ConfigError(f"{where} {error}") from None
        if not isinstance(found, settings.builds):
            raise ConfigError(f"{where} rule '{settings.rule}', which steps whole matrices; allowed: null")


def _names() -> str:
    return f"{', '.join(rule_names())} (a rule of another package: install it, or import it first)"


def _settings_of(name: Any, path: str) -> type[RuleSettings]:
    """Return the settings class of a rule. Raises ConfigError for a name that nothing offers."""
    found = rule_settings(name)
    if found is None:
        raise ConfigError(f"{path}.name: got {name!r}; {did_you_mean(str(name), rule_names())}allowed: {_names()}")
    return found
