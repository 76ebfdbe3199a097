"""Every rule and state format gives the same numbers on every ZeRO stage, with and without CPU offload."""

from typing import Any

import pytest

from tests.distributed import cases
from tests.distributed.conftest import Pools
from tests.distributed.test_parity import Reference, assert_same, one_process
from tests.oracles import EXACT

ADAMW = {"lr": 3e-3, "eps": 1e-5}
RULES: dict[str, dict[str, Any]] = {
    "normuon": {"name": "normuon", "lr": 0.02, "weight_decay": 0.1, "adamw": ADAMW, **EXACT},
    "muon, cautious": {**cases.MUON, "cautious_weight_decay": True, **EXACT},
    "muon, warming up": {**cases.MUON, "momentum_warmup": {"from": 0.5, "steps": 7}, **EXACT},
    "lion": {"name": "lion", "lr": 1e-3, "weight_decay": 0.1},
    "schedule_free_adamw": {"name": "schedule_free_adamw", "lr": 3e-3, "eps": 1e-5, "warmup_steps": 5, "weight_decay": 0.1},
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
}
# The cautious mask jumps: an element whose update is next to zero is decayed on one path and not on the other, which moves
# a matrix of 1600 elements by lr wd / 40, that is 5e-5, each time.
TOLERANCE = {"muon, cautious": 3e-4, "adamw, cautious": 3e-4}
STAGES = [(0, "none"), *((stage, device) for stage in (1, 2, 3) for device in ("none", "cpu"))]


def reference(rule: str) -> Reference:
    return one_process(RULES[rule])


@pytest.mark.promise("world-size", "zero-stages")
@pytest.mark.parametrize(("stage", "offload"), STAGES)
@pytest.mark.parametrize("rule", RULES)
def test_rule_equals_one_process(rule: str, stage: int, offload: str, pools: Pools) -> None:
    zero = {"offload_optimizer": {"device": offload}}
    config = cases.engine_config(stage, RULES[rule], zero_optimization=zero)
    for result in pools[2].run(cases.train, config):
        assert_same(result["parameters"], reference(rule)[1], TOLERANCE.get(rule, 1e-5))


@pytest.mark.promise("world-size")
@pytest.mark.parametrize(("stage", "world"), [(2, 1), (2, 4), (3, 4)])
@pytest.mark.parametrize("rule", RULES)
def test_rule_does_not_depend_on_world_size(rule: str, stage: int, world: int, pools: Pools) -> None:
    for result in pools[world].run(cases.train, cases.engine_config(stage, RULES[rule])):
        assert_same(result["parameters"], reference(rule)[1], TOLERANCE.get(rule, 1e-5))


@pytest.mark.promise("muon-convolutions")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_expert_banks_and_convolutions(stage: int, pools: Pools) -> None:
    """Three matrices of 24x17, and one of 24x72, whatever the cuts."""
    for result in pools[4].run(cases.train, cases.engine_config(stage, RULES["normuon"]), model_options={"shapes": True}):
        assert_same(result["parameters"], one_process(RULES["normuon"], shapes=True)[1])


@pytest.mark.promise("normuon-rows", "world-size")
@pytest.mark.parametrize("stage", [2, 3])
def test_normuon_statistics_do_not_depend_on_world_size(stage: int, pools: Pools) -> None:
    """Rows that a cut goes through, and buckets smaller than a matrix, included."""
    sharding = {"wire_dtype": "float32", "bucket_numel": 700}
    config = cases.engine_config(stage, {**RULES["normuon"], "sharding": sharding})
    for result in pools[4].run(cases.train, config):
        assert_same(result["parameters"], reference("normuon")[1])


@pytest.mark.promise("8bit-loss")
@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
@pytest.mark.parametrize(("stage", "offload"), [(1, "none"), (2, "cpu"), (3, "none"), (3, "cpu")])
@pytest.mark.parametrize("name", ["muon", "normuon", "adamw", "lion", "schedule_free_adamw"])
def test_compact_state_tracks_float32(name: str, stage: int, offload: str, state_dtype: str, pools: Pools) -> None:
    """Losses within 2% of float32 state's: 8 bits hold 2 to 3 digits, and the batch is 8 samples."""
    params: dict[str, Any] = {"name": name, "lr": 1e-3 if "muon" not in name else 0.02}
    if name == "schedule_free_adamw":
        params["betas"] = [0.9, 0.99]  # bfloat16 cannot hold its default, 0.999
    wide = {"depth": 1, "width": 96}  # matrices of more than 4096 elements: smaller ones keep float32
    expected, _ = one_process(params, **wide)
    zero = {"offload_optimizer": {"device": offload}}
    config = cases.engine_config(stage, {**params, "state_dtype": state_dtype}, zero_optimization=zero)
    for result in pools[2].run(cases.train, config, model_options=wide):
        assert result["losses"] == pytest.approx(expected, rel=0.02)
