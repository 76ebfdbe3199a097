"""What only shows with real ranks: errors name the thing, come on every rank, and nothing hangs."""

import pytest

from tests.distributed import cases, sharded
from tests.distributed.conftest import Pools
from tests.distributed.pool import RankFailure


def test_ranks_that_disagree_name_the_first_differing_matrix(pools: Pools) -> None:
    with pytest.raises(RankFailure) as failure:
        pools[2].run(cases.disagree, stage=2)
    assert failure.value.types == {0: "LayoutError", 1: "LayoutError"}
    for message in failure.value.messages.values():
        assert "rank 0 has '1.weight 24x32" in message
        assert "rank 1 has '1.weight 32x24" in message


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_scheduler_that_flattens_rates_is_refused_in_the_first_step(stage: int, pools: Pools) -> None:
    with pytest.raises(RankFailure) as failure:
        pools[1].run(cases.flattening_scheduler, stage=stage)
    assert "OptForgeSchedule" in failure.value.messages[0]
    assert "0.02" in failure.value.messages[0]


def test_a_problem_that_one_rank_sees_stops_all_of_them(pools: Pools) -> None:
    with pytest.raises(RankFailure) as failure:
        pools[2].run(cases.change_weight_behind_engine)
    assert failure.value.types == {0: "LayoutError", 1: "LayoutError"}
    assert "blocks.1.weight: ZeRO's slice on rank" in failure.value.messages[0]


def test_a_weight_changed_behind_the_engine_is_named(pools: Pools) -> None:
    with pytest.raises(RankFailure) as failure:
        pools[1].run(cases.change_weight_behind_engine)
    assert failure.value.messages[0].startswith("blocks.1.weight: ZeRO's slice on rank 0 does not hold")


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("fully_shard", r"0.weight: got a DTensor (FSDP2's fully_shard"),
        ("use_orig_params", "weight: got a parameter that FSDP1 has flattened"),
        ("flattened", "_flat_param: got a parameter that FSDP1 has flattened"),
    ],
)
def test_parameters_that_fsdp_holds_are_refused_when_the_optimizer_is_built(kind: str, named: str, pools: Pools) -> None:
    with pytest.raises(RankFailure) as failure:
        pools[2].run(sharded.fsdp, kind=kind)
    assert failure.value.types == {0: "ConfigError", 1: "ConfigError"}
    assert named in failure.value.messages[0]
    assert "zero_optimization.stage 3" in failure.value.messages[0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_parameter_that_is_unfrozen_under_an_engine_is_named(stage: int, pools: Pools) -> None:
    """DeepSpeed fixes its groups when the engine is built, so that nothing would train it."""
    with pytest.raises(RankFailure) as failure:
        pools[2].run(sharded.unfreeze, stage=stage)
    assert failure.value.messages[0].startswith("blocks.0.weight: was frozen when the optimizer was built")
