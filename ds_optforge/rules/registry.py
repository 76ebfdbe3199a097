"""The rules by name: those of this package, those that `register_rule` has been called on, and those of other packages.

Another package offers a rule by an entry point of the group ``ds_optforge.rules``, whose name is the rule's and which
names the module that registers it. It is imported when a configuration asks for the rule.
"""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from ds_optforge.rules.base import Buffer, ElementwiseRule, MatrixRule, Rule, Statistic, Sum
from ds_optforge.rules.settings import REGISTERED, RuleSettings
from ds_optforge.validation import ConfigError

ENTRY_POINTS = "ds_optforge.rules"
_RESERVED = ("step",)  # keys of the state that are no rule's
S = TypeVar("S", bound=type[RuleSettings])


class RuleError(TypeError):
    """A class that cannot be registered as a rule. The message names it, and everything that it lacks."""


def register_rule(settings: S) -> S:
    """Make a rule known by its name: a decorator of its settings, a subclass of `RuleSettings`.

    Raises:
        RuleError: a class that is no complete rule, or a name that is taken. (The same class may be registered again, as
            when a module is reloaded.)
    """
    problems = list(_problems(settings))
    if problems:
        raise RuleError("\n".join(f"{_place(settings)}: {problem}" for problem in problems))
    known = REGISTERED.get(settings.rule)
    if known is not None and _place(known) != _place(settings):
        raise RuleError(
            f"{_place(settings)}: the name '{settings.rule}' is taken by {_place(known)}; allowed: another value of 'rule'"
        )
    REGISTERED[settings.rule] = settings
    return settings


def rule_names() -> tuple[str, ...]:
    """Return the names of all rules that a configuration can ask for, in alphabetical order."""
    _import_own()
    return tuple(sorted({*REGISTERED, *_offers()}))


def rule_settings(name: Any) -> type[RuleSettings] | None:
    """Return the settings class of a rule; None for a name that nothing offers.

    Raises:
        ConfigError: another package offers the rule, but cannot be imported, or does not register it; or two offer it.
    """
    _import_own()
    if not isinstance(name, str):
        return None
    offers = _offers().get(name, ())
    if len(offers) > 1 or (offers and name in REGISTERED and not _is_from(offers[0], REGISTERED[name])):
        places = [offer.value for offer in offers] + ([_place(REGISTERED[name])] if name in REGISTERED else [])
        raise ConfigError(f"rule '{name}': offered by {' and by '.join(places)}; allowed: one of them installed")
    if name not in REGISTERED and offers:
        _import_offer(name, offers[0])
    return REGISTERED.get(name)


@cache
def _import_own() -> None:
    """Import every file of this folder, so that it registers its rules."""
    package = importlib.import_module("ds_optforge.rules")
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)


def _offers() -> dict[str, tuple[EntryPoint, ...]]:
    """Return the entry points of installed packages by the rule's name; a package found twice on the path counts once."""
    found: dict[str, dict[str, EntryPoint]] = {}
    for offer in entry_points(group=ENTRY_POINTS):
        found.setdefault(offer.name, {})[offer.value] = offer
    return {name: tuple(offers.values()) for name, offers in found.items()}


def _import_offer(name: str, offer: EntryPoint) -> None:
    where = f"rule '{name}' of {offer.dist.name if offer.dist else 'a package'} ({offer.value})"
    try:
        offer.load()
    except Exception as error:  # whatever another package's import raises
        raise ConfigError(f"{where}: cannot be imported: {type(error).__name__}: {error}") from error
    if name not in REGISTERED:
        raise ConfigError(f"{where}: was imported but registers no rule of this name; allowed: @register_rule on its settings")


def _is_from(offer: EntryPoint, settings: type[RuleSettings]) -> bool:
    """Whether an entry point is the one through which a rule was, or would be, registered."""
    return settings.__module__.partition(".")[0] == offer.module.partition(".")[0]


