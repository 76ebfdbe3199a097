"""DeepSpeed's MoE layers: experts are partitioned, and orthogonalized, over their own process group."""

from functools import cache
from typing import Any

import pytest

from tests.distributed import cases
from tests.distributed.conftest import Pools
from tests.distributed.pool import Pool
from tests.oracles import EXACT

PARAMS = {"name": "normuon", "lr": 0.02, "weight_decay": 0.1, "adamw": {"lr": 3e-3, "eps": 1e-5}, **EXACT}


def params(name: str) -> dict[str, Any]:
    """Without weight decay, which not all rules have."""
    return PARAMS if name == "normuon" else {"name": name, "lr": 0.02, "adamw": PARAMS["adamw"], **EXACT}


@cache
def reference(pool: Pool, name: str = "normuon") -> list[float]:
    """Stage 0, where every rank holds every expert whole."""
    config = cases.engine_config(0, params(name))
    losses: list[float] = pool.run(cases.train_mixture, config, expert_parallel_size=1)[0]["losses"]
    assert losses[-1] < losses[0]
    return losses


@pytest.mark.compatibility("moe", verdict="exact")
@pytest.mark.parametrize("expert_parallel_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_experts_train_the_same_on_every_stage(stage: int, expert_parallel_size: int, pools: Pools) -> None:
    """1e-5 as in test_parity. (DeepSpeed has no expert parallelism on ZeRO-3.)"""
    config = cases.engine_config(stage, PARAMS)
    for result in pools[2].run(cases.train_mixture, config, expert_parallel_size):
        assert result["losses"] == pytest.approx(reference(pools[2]), rel=1e-5)
        assert f"matrix.normuon.ep_size_{expert_parallel_size}" in result["groups"]


def test_four_ranks_share_the_experts_of_two(pools: Pools) -> None:
    """Expert-parallel size 2 on 4 ranks: each expert lies on two ranks, cut by ZeRO-2."""
    for result in pools[4].run(cases.train_mixture, cases.engine_config(2, PARAMS), 2):
        assert result["losses"] == pytest.approx(reference(pools[2]), rel=1e-5)


@pytest.mark.parametrize("name", ["muon_hyperball", "muown"])
def test_norms_of_rows_and_matrices_of_an_expert(name: str, pools: Pools) -> None:
    for result in pools[4].run(cases.train_mixture, cases.engine_config(2, params(name)), 2):
        assert result["losses"] == pytest.approx(reference(pools[2], name), rel=1e-5)
