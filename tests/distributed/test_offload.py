"""CPU offload: the same numbers, bounded workspace, a fused AdamW; and the offloading that is refused before training.

That every rule with float32 state equals one process to 1e-5 under offload, and changes no bit with compact state, is in
test_conformance.py.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import cases
from tests.distributed.conftest import Pools
from tests.distributed.pool import Pool

LOW_PRECISION = {"bf16": {"enabled": True}, "fp16": {"enabled": True, "initial_scale_power": 8}}
WIDE = {"depth": 1, "width": 96}  # matrices of more than 4096 elements: smaller ones keep float32


def assert_offload_changes_nothing(pool: Pool, config: dict[str, Any], **offload: Any) -> None:
    """Without clipping: ZeRO-3 adds up the norm in another precision when it offloads, and clips by a hair more or less."""
    for kept, offloaded in pool.run(cases.train_with_and_without_offload, config, WIDE, **offload):
        assert offloaded["losses"] == kept["losses"]
        for name, parameter in kept["parameters"].items():
            assert torch.equal(offloaded["parameters"][name], parameter), name


@pytest.mark.promise("offload")
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", LOW_PRECISION)
def test_low_precision_is_the_same_bit_for_bit(precision: str, stage: int, pools: Pools) -> None:
    config = cases.engine_config(stage, cases.MUON, **{precision: LOW_PRECISION[precision]})
    assert_offload_changes_nothing(pools[2], config)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_accumulated_gradients_and_sub_groups_are_the_same_bit_for_bit(stage: int, pools: Pools) -> None:
    """DeepSpeed adds up offloaded gradients on the CPU; ZeRO-3 steps each sub-group alone."""
    zero = {"sub_group_size": 2000} if stage == 3 else {}
    config = cases.engine_config(stage, cases.MUON, gradient_accumulation_steps=2, zero_optimization=zero)
    assert_offload_changes_nothing(pools[2], config)


@pytest.mark.promise("offload")
@pytest.mark.parametrize("pin_memory", [True, False])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_pinned_memory_is_the_same_bit_for_bit(stage: int, pin_memory: bool, pools: Pools) -> None:
    """Without an accelerator DeepSpeed accepts the key and pins nothing."""
    config = cases.engine_config(stage, cases.MUON)
    assert_offload_changes_nothing(pools[2], config, pin_memory=pin_memory)


def offloading(stage: int, params: dict[str, Any]) -> dict[str, Any]:
    zero = {"offload_optimizer": {"device": "cpu"}, "sub_group_size": 10**8}
    return cases.engine_config(stage, params, zero_optimization=zero)


@pytest.mark.promise("adamw-fused")
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_adamw_is_one_fused_kernel_a_group(name: str, stage: int, pools: Pools) -> None:
    """And no chain of elementwise passes."""
    (traced,) = pools[1].run(cases.trace_step, offloading(stage, {"name": name, "lr": 1e-3}), WIDE)
    assert traced["operators"].count("_fused_adamw_") == len(traced["slices"])
    passes = {"lerp", "mul", "addcmul", "sqrt", "div", "addcdiv"}
    assert passes.isdisjoint(operator.removeprefix("_foreach_").rstrip("_") for operator in traced["operators"])


class TestWorkspace:
    """What ``step()`` holds beside weights, gradients and state, in bytes."""

    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_adamw_in_float32_needs_none(self, stage: int, pools: Pools) -> None:
        """But for the step counters."""
        (traced,) = pools[1].run(cases.trace_step, offloading(stage, {"name": "adamw", "lr": 1e-3}), WIDE)
        assert traced["peak"] <= 64

    @pytest.mark.parametrize("stage", [2, 3])
    @pytest.mark.parametrize(
        ("name", "state"),
        [("adamw", "8bit"), ("lion", "float32"), ("schedule_free_adamw", "float32")],
    )
    def test_an_elementwise_rule_needs_a_part_of_its_slice(self, name: str, state: str, stage: int, pools: Pools) -> None:
        """Four float32 copies of the 2^18 elements that are updated at a time; the slice holds 12 times as many."""
        config = offloading(stage, {"name": name, "state_dtype": state})
        (traced,) = pools[1].run(cases.trace_step, config, {"depth": 48, "width": 256})
        assert max(traced["slices"]) > 12 * 2**18
        assert traced["peak"] <= 16 * 2**18

    @pytest.mark.parametrize("stage", [2, 3])
    @pytest.mark.parametrize(
        ("name", "state", "part"),
        [("muon", "float32", 4), ("normuon", "8bit", 12)],
    )
    def test_two_buckets_and_one_part(self, name: str, state: str, part: int, stage: int, pools: Pools) -> None:
        """A rank's slices hold 6 buckets, a bucket 8 matrices of 256x256.

        Allowed: two buckets' send and receive buffers, in bfloat16; and of the 2^18 elements that are read and updated at
        a time, float32 copies: their directions, and under 8-bit state what is read and written too. (What orthogonalizing
        one matrix needs is less, and comes at another time.)
        """
        bucket, in_work = 2**19, 2**18
        params = {"name": name, "lr": 0.02, "state_dtype": state, "sharding": {"bucket_numel": bucket}}
        model = {"depth": 96, "width": 256}
        allowed = 2 * 2 * 2 * bucket + part * in_work
        for traced in pools[2].run(cases.trace_step, offloading(stage, params), model, allowed):
            assert max(traced["slices"]) > 5.9 * bucket
            assert traced["peak"] <= allowed


CPU = {"device": "cpu"}
HERE = "zero_optimization.offload_optimizer"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ratio": ({"zero_optimization": {"stage": 3, "offload_optimizer": {**CPU, "ratio": 0.5}}}, f"{HERE}.ratio"),
    "nvme": ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, f"{HERE}.device"),
    "super_offload": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {**CPU, "super_offload": True}}},
        f"{HERE}.super_offload",
    ),
    "zenflow": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": CPU, "zenflow": {"topk_ratio": 0.1}}},
        "zero_optimization.zenflow",
    ),
}


class TestRefused:
    """`initialize` and `check` name these before they build anything: tests/integrations/test_refused_features.py."""

    @pytest.mark.parametrize(
        ("feature", "said"),
        [
            ("ratio", "Hybrid Optimizer Only Supports DeepSpeedCPUAdam"),
            ("nvme", f"async_io|{HERE}.device"),  # the first where libaio is missing
            ("super_offload", "SuperOffload only supports NVIDIA CUDA"),
            ("zenflow", "AdamW"),
        ],
    )
    def test_deepspeed_initialize_trains_nothing_either(self, feature: str, said: str, pools: Pools, tmp_path: Path) -> None:
        """DeepSpeed passes OptForge no configuration, and its own checks, in its own words, come first."""
        sections, _ = REFUSED[feature]
        config = cases.engine_config(2, cases.MUON, **sections)
        zero = config["zero_optimization"]
        zero["offload_optimizer"] = {**zero["offload_optimizer"], "nvme_path": str(tmp_path)}
        ((error, stepped),) = pools[1].run(cases.first_step_under_deepspeed, config)
        assert re.search(said, error)
        assert not stepped

    def test_plain_offload_trains(self, pools: Pools) -> None:
        config = cases.engine_config(3, cases.MUON, zero_optimization={"offload_optimizer": CPU})
        assert pools[1].run(cases.first_step_under_deepspeed, config) == [("", True)]
