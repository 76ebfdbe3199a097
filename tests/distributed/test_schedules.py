"""Schedulers of DeepSpeed and torch on engines: those that keep the groups' ratios train, those that flatten are refused."""

from typing import Any

import pytest

from tests.distributed import schedules
from tests.distributed.conftest import Pools


@pytest.mark.promise("adamw-beside-curve")
@pytest.mark.parametrize("door", ["section", "factory", "object"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rate_for_all_groups_is_refused_on_every_rank_before_any_weight_changes(
    stage: int, door: str, pools: Pools
) -> None:
    """Under ZeRO-1/2 the groups come to ``step()`` one by one; the first call knows them all."""
    for found in pools[2].run(schedules.refused, stage=stage, door=door):
        assert found["error"].startswith("scheduler: the groups are configured with different rates (")
        assert "max_lr=[" in found["error"]
        assert found["unchanged"]


@pytest.mark.promise("adamw-beside-curve")
@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("WarmupCosineLR", {"total_num_steps": 10, "warmup_num_steps": 3}),
        ("WarmupLR", {"warmup_max_lr": "listed", "warmup_num_steps": 3}),
        ("WarmupLR", {"warmup_num_steps": 3}),
        ("WarmupDecayLR", {"warmup_max_lr": "listed", "warmup_num_steps": 3, "total_num_steps": 10}),
    ],
    ids=["WarmupCosineLR", "WarmupLR", "WarmupLR of the groups' rates", "WarmupDecayLR"],
)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeeds_own_schedulers_that_keep_the_ratios_train(
    stage: int, kind: str, params: dict[str, Any], pools: Pools
) -> None:
    seen = pools[1].run(schedules.rates_under, stage=stage, kind=kind, params=params)[0]
    moved = 0
    for rates in seen:
        factors = {rate / schedules.RATES[group.split(".")[0]] for group, rate in rates.items()}
        assert max(factors) == pytest.approx(min(factors))
        moved += max(factors) > 0.5
    assert moved >= 3
