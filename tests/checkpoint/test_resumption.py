"""What a rule takes of the state that another rule left, parameter by parameter."""

from typing import Any

import pytest

from ds_optforge.checkpoint.resumption import Resumption, averages_of, resumption_of
from ds_optforge.rules.around import WEIGHT_AVERAGE
from ds_optforge.rules.registry import rule_settings

BUFFERS = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "muon": ("momentum_buffer",),
    "muon_squared": ("momentum_buffer", "second_moment_root"),
    "adamuon": ("momentum_buffer", "second_moment"),
    "normuon": ("momentum_buffer", "row_second_moment"),
    "sgd": ("momentum_buffer",),
    "schedule_free_adamw": ("exp_avg_sq", "z"),
}
AVERAGE = {
    **dict.fromkeys(("adamw", "lion"), "exp_avg"),
    **dict.fromkeys(("muon", "muon_squared", "adamuon", "normuon"), "momentum_buffer"),
}
# adamw and muon_squared lack a second moment, and the others keep no moving average of the gradient
BEGINS = ("lion", "muon", "adamuon", "normuon")


def rule_called(name: str) -> Any:
    settings = rule_settings(name)
    assert settings is not None
    return settings().build()


def taken(saved: dict[str, tuple[str, int]], rule: str) -> Resumption | str:
    """What ``rule`` takes of parameters that were saved by (rule, steps)."""
    groups = {name: {"rule": by, "step": step, "scalars": {}} for name, (by, step) in saved.items()}
    stored = {f"optimizer/{name}/{buffer}" for name, (by, step) in saved.items() if step for buffer in BUFFERS[by]}
    return resumption_of(list(saved), rule_called(rule), groups, stored)


@pytest.mark.parametrize("rule", BUFFERS)
@pytest.mark.parametrize("saved", BUFFERS)
def test_every_pair_of_rules(saved: str, rule: str) -> None:
    found = taken({"a": (saved, 5)}, rule)
    keys = averages_of(rule_called(rule))
    if saved == rule or (saved in ("muon_squared", "adamuon", "normuon") and rule == "muon"):
        assert found == Resumption(5, {})
        assert [found.key("a", buffer, keys) for buffer in BUFFERS[rule]] == [f"optimizer/a/{b}" for b in BUFFERS[rule]]
    elif saved in AVERAGE and rule in BEGINS:
        assert isinstance(found, Resumption)
        assert found.step == 5
        sources = [f"optimizer/a/{AVERAGE[saved]}", None]
        assert [found.key("a", buffer, keys) for buffer in BUFFERS[rule]] == sources[: len(BUFFERS[rule])]
    elif (saved, rule) == ("muon", "muon_squared"):
        assert found == "1 buffers are not in the checkpoint, as 'optimizer/a/second_moment_root'"
    else:
        assert found == f"it was trained by '{saved}', whose state is not of this rule's kind"


def test_a_group_may_come_of_two_rules() -> None:
    found = taken({"a": ("adamw", 5), "b": ("muon", 5)}, "normuon")
    assert isinstance(found, Resumption)
    assert found.averages == {"a": "exp_avg", "b": "momentum_buffer"}
    assert found.note == ("momentum_buffer from 'exp_avg' of adamw and 'momentum_buffer' of muon, row_second_moment from zeros")


def test_different_steps_and_none_start_afresh() -> None:
    assert taken({"a": ("adamw", 5), "b": ("adamw", 6)}, "adamw") == "its parameters had taken [5, 6] steps"
    assert taken({"a": ("adamw", 0)}, "muon") == "no step of it had been taken"


def test_an_average_of_the_weights_is_taken_whatever_the_rule_was() -> None:
    """It is of the weights, not of the rule; one that is not whole begins anew, with its count."""
    groups = {name: {"rule": "adamw", "step": 5, "scalars": {"weights_averaged": 3.0}} for name in ("a", "b")}
    stored = {f"optimizer/{name}/{buffer}" for name in groups for buffer in ("exp_avg", "exp_avg_sq", "weight_average")}
    found = resumption_of(["a", "b"], rule_called("muon"), groups, stored, (WEIGHT_AVERAGE,))
    assert isinstance(found, Resumption)
    assert (found.scalars, found.anew) == ({"weights_averaged": 3.0}, ())
    assert found.key("a", "weight_average", ["momentum_buffer"]) == "optimizer/a/weight_average"
    found = resumption_of(["a", "b"], rule_called("muon"), groups, stored - {"optimizer/b/weight_average"}, (WEIGHT_AVERAGE,))
    assert isinstance(found, Resumption)
    assert (found.scalars, found.anew) == ({}, ("weight_average",))
    assert found.key("a", "weight_average", ["momentum_buffer"]) is None
    assert found.note.endswith("a new weight_average, which begins with the weights as they are")
