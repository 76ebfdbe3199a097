"""The rules by name: those of this package, those that `register_rule` has been called on, and those of other packages.

Another package offers a rule by an entry point of the group ``ds_optforge.rules``, whose name is the rule's and which
names the module that registers it. It is imported when a configuration asks for the rule.
"""

import importlib
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from importlib.metadata import EntryPoint, entry_points
from itertools import chain
from typing import Any, TypeVar, get_args

from ds_optforge.errors import ConfigError
from ds_optforge.rules.around import SCALARS
from ds_optforge.rules.base import Buffer, ElementwiseRule, Given, MatrixRule, Per, Rule, Statistic, Sum, settles
from ds_optforge.rules.factor import Factor
from ds_optforge.rules.settings import REGISTERED, RuleSettings
from ds_optforge.zero.partition import Of

ENTRY_POINTS = "ds_optforge.rules"
_RESERVED = ("step", *SCALARS, *chain.from_iterable(SCALARS.values()))  # keys of the state that are no rule's
_IMPORTED: set[str] = set()  # rules whose entry point has been imported
S = TypeVar("S", bound=type[RuleSettings])
T = TypeVar("T")


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
    of_another = offers and name in REGISTERED and name not in _IMPORTED and not _is_from(offers[0], REGISTERED[name])
    if len(offers) > 1 or of_another:
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


def _offers() -> Mapping[str, tuple[EntryPoint, ...]]:
    """What installed packages offer, by the rule's name."""
    return _offers_on(tuple((place, _changed_at(place)) for place in sys.path))


def _changed_at(place: str) -> int:
    """When something was last installed in a folder, or removed from it."""
    try:
        return os.stat(place or ".").st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=1)
def _offers_on(path: tuple[tuple[str, int], ...]) -> Mapping[str, tuple[EntryPoint, ...]]:
    """Reads every installed package's metadata, which takes longer than a configuration with dozens of look-ups may.

    One package that is found twice on the path counts once.
    """
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
    _IMPORTED.add(name)  # its package may keep the settings in another one


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
    scheduled = yield from _declared(rule, "scheduled", str)
    yield from _unknown("scheduled", scheduled, settings.model_fields)
    needed = {"lr", "weight_decay"} & settings.model_fields.keys() - set(scheduled) if hasattr(rule, "scheduled") else ()
    yield from (
        f"scheduled: '{name}' is missing, so no schedule would reach it; allowed: in the tuple" for name in sorted(needed)
    )
    yield from _problems_of_state(rule)


def _problems_of_state(rule: type[Rule]) -> Iterator[str]:
    buffers = yield from _declared(rule, "buffers", Buffer)
    statistics: tuple[Statistic, ...] = ()
    sums: tuple[Sum, ...] = ()
    factors: tuple[Factor, ...] = ()
    if issubclass(rule, MatrixRule):
        statistics = yield from _declared(rule, "statistics", Statistic)
        sums = yield from _declared(rule, "sums", Sum)
        factors = yield from _declared(rule, "factors", Factor)
    averages = yield from _declared(rule, "averages", str)
    items: tuple[Statistic | Sum, ...] = (*statistics, *sums)
    kept: tuple[Buffer | Statistic | Factor, ...] = (*buffers, *statistics, *factors)
    yield from _names_of("state", [found.name for found in kept])
    yield from _names_of("sum", [item.name for item in sums])
    for item in items:
        if item.per not in get_args(Per):
            yield f"'{item.name}': got per={item.per!r}; allowed: {', '.join(map(repr, get_args(Per)))}"
    for factor in factors:
        if factor.of not in get_args(Of):
            yield f"'{factor.name}': got of={factor.of!r}; allowed: {', '.join(map(repr, get_args(Of)))}"
    if sum(buffer.momentum for buffer in buffers) > 1:
        yield "buffers: more than one with momentum=True; allowed: one, or none"
    if issubclass(rule, ElementwiseRule) and any(buffer.of_update for buffer in buffers):
        yield "buffers: got of_update=True in an elementwise rule; allowed: in a matrix rule"
    yield from _unknown("averages", averages, [buffer.name for buffer in buffers])
    if bool(averages) != (rule.averaged is not Rule.averaged):
        yield "averages and averaged: got one of them; allowed: both, or neither"
    if issubclass(rule, MatrixRule):
        yield from _problems_of_sums(rule, statistics, sums)


def _problems_of_sums(rule: type[MatrixRule], statistics: Sequence[Statistic], sums: Sequence[Sum]) -> Iterator[str]:
    if bool(sums) != (rule.summand is not MatrixRule.summand):
        yield "sums and summand: got one of them; allowed: both, or neither"
    beside = [statistic for statistic in statistics if statistic.given != "update"]
    for statistic in beside:
        if statistic.given not in get_args(Given):
            yield f"'{statistic.name}': got given={statistic.given!r}; allowed: {', '.join(map(repr, get_args(Given)))}"
    if beside and not settles(rule):
        yield f"'{beside[0].name}': given to '{beside[0].given}' without settle, which advances it; allowed: both"
    if settles(rule) and not sums:
        yield "settle: got no sums; allowed: with sums"
    if settles(rule) and len({item.per for item in sums} | {item.per for item in beside}) > 1:
        yield "settle: got values per row and per matrix; allowed: one of them"
    if issubclass(rule, MatrixRule) and rule.in_teams != (rule.team_cost is not MatrixRule.team_cost):
        yield "in_teams and team_cost: got one of them; allowed: both, or neither"


def _declared(rule: type[Rule], name: str, kind: type[T]) -> Generator[str, None, tuple[T, ...]]:
    """What a class declares under a name, as far as it can be used."""
    found = getattr(rule, name, None)
    if not isinstance(found, tuple):
        yield f"{name}: {'missing' if found is None else f'got {found!r}'}; allowed: a tuple"
        return ()
    yield from (f"{name}: got {item!r}; allowed: {kind.__name__}" for item in found if not isinstance(item, kind))
    return tuple(item for item in found if isinstance(item, kind))


def _names_of(what: str, names: Sequence[str]) -> Iterator[str]:
    """Names become keys of the state, and of a checkpoint's tensors."""
    for name in dict.fromkeys(names):
        if not str(name).isidentifier():
            yield f"{what} {name!r}: allowed: a name of letters, digits and _"
        elif names.count(name) > 1 or (what == "state" and (name in _RESERVED or name.endswith("_absmax"))):
            yield f"{what} '{name}': a name that is taken; allowed: another one"


def _unknown(what: str, names: Any, known: Any) -> Iterator[str]:
    yield from (f"{what}: got {name!r}; allowed: {', '.join(known) or 'none'}" for name in names if name not in known)
