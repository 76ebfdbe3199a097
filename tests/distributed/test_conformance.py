"""`ds_optforge.testing` on every registered rule: a new one is tested by being registered."""

from typing import Any

import pytest

from ds_optforge.rules import rule_names
from ds_optforge.testing import CHECKS, run_check
from ds_optforge.testing.suite import IN_ONE_PROCESS
from tests.distributed.conftest import Pools

NEEDS_NO_ENGINE = {check.__name__ for check in IN_ONE_PROCESS}


@pytest.mark.promise("zero-stages", "8bit-loss", "any-rule")
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("rule", rule_names())
def test_conformance(rule: str, check: str, pools: Pools) -> None:
    pools[1 if check in NEEDS_NO_ENGINE else 2].run(run_check, check, rule, timeout_s=300.0)


@pytest.mark.promise("world-size")
@pytest.mark.parametrize(("check", "ranks"), [("parity", 4), ("small_buckets", 4), ("small_buckets", 1)])
@pytest.mark.parametrize("rule", rule_names())
def test_conformance_of_other_numbers_of_ranks(rule: str, check: str, ranks: int, pools: Pools) -> None:
    pools[ranks].run(run_check, check, rule, timeout_s=300.0)


@pytest.mark.promise("average-any-rule", "ema-nesterov")
@pytest.mark.parametrize(
    ("rule", "around"),
    [
        ("lion", {"average": {"kind": "ema", "decay": 0.8}}),
        ("normuon", {"average": {"kind": "tail", "start": 2}}),
        ("lion", {"ema_nesterov": {"start": 0}}),
        ("normuon", {"ema_nesterov": {"start": 0}}),
    ],
    ids=["lion, ema", "normuon, tail", "lion, ema_nesterov", "normuon, ema_nesterov"],
)
def test_conformance_with_what_is_around_a_rule(rule: str, around: dict[str, Any], pools: Pools) -> None:
    """On every stage, with and without offload. No rule knows of it: one of each kind stands for all."""
    pools[2].run(run_check, "averages", rule, around, timeout_s=300.0)
