"""Settings of rules, and mixes of rules, that test_conformance does not have: the same numbers on every ZeRO stage."""

from typing import Any

import pytest

from tests.distributed import cases
from tests.distributed.conftest import Pools
from tests.distributed.test_parity import Reference, assert_same, one_process
from tests.oracles import EXACT

ADAMW = {"lr": 3e-3, "eps": 1e-5}
SETTINGS: dict[str, dict[str, Any]] = {
    "muon, cautious": {**cases.MUON, "cautious_weight_decay": True, **EXACT},
    "muon, warming up": {**cases.MUON, "momentum_warmup": {"from": 0.5, "steps": 7}, **EXACT},
    "muon, rows equal before": {
        **cases.MUON,
        **EXACT,
        "normalize": {"by": "rows", "when": "before"},
        "overrides": [{"match": "blocks.*weight", "stored": "in_out"}],
    },
    "muon, columns equal after": {**cases.MUON, **EXACT, "normalize": {"by": "columns", "when": "after"}},
    "schedule-free, warming up": {"name": "schedule_free_adamw", "lr": 3e-3, "eps": 1e-5, "warmup_steps": 5},
    "adamw, cautious": {"name": "adamw", **ADAMW, "weight_decay": 0.1, "cautious_weight_decay": True},
    "a mix by role": {
        "name": "normuon",
        **EXACT,
        "adamw": ADAMW,
        "roles": {"embedding": {"name": "lion", "lr": 1e-3}, "unembedding": {"name": "schedule_free_adamw", "eps": 1e-5}},
    },
    "heads and split": {
        **cases.MUON,
        **EXACT,
        "overrides": [{"match": "blocks.0", "heads": 4}, {"match": "odd.weight", "split": [10, 20, 3]}],
    },
    "parts that are columns": {
        "name": "normuon",
        **EXACT,
        "adamw": ADAMW,
        "overrides": [{"match": "blocks.*weight", "stored": "in_out", "split": [20, 20]}],
    },
}
# The cautious mask jumps: an element whose update is next to zero is decayed on one path and not on the other, which moves
# a matrix of 1600 elements by lr wd / 40, that is 5e-5, each time.
TOLERANCE = {"muon, cautious": 3e-4, "adamw, cautious": 3e-4}
STAGES = [(0, "none"), *((stage, device) for stage in (1, 2, 3) for device in ("none", "cpu"))]


def reference(rule: str) -> Reference:
    return one_process(SETTINGS[rule])


@pytest.mark.promise("world-size", "zero-stages")
@pytest.mark.parametrize(("stage", "offload"), STAGES)
@pytest.mark.parametrize("rule", SETTINGS)
def test_rule_equals_one_process(rule: str, stage: int, offload: str, pools: Pools) -> None:
    zero = {"offload_optimizer": {"device": offload}}
    config = cases.engine_config(stage, SETTINGS[rule], zero_optimization=zero)
    for result in pools[2].run(cases.train, config):
        assert_same(result["parameters"], reference(rule)[1], TOLERANCE.get(rule, 1e-5))


@pytest.mark.promise("world-size")
@pytest.mark.parametrize(("stage", "world"), [(2, 1), (2, 4), (3, 4)])
@pytest.mark.parametrize("rule", SETTINGS)
def test_rule_does_not_depend_on_world_size(rule: str, stage: int, world: int, pools: Pools) -> None:
    for result in pools[world].run(cases.train, cases.engine_config(stage, SETTINGS[rule])):
        assert_same(result["parameters"], reference(rule)[1], TOLERANCE.get(rule, 1e-5))
