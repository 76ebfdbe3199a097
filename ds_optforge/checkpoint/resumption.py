"""What a group takes of the state in a checkpoint: its own rule's, or another rule's average of the gradient, or nothing."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ds_optforge.checkpoint.logical import buffer_name
from ds_optforge.rules.around import SCALARS, UPDATE_AVERAGE, WEIGHT_AVERAGE
from ds_optforge.rules.base import Buffer, Rule, buffers_of, statistics_of
from ds_optforge.rules.registry import rule_settings

_BEGINS = {WEIGHT_AVERAGE.name: "which begins with the weights as they are", UPDATE_AVERAGE.name: "from zeros"}


@dataclass(frozen=True, slots=True)
class Resumption:
    """The state with which the tensors of one call of ``step()`` go on.

    Attributes:
        step: steps taken.
        scalars: the rule's own numbers.
        averages: by parameter, the saved buffer with which the rule's averages of the gradient begin, while the rest of the
            state begins as zeros; None takes every buffer, statistic and factor under its own name.
        anew: what is around the rule that begins now: names of buffers that are zeros.
        note: what of the saved state is not taken as it is, for the log; "" if all of it is.
    """

    step: int
    scalars: Mapping[str, float]
    averages: Mapping[str, str] | None = None
    anew: Collection[str] = ()
    note: str = ""

    def key(self, parameter: str, buffer: str, averages: Collection[str]) -> str | None:
        """The logical tensor that fills a buffer, statistic or factor of ``parameter``; None for zeros.

        Args:
            parameter: its name.
            buffer: its name.
            averages: names of the rule's averages of the gradient.
        """
        if buffer in self.anew:
            return None
        if self.averages is None or buffer in SCALARS:
            return buffer_name(parameter, buffer)
        return buffer_name(parameter, self.averages[parameter]) if buffer in averages else None


class Lacking(str):
    """The reason for which state starts afresh: its rule has taken steps, but keeps buffers that are not in the checkpoint."""


def resumption_of(
    names: Sequence[str],
    rule: Rule,
    groups: Mapping[str, Mapping[str, Any]],
    stored: Collection[str],
    around: Sequence[Buffer] = (),
    factors: Sequence[str] = (),
) -> Resumption | str:
    """Decide what ``rule`` takes of the state of parameters.

    Args:
        names: of the parameters that one call of ``step()`` updates.
        rule: theirs in this run.
        groups: by parameter, the saved group that it was in.
        stored: names of all logical tensors.
        around: buffers of what is around the rule. Where not all of them are there they begin now, whatever the rule takes.
        factors: names of those of the rule's factors.

    Returns:
        The state; or, where all of it starts afresh, the reason.
    """
    sources = [groups[name] for name in names if name in groups]
    steps = sorted({source["step"] for source in sources} | ({0} if len(sources) < len(names) else set()))
    if steps == [0]:
        return "no step of it had been taken"
    others = sorted({source["rule"] for source in sources if not _related(source["rule"], rule)})
    keys = [*(buffer.name for buffer in rule.buffers), *(statistic.name for statistic in statistics_of(rule))]
    missing = [buffer_name(name, key) for name in names for key in keys if buffer_name(name, key) not in stored]
    missing += [name for name in factors if name not in stored]
    if len(steps) > 1:
        return f"its parameters had taken {steps} steps"
    numbers, anew, note = _of_around(names, sources, stored, around)
    if not others and not missing:
        own = {key: value for key, value in sources[0]["scalars"].items() if key not in chain.from_iterable(SCALARS.values())}
        return Resumption(steps[0], {**own, **numbers}, None, anew, note)
    averages = dict(_averages(names, groups, stored)) if _begins_with_an_average(rule) else {}
    if len(averages) == len(names):
        notes = filter(None, (_note(averages, rule, groups, keys), note))
        return Resumption(steps[0], numbers, averages, anew, ", ".join(notes))
    if others:  # its buffers may have the names of this rule's, and mean something else
        return f"it was trained by '{others[0]}', whose state is not of this rule's kind"
    return Lacking(f"{len(missing)} buffers are not in the checkpoint, as '{missing[0]}'")


def _of_around(
    names: Sequence[str], sources: Sequence[Mapping[str, Any]], stored: Collection[str], around: Sequence[Buffer]
) -> tuple[dict[str, float], tuple[str, ...], str]:
    """The numbers of what is around the rule, the buffers that begin now, and a note of these and of what is left out."""
    numbers: dict[str, float] = {}
    anew, notes = [], []
    for buffer, keys in SCALARS.items():
        saved = [{key: source["scalars"][key] for key in keys if key in source["scalars"]} for source in sources]
        whole = all(buffer_name(name, buffer) in stored for name in names) and saved.count(saved[0]) == len(saved)
        if buffer in [own.name for own in around]:
            numbers |= saved[0] if whole else {}
            anew += [] if whole else [buffer]
            notes += [] if whole else [f"a new {buffer}, {_BEGINS[buffer]}"]
        elif any(saved):
            notes.append(f"no {buffer}, which the checkpoint has")
    return numbers, tuple(anew), ", ".join(notes)


def averages_of(rule: Rule | type[Rule]) -> list[str]:
    """The names of a rule's moving averages of the gradient."""
    return [buffer.name for buffer in rule.buffers if buffer.gradient_average]


def _begins_with_an_average(rule: Rule) -> bool:
    """Whether such an average alone stands for the rule's own steps. Adam's second moment is missing beside it."""
    by_gradient = buffers_of(rule, of_update=False)
    begun = bool(by_gradient) and all(buffer.gradient_average for buffer in by_gradient)
    return begun and not any(buffer.copies_weight for buffer in rule.buffers)


def _averages(
    names: Sequence[str], groups: Mapping[str, Mapping[str, Any]], stored: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Yield (parameter, its saved average of the gradient) where there is one."""
    for name in names:
        settings = rule_settings(groups[name]["rule"])
        found = averages_of(settings.builds) if settings else []
        if len(found) == 1 and buffer_name(name, found[0]) in stored:
            yield name, found[0]


def _note(averages: Mapping[str, str], rule: Rule, groups: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> str:
    begun = averages_of(rule)
    sources = sorted({f"'{buffer}' of {groups[name]['rule']}" for name, buffer in averages.items()})
    zeros = [key for key in keys if key not in begun]
    return f"{', '.join(begun)} from {' and '.join(sources)}" + (f", {', '.join(zeros)} from zeros" if zeros else "")


def _related(saved: str, rule: Rule) -> bool:
    """Whether the rule of that name is this one, or one derives from the other, so that their buffers mean the same."""
    settings = rule_settings(saved)
    return settings is not None and (issubclass(settings.builds, type(rule)) or isinstance(rule, settings.builds))
