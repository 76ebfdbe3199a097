"""Puts the new configuration together, checks it, and says what changed and why."""

import difflib
import json
import re
from typing import Any, NamedTuple

from ds_optforge.config.deepspeed import check
from ds_optforge.errors import ConfigError
from ds_optforge.migrate.mapping import Mapped, optimizer_params
from ds_optforge.migrate.source import AUTO, Purpose, Reason, Source

# With line breaks, which no string in JSON has.
_NUMBERS = re.compile(r"\[\n\s*([\d\s.,eE+-]+?)\n\s*\]")


class Result(NamedTuple):
    """A configuration for OptForge, with what a user has to know about it.

    Attributes:
        config: the whole DeepSpeed configuration.
        reasons: for its values.
        not_carried: a line for each setting of the source that it does not have.
        own_keys: lines to change in the user's own file, as (key, value).
    """

    config: dict[str, Any]
    reasons: tuple[Reason, ...]
    not_carried: tuple[str, ...]
    own_keys: tuple[tuple[str, Any], ...]


def result_of(source: Source, purpose: Purpose, rule: str) -> Result:
    """Return the configuration that continues ``source``, checked as ``ds-optforge check`` does.

    Raises:
        ConfigError: the source has something with which OptForge does not train, or no bridge is known.
    """
    mapped = optimizer_params(source.optimizer, purpose, rule)
    own_keys = list(source.own_keys)
    if source.fills:
        own_keys += _left_to_framework(mapped, source)
    sections: dict[str, Any] = {"optimizer": {"type": "OptForge", "params": mapped.params}}
    schedule = source.schedule
    if schedule is not None and schedule.params is not None:
        sections["scheduler"] = {"type": "OptForgeSchedule", "params": schedule.params}
    kept = {key: value for key, value in source.config.items() if key not in ("optimizer", "scheduler")}
    order = [*source.config, *(key for key in sections if key not in source.config)]
    config = {key: {**kept, **sections}[key] for key in order if key in kept or key in sections}
    try:
        check(config, filled=False)
    except ConfigError as error:
        raise ConfigError(
            f"{source.config_file or source.file}: what it asks for cannot be trained with OptForge:\n{error}"
        ) from None
    return Result(
        config,
        (*mapped.reasons, *(schedule.reasons if schedule else ()), *source.reasons),
        (*source.not_carried, *mapped.not_carried, *(schedule.not_carried if schedule else ())),
        tuple(own_keys),
    )


def _left_to_framework(mapped: Mapped, source: Source) -> list[tuple[str, Any]]:
    """Let the framework fill in what the user's file says, which a number would have to repeat; return the changes of it."""
    changes = []
    for key, (own, given) in source.fills.items():
        value = mapped.params.get(key)
        if value is None or value == AUTO:
            continue
        if value != given:
            changes.append((own, value))
        mapped.params[key] = AUTO
        mapped.explain(key, AUTO, f"the Trainer fills in {own}, {value:g}")
        if mapped.params.get("adamw", {}).get(key) == value:  # inherited
            del mapped.params["adamw"][key]
            mapped.explain(f"adamw.{key}")
    return changes


def text_of(config: dict[str, Any]) -> str:
    """Return a configuration as JSON, with lists of numbers on one line."""
    text = json.dumps(config, indent=2)
    return _NUMBERS.sub(lambda match: "[" + re.sub(r"\s+", " ", match[1]) + "]", text) + "\n"


def difference(source: Source, result: Result, out: str) -> str:
    """Return a unified diff from the user's DeepSpeed configuration to the new one, both in the same layout."""
    before = text_of(source.config) if source.config_file else ""
    name = str(source.config_file or "/dev/null")
    lines = difflib.unified_diff(before.splitlines(), text_of(result.config).splitlines(), name, out, lineterm="")
    return "".join(f"{line}\n" for line in lines)


def explanation(source: Source, result: Result, out: str, purpose: Purpose, said: str) -> str:
    """Return the reasons for all values, what is not carried over, and what else to do, as Markdown.

    Args:
        source: what was read.
        result: what is written.
        out: name of the new file.
        purpose: of the run.
        said: who chose the purpose.
    """
    parts = [f"# {out}, from {source.file}\n\n{source.file} is {source.kind}. Purpose: {purpose} ({said}).\n"]
    lines = [f"- `{reason.path}` is {_shown(reason.value)}: {reason.why}." for reason in result.reasons]
    made = {reason.path.partition(".")[0] for reason in source.reasons}
    kept = ", ".join(f"`{key}`" for key in result.config if key not in ("optimizer", "scheduler", *made))
    if kept:
        lines.append(f"- {kept}: as in {source.config_file or source.file}.")
    parts.append("## Why each value\n\n" + "\n".join(lines) + "\n")
    if result.not_carried:
        parts.append("## Not carried over\n\n" + "\n".join(f"- {line}." for line in result.not_carried) + "\n")
    steps = [step.replace("{out}", out) for step in source.steps]
    if result.own_keys:
        changed = "\n".join(_line(key, value).replace("{out}", out) for key, value in result.own_keys)
        steps.insert(0, f"In {source.file}:\n\n```\n{changed}\n```")
    parts.append("## To do\n\n" + "\n\n".join(steps) + "\n")
    return "\n".join(parts)


def _shown(value: Any) -> str:
    return "left out" if value is None else f"`{json.dumps(value)}`"


def _line(key: str, value: Any) -> str:
    if value is None:
        return f"(remove {key})"
    return f"{key}: {value}" if isinstance(value, str) else f"{key}: {json.dumps(value)}"
