"""bf16 and fp16 engines, and the bf16 defaults of the wire and the products."""

from typing import Any

import pytest

from tests.distributed import cases, skipped
from tests.distributed.conftest import Pools
from tests.distributed.pool import Pool
from tests.distributed.test_parity import assert_same
from tests.oracles import EXACT

LOW_PRECISION = {
    "bf16": {"bf16": {"enabled": True}},
    "bf16, fp32 accumulation": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
}


def losses(pool: Pool, config: dict[str, Any]) -> list[float]:
    run: list[float] = pool.run(cases.train, config)[0]["losses"]
    return run


@pytest.mark.parametrize("precision", LOW_PRECISION)
def test_stages_agree_in_low_precision(precision: str, pools: Pools) -> None:
    """1%: weights are rounded to 8 (bf16) or 11 (fp16) bits after every step, gradients are reduced in that precision."""
    extra = LOW_PRECISION[precision]
    runs = {stage: losses(pools[2], cases.engine_config(stage, cases.MUON, **extra)) for stage in (1, 2, 3)}
    if precision != "bf16, fp32 accumulation":  # DeepSpeed has no such stage 0
        runs[0] = losses(pools[2], cases.engine_config(0, cases.MUON, **extra))
    for stage, run in runs.items():
        assert run[-1] < 0.9 * run[0]
        assert run == pytest.approx(runs[2], rel=0.01), f"stage {stage}"


def test_stage_1_in_bf16_is_the_bf16_optimizer(pools: Pools) -> None:
    config = cases.engine_config(1, cases.MUON, **LOW_PRECISION["bf16, fp32 accumulation"])
    assert pools[2].run(cases.train, config, steps=1)[0]["wrapper"] == "BF16_Optimizer"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16, fp32 accumulation"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_nan_on_one_rank_reaches_no_buffer_on_any(stage: int, precision: str, pools: Pools) -> None:
    """DeepSpeed skips such a step on all ranks."""
    config = cases.engine_config(stage, cases.MUON, **LOW_PRECISION.get(precision, {}))
    assert pools[2].run(cases.nan_on_one_rank, config) == [True, True]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_a_skipped_step_leaves_never_reaches_an_idle_layer(stage: int, pools: Pools) -> None:
    """As in one process that never saw that batch. With offload the infinite gradients are kept, and the layer gets no others.

    (Without offload, ZeRO-3 takes what it has kept for another overflow, and skips steps until the layer has a part again.)
    """
    params = {**cases.MUON, **EXACT}
    zero = {"offload_optimizer": {"device": "cpu"}}
    expected = skipped.in_one_process(params)
    for found in pools[2].run(skipped.infinite_then_idle, cases.engine_config(stage, params, zero_optimization=zero)):
        assert found["skipped"] == 1
        assert_same(found["parameters"], expected)


@pytest.mark.parametrize("stage", [0, 1])
def test_the_rehearsal_of_stage_0_is_no_step(stage: int, pools: Pools) -> None:
    """In bf16 DeepSpeed steps zero gradients when that engine is built; stage 1, with the same wrapper, does not."""
    config = cases.engine_config(stage, cases.MUON, **LOW_PRECISION["bf16" if stage == 0 else "bf16, fp32 accumulation"])
    assert pools[2].run(skipped.counts, config, steps=3) == [{3}, {3}]


@pytest.mark.fp16
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_what_an_overflow_leaves_never_reaches_an_idle_layer(stage: int, offload: str, pools: Pools) -> None:
    """DeepSpeed keeps the gradients of a step that it skips; the next step may bring none for a layer."""
    zero = {"offload_optimizer": {"device": offload}}
    fp16 = {"enabled": True, "initial_scale_power": 24}
    config = cases.engine_config(stage, cases.MUON, fp16=fp16, zero_optimization=zero)
    assert pools[2].run(cases.overflow_then_idle, config) == [True, True]


@pytest.mark.fp16
def test_an_overflow_that_loss_scaling_skips_changes_nothing(pools: Pools) -> None:
    config = cases.engine_config(2, cases.MUON, fp16={"enabled": True, "initial_scale_power": 32})
    for result in pools[2].run(cases.train_past_overflow, config):
        assert result["skipped"] >= 1
        assert result["unchanged"], "a skipped step changed parameters or state"
        assert result["learns"]
