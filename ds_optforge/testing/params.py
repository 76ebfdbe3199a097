"""How a rule is configured for the checks, from the fields of its settings: what it is called does not matter."""

import importlib.util
from collections.abc import Mapping
from typing import Any, get_args

from ds_optforge.errors import ConfigError
from ds_optforge.rules import RuleSettings, rule_settings

TOLERANCE = 1e-5
# A mask that is next to its edge may fall on either side of it, which moves an element by lr x weight decay; and so may a sign
# of almost 0 that a matrix is orthogonalized with, which moves the whole matrix a little (1.1e-4 seen, of 1,728 elements).
TOLERANCE_OF_EDGES = 3e-4
TOLERANCE_OF_COMPACT_STATE = 0.02  # 8 bits hold 2 to 3 digits
SLOWEST_IN_BFLOAT16 = 0.99


def settings_of(rule: str) -> type[RuleSettings]:
    """The settings of a rule. Raises ConfigError for a name that nothing offers."""
    settings = rule_settings(rule)
    if settings is None:
        raise ConfigError(f"rule: got {rule!r}, which nothing registers; allowed: the name of a registered rule")
    return settings


def usual(rule: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The "params" of a rule whose numbers do not depend on the order of sums by more than float32 does.

    Products, wire and state in float32, and an eps that keeps gradients which are nothing but rounding from being steps. Weight
    decay, so that what it leaves out shows. Averages that every state format can hold. What the rule itself says of
    `RuleSettings.steady`. ``given`` comes on top.
    """
    settings = settings_of(rule)
    fields = settings.model_fields
    params: dict[str, Any] = {"name": rule, "state_dtype": "float32", "sharding": {"wire_dtype": "float32"}}
    if "eps" in fields:
        params["eps"] = 1e-5
    if "weight_decay" in fields:
        params["weight_decay"] = 0.1
    if "orthogonalization" in fields:
        params["orthogonalization"] = {"dtype": "float32"}
    if settings.needs_matrix():
        params["adamw"] = {"lr": 3e-3, "eps": 1e-5}
    params |= settings.steady
    params |= _quick_rates(settings, {})
    for key, value in (given or {}).items():
        both = isinstance(value, Mapping) and isinstance(params.get(key), Mapping)
        params[key] = {**params[key], **value} if both else value
    return params


def formats_of(rule: str) -> list[str]:
    """The state formats in which a rule is tested: all, or the one that it is made for. 8-bit state needs bitsandbytes."""
    field = settings_of(rule).model_fields["state_dtype"]
    allowed = get_args(field.annotation)
    formats = list(allowed) if field.default == "float32" else [field.default]
    return [str(name) for name in formats if name != "8bit" or importlib.util.find_spec("bitsandbytes")]


def in_format(params: Mapping[str, Any], state_dtype: str) -> dict[str, Any]:
    """The same with another state format, and averages that it can hold."""
    rates = _quick_rates(settings_of(params["name"]), params) if state_dtype == "bfloat16" else {}
    return {**params, **rates, "state_dtype": state_dtype}


def tolerance(params: Mapping[str, Any]) -> float:
    """The relative difference of a parameter, or of a loss, that the order of sums explains.

    In float32, gradients that are reduced in another order are off by about 1e-7, and Newton-Schulz magnifies small singular
    directions; 2e-6 was seen.
    """
    if params["state_dtype"] != "float32":
        return TOLERANCE_OF_COMPACT_STATE
    at_edges = params.get("cautious_weight_decay") or settings_of(params["name"]).signs
    return TOLERANCE_OF_EDGES if at_edges else TOLERANCE


def slow_rates(rule: str) -> dict[str, Any]:
    """Values of a rule's decay rates that bfloat16 state must refuse; empty where it has none."""
    settings = settings_of(rule)
    return {name: _mapped(_default(settings, name), lambda rate: 0.999) for name in settings.decay_rates[-1:]}


def _quick_rates(settings: type[RuleSettings], params: Mapping[str, Any]) -> dict[str, Any]:
    """The decay rates that would stand still in bfloat16, cut down."""
    found = {}
    for name in settings.decay_rates:
        value = params.get(name, _default(settings, name))
        quick = _mapped(value, lambda rate: min(rate, SLOWEST_IN_BFLOAT16))
        if quick != _mapped(value, float):
            found[name] = quick
    return found


def _default(settings: type[RuleSettings], name: str) -> Any:
    return settings.model_fields[name].get_default(call_default_factory=True)


def _mapped(value: Any, function: Any) -> Any:
    """A number, or each of several numbers, mapped."""
    return [function(one) for one in value] if isinstance(value, tuple | list) else function(value)
