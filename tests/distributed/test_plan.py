"""The forecast of ``ds-optforge plan`` against what engines on two ranks compute, send and hold."""

from __future__ import annotations

from typing import Any

import pytest

from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.forecast.forecast import Forecast, forecast_routes
from ds_optforge.forecast.incumbent import incumbent
from ds_optforge.forecast.memory import adamw_memory, own_memory
from ds_optforge.forecast.topology import Topology
from ds_optforge.routing.roles import Route, routes_of
from tests.distributed import planned
from tests.distributed.conftest import Pools
from tests.distributed.pool import Pool

MUON = {"name": "muon", "lr": 0.02, "adamw": {"lr": 0.001}}
BFLOAT16 = 2


def routes(params: dict[str, Any]) -> list[Route]:
    return routes_of(planned.Net(), OptimizerConfig(params))


def predicted(params: dict[str, Any], stage: int) -> Forecast:
    return forecast_routes(routes(params), OptimizerConfig(params).common.sharding, Topology(2, stage))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_computes_and_sends_what_was_predicted(stage: int, pool2: Pool) -> None:
    ranks = predicted(MUON, stage).ranks
    counted = pool2.run(planned.count, stage, {"type": "OptForge", "params": MUON})
    assert [each["flops"] for each in counted] == [rank.flops for rank in ranks]
    sent = [each["sent"]["c10d::alltoall_base_"] for each in counted]
    assert sent == [rank.sent_bytes for rank in ranks]
    assert [each["planned"] for each in counted] == [max(sent)] * 2  # what train.py writes into its summary.json


@pytest.mark.parametrize(("sharding", "steps"), [({"gather_every": 3}, 3), ({}, None)], ids=["every_third", "never"])
def test_a_run_that_gathers_seldom_plans_the_mean_of_its_steps(
    sharding: dict[str, int], steps: int | None, pool2: Pool
) -> None:
    params = MUON | {"sharding": {"mode": "shard_local", **sharding}}
    counted = pool2.run(planned.count, 3, {"type": "OptForge", "params": params})
    whole = max(rank.sent_bytes for rank in predicted(MUON, 3).ranks)
    assert [each["planned"] for each in counted] == [whole / steps if steps else 0] * 2


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("params", [MUON, {"name": "adamw"}], ids=["muon", "adamw"])
def test_a_rank_holds_what_was_predicted(params: dict[str, Any], stage: int, pool2: Pool) -> None:
    """Gradients: before the step, which gets the largest slice of them in float32 too."""
    found = predicted(params, stage)
    memory = own_memory(found, BFLOAT16, exchanges=True)
    largest = 4 * max(rank.largest_slice_numel for rank in found.ranks)
    for each in pool2.run(planned.count, stage, {"type": "OptForge", "params": params}):
        assert each["parameters"] == memory.parameters
        assert each["gradients"] == memory.gradients - largest
        assert each["state"] == memory.state
        if params["name"] == "adamw":
            assert each["state"] == adamw_memory(found, BFLOAT16).state


@pytest.mark.parametrize(
    ("ranks", "bucket"),
    [(2, 5_000), (2, 10**6), (4, 2_000)],
    ids=["several_chunks", "one_chunk", "fewer_parameters_than_ranks_in_a_round"],
)
def test_deepspeeds_muon_gathers_what_was_predicted_on_zero_3(ranks: int, bucket: int, pools: Pools) -> None:
    """Beside it, AdamW's gradients would be scattered rather than all-reduced: as many bytes less as a slice of all has."""
    found = incumbent(routes(MUON), Topology(ranks, 3), BFLOAT16, bucket)
    section = {"type": "Muon", "params": {"lr": 0.02, "momentum": 0.95}}
    zero = {"reduce_scatter": False, "reduce_bucket_size": bucket}
    counted = pools[ranks].run(planned.count, 3, section, timeout_s=300.0, **zero)
    numel = sum(route.numel for route in routes(MUON))
    for each in counted:
        gathers = each["sent"]["c10d::_allgather_base_"] + each["sent"]["c10d::allgather_"]
        assert gathers == found.sent_bytes - BFLOAT16 * numel * (ranks - 1) // ranks
    assert sum(each["flops"] for each in counted) >= found.flops >= max(each["flops"] for each in counted)


def test_deepspeeds_muon_orthogonalizes_whole_what_a_rank_holds_a_part_of_on_zero_2(pool2: Pool) -> None:
    """It does so in the backward pass. The momentum is as large as these parameters; its staged copy is not in the state."""
    found = incumbent(routes(MUON), Topology(2, 2), BFLOAT16)
    counted = pool2.run(planned.count, 2, {"type": "Muon", "params": {"lr": 0.02, "momentum": 0.95}}, timeout_s=300.0)
    without = pool2.run(planned.count, 2, {"type": "OptForge", "params": {"name": "adamw"}})
    others = 8 * sum(route.numel for route in routes(MUON) if not route.matrices) // 2
    assert max(each["momentum"] for each in counted) == (found.state_bytes - others) // 2
    more = [each["flops_of_passes"] - model["flops_of_passes"] for each, model in zip(counted, without, strict=True)]
    assert found.flops == max(more)