def _place(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', repr(thing))}"


def _problems(settings: Any) -> Iterator[str]:
    """Yield every problem that keeps a class from being a rule's settings, one phrase each."""
    if not (isinstance(settings, type) and issubclass(settings, RuleSettings)):
        yield "is no rule; allowed: a subclass of RuleSettings"
        return
    own = vars(settings)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", str(own.get("rule", ""))):
        yield f"rule: got {own.get('rule', 'nothing')!r}; allowed: a name of small letters, digits and _, in the class itself"
    if not (isinstance(own.get("title"), str) and own["title"]):
        yield f"title: got {own.get('title', 'nothing')!r}; allowed: a name for people, in the class itself"
    if settings.build is RuleSettings.build:
        yield "build: missing; allowed: a method that returns the rule"
    rates = getattr(settings, "decay_rates", None)
    if not isinstance(rates, tuple):
        yield "decay_rates: missing; allowed: names of fields, () if no buffer is a moving average"
    yield from _unknown("decay_rates", rates or (), settings.model_fields)
    rule = getattr(settings, "builds", None)
    if not (isinstance(rule, type) and issubclass(rule, Rule)):
        yield f"builds: got {rule!r}; allowed: the class of the rule, an ElementwiseRule or a MatrixRule"
        return
    yield from (f"{rule.__qualname__}: {problem}" for problem in _problems_of_rule(rule, settings))


def _problems_of_rule(rule: type[Rule], settings: type[RuleSettings]) -> Iterator[str]:
    if issubclass(rule, ElementwiseRule) == issubclass(rule, MatrixRule):
        yield "is not one of ElementwiseRule and MatrixRule; allowed: exactly one as its base"
    if inspect.isabstract(rule):
        yield f"lacks {', '.join(sorted(rule.__abstractmethods__))}; allowed: all abstract members defined"
    for name in ("buffers", "scheduled"):
        if not isinstance(getattr(rule, name, None), tuple):
            yield f"{name}: missing; allowed: a tuple"
    scheduled = getattr(rule, "scheduled", ())
    yield from _unknown("scheduled", scheduled, settings.model_fields)
    needed = [name for name in ("lr", "weight_decay") if name in settings.model_fields and name not in scheduled]
    yield from (f"scheduled: '{name}' is missing, so no schedule would reach it; allowed: in the tuple" for name in needed)
    yield from _problems_of_state(rule)


def _problems_of_state(rule: type[Rule]) -> Iterator[str]:
    buffers: tuple[Buffer, ...] = getattr(rule, "buffers", ())
    statistics: tuple[Statistic, ...] = getattr(rule, "statistics", ())
    sums: tuple[Sum, ...] = getattr(rule, "sums", ())
    for name, kind in (("buffers", Buffer), ("statistics", Statistic), ("sums", Sum)):
        yield from (
            f"{name}: got {item!r}; allowed: {kind.__name__}" for item in getattr(rule, name, ()) if type(item) is not kind
        )
    names = [item.name for item in (*buffers, *statistics) if isinstance(item, Buffer | Statistic)]
    odd = [name for name in names if name in _RESERVED or name.endswith("_absmax") or names.count(name) > 1]
    yield from (f"state '{name}': a name that is taken; allowed: another one" for name in dict.fromkeys(odd))
    if sum(buffer.momentum for buffer in buffers) > 1:
        yield "buffers: more than one with momentum=True; allowed: one, or none"
    if issubclass(rule, ElementwiseRule) and any(buffer.of_update for buffer in buffers):
        yield "buffers: got of_update=True in an elementwise rule; allowed: in a matrix rule"
    yield from _unknown("averages", rule.averages, [buffer.name for buffer in buffers])
    if bool(rule.averages) != (rule.averaged is not Rule.averaged):
        yield "averages and averaged: got one of them; allowed: both, or neither"
    if issubclass(rule, MatrixRule) and bool(sums) != (rule.summand is not MatrixRule.summand):
        yield "sums and summand: got one of them; allowed: both, or neither"


def _unknown(what: str, names: Any, known: Any) -> Iterator[str]:
    yield from (f"{what}: got {name!r}; allowed: {', '.join(known) or 'none'}" for name in names if name not in known)
