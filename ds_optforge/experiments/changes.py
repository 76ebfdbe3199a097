"""Changes to a DeepSpeed configuration by dotted path, and the values of a configuration that comparisons and sweeps read."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ds_optforge.config.deepspeed import check
from ds_optforge.config.schedule import schedule_config
from ds_optforge.errors import ConfigError, did_you_mean
from ds_optforge.schedules import OptForgeSchedule

STEADY_WARMUPS, STEADY_STEPS = 3, 200  # steady state begins after three warm-ups, and after 200 steps
Differences = list[tuple[str, Any, Any]]


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``config`` with each value of ``changes`` at its dotted path.

    The last name of a path may be new; the sections before it must exist, because nothing would read a misspelt path.

    Raises:
        ConfigError: a section on a path does not exist.
    """
    result: dict[str, Any] = copy.deepcopy(dict(config))
    for path, value in changes.items():
        section = result
        *parents, last = path.split(".")
        for depth, name in enumerate(parents):
            inner = section.get(name)
            if not isinstance(inner, dict):
                raise ConfigError(f"{path}: {_no_section('.'.join(parents[: depth + 1]), name, section)}")
            section = inner
        section[last] = copy.deepcopy(value)
    return result


def _no_section(path: str, name: str, owner: Mapping[str, Any]) -> str:
    sections = [key for key, value in owner.items() if isinstance(value, Mapping)]
    meant = did_you_mean(name, sections, 0.6)
    return f"the configuration has no section '{path}'; {meant}allowed: {', '.join(sections) or 'none here'}"


def prepared(config: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Set the length of the schedule to ``steps`` and check the sections that OptForge reads.

    Raises:
        ConfigError: a section is invalid.
    """
    match config:
        case {"scheduler": {"params": {"total_num_steps": _}}}:
            config = changed(config, {"scheduler.params.total_num_steps": steps})
    match config:
        case {"optimizer": {"type": "OptForge"}}:
            check(config)
    return dict(config)


def warmup_steps(config: Mapping[str, Any]) -> int:
    """Number of warm-up steps: those of the schedule or those of the rule itself, whichever are more."""
    own = schedule = 0
    match config:
        case {"optimizer": {"params": {"warmup_steps": int(own)}}}:
            pass
    match config:
        case {"scheduler": {"type": OptForgeSchedule.__name__, "params": dict(params)}}:
            schedule = schedule_config(params).warmup
        case {"scheduler": {"params": {"warmup_num_steps": int(schedule)}}}:
            pass
    return max(own, schedule)


def steady_start(config: Mapping[str, Any]) -> int:
    """The step after which the loss is that of the steady state: max(3 x warm-up, 200)."""
    return max(STEADY_WARMUPS * warmup_steps(config), STEADY_STEPS)


def differences(one: Any, other: Any, path: str = "") -> Differences:
    """List (dotted path, value in one, value in the other) wherever two configurations differ; None for a missing value."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = list(dict.fromkeys([*one, *other]))
        found = (differences(one.get(key), other.get(key), f"{path}.{key}".removeprefix(".")) for key in keys)
        return [difference for inner in found for difference in inner]
    return [] if one == other else [(path, one, other)]


def described(changes: Mapping[str, Any]) -> str:
    """Changes as text for people, each path without the sections that all have."""
    return ", ".join(f"{_short(path.split('.'))} = {_value(value)}" for path, value in changes.items())


def _short(names: Sequence[str]) -> str:
    return ".".join(name for name in names if name not in ("optimizer", "scheduler", "params", "roles"))


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
