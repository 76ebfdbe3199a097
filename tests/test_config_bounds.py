"""The numbers that each field takes: the last one that it accepts, and the first one that it refuses.

An interval is written as in a textbook: a square bracket belongs to it, a round one does not.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.config.schedule import ScheduleConfig
from ds_optforge.config.sections import CommonSettings, Override, QKClipSettings, ShardingSettings, TelemetrySettings
from ds_optforge.errors import ConfigError
from ds_optforge.rules import rule_names, rule_settings
from ds_optforge.rules.around import AverageSettings, EmaNesterovSettings
from ds_optforge.rules.muon import MomentumWarmup, OrthogonalizationSettings
from ds_optforge.validation import validate

# Of every rule that has a field of that name.
OF_RULES = {
    "lr": "[0, 10]",
    "weight_decay": "[0, inf)",
    "momentum": "[0, 1)",
    "betas": "[0, 1) [0, 1)",
    "beta2": "[0, 1)",
    "eps": "(0, inf)",
    "dampening": "[0, 1)",
    "warmup_steps": "[0, inf) whole",
    "every": "[1, inf) whole",
    "schedule_free_adamw.betas": "(0, 1) [0, 1)",
}
# A section, what else it needs, and its fields.
OF_SECTIONS: list[tuple[type[BaseModel], dict[str, Any], dict[str, str]]] = [
    (OrthogonalizationSettings, {"scale": "match_rms_adamw"}, {"steps": "[1, 100] whole", "rms": "(0, inf)"}),
    (MomentumWarmup, {}, {"from": "[0, 1)", "steps": "[1, inf) whole"}),
    (AverageSettings, {"kind": "ema"}, {"decay": "[0, 1)", "start": "[1, inf) whole"}),
    (EmaNesterovSettings, {}, {"decay": "[0, 1)", "scale": "[0, 1)", "start": "[0, inf) whole"}),
    (EmaNesterovSettings, {"start": 0}, {"stop": "[1, inf) whole"}),
    (ShardingSettings, {}, {"rows": "(0, 1]", "bucket_numel": "[1, inf) whole"}),
    (ShardingSettings, {"mode": "shard_local"}, {"gather_every": "[2, inf) whole"}),
    (TelemetrySettings, {}, {"every": "[1, inf) whole"}),
    (QKClipSettings, {}, {"tau": "(0, inf)", "every": "[1, inf) whole"}),
    (CommonSettings, {"name": "muon"}, {"max_aspect_ratio": "[1, inf)"}),
    (
        ScheduleConfig,
        {"total_num_steps": 100},
        {
            "warmup_num_steps": "[0, 100] whole",
            "warmup_ratio": "[0, 1]",
            "final_lr_fraction": "[0, 1]",
            "cooldown_num_steps": "[0, 100] whole",
            "cooldown_ratio": "[0, 1]",
            "exponent": "(0, inf)",
        },
    ),
    (ScheduleConfig, {}, {"total_num_steps": "[1, inf) whole"}),
]


def cases() -> Iterator[tuple[type[BaseModel], dict[str, Any], str, str]]:
    for name in rule_names():
        settings = rule_settings(name)
        for field in settings.model_fields:
            if field in OF_RULES and settings.__module__.startswith("ds_optforge."):
                yield settings, {}, field, OF_RULES.get(f"{name}.{field}", OF_RULES[field])
    for section, others, fields in OF_SECTIONS:
        for field, interval in fields.items():
            yield section, others, field, interval


def ends(interval: str) -> Iterator[tuple[float, bool]]:
    """The numbers at and just inside or outside both ends, and whether each belongs to it."""
    whole = interval.endswith("whole")
    low, high = interval.removesuffix(" whole").split(", ")
    for end, away in ((low[1:], -math.inf), (high[:-1], math.inf)):
        if end == "inf":
            yield 2**40 if whole else 9.0, True
            continue
        closed = low[0] == "[" if away < 0 else high[-1] == "]"
        number = int(end) if whole else float(end)
        yield number, closed
        towards = away if closed else -away
        yield number + (1 if towards > 0 else -1) if whole else math.nextafter(number, towards), not closed


def accepts(section: type[BaseModel], content: dict[str, Any]) -> bool:
    try:
        validate(section, content, "here")
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize(
    ("section", "others", "field", "interval"),
    [pytest.param(*case, id=f"{case[0].__name__}.{case[2]} {case[3]}") for case in cases()],
)
def test_the_numbers_that_a_field_takes(section: type[BaseModel], others: dict[str, Any], field: str, interval: str) -> None:
    if field == "betas":
        first, second = (ends(f"{each[0]}0, 1)") for each in (interval, interval[-6:]))
        found = [([number, 0.5], inside) for number, inside in first] + [([0.5, number], inside) for number, inside in second]
    else:
        found = list(ends(interval))  # type: ignore[arg-type]
    assert [(number, accepts(section, others | {field: number})) for number, _ in found] == found


def test_no_field_with_a_bound_is_missing_above() -> None:
    listed = {(section, field) for section, _, field, _ in cases()}
    known = [rule_settings(name) for name in rule_names() if rule_settings(name).__module__.startswith("ds_optforge.")]
    for section in {*known, *(section for section, _, _ in OF_SECTIONS)}:
        for name, field in section.model_fields.items():
            text = f"{field.annotation} {field.metadata}"
            if any(bound in text for bound in ("ge=", "gt=", "le=", "lt=")):
                assert (section, field.alias or name) in listed, f"{section.__name__}.{name}"


def test_no_infinite_rate_decay_or_size() -> None:
    for field in ("lr", "weight_decay", "eps"):
        assert not accepts(rule_settings("adamw"), {field: math.inf})


def test_a_short_file_cannot_ask_for_the_memory_of_any_number_of_steps() -> None:
    """The coefficients of all steps are in memory: of 10**12, they would be 8 TB."""
    with pytest.raises(ConfigError, match=r"steps: got 1000000000000 \(int\); allowed: less than or equal to 100$"):
        OptimizerConfig({"name": "muon", "orthogonalization": {"steps": 10**12}})


@pytest.mark.parametrize("field", ["split", "heads"])
def test_counts_of_an_override_are_at_least_1(field: str) -> None:
    taken = {number: accepts(Override, {"match": "a", field: [4, number]}) for number in (0, 1, 2)}
    assert taken == {0: False, 1: True, 2: True}
