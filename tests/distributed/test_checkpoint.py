"""Same topology: engine.save_checkpoint and load_checkpoint with nothing special. (Every rule: test_conformance.py.)"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import cases
from tests.distributed.conftest import Pools

ENGINES: dict[str, dict[str, Any]] = {
    "stage 0": {"zero_optimization": {"stage": 0}},
    "stage 1": {"zero_optimization": {"stage": 1}},
    "stage 2": {"zero_optimization": {"stage": 2}},
    "stage 3": {"zero_optimization": {"stage": 3}},
    "stage 3, sub-groups": {"zero_optimization": {"stage": 3, "sub_group_size": 2000}},
    "stage 2, offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "BF16_Optimizer": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "bf16, stage 2": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "bf16, stage 3": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
    "fp16": {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True, "initial_scale_power": 8}},
    "fp16, stage 3": {
        "zero_optimization": {"stage": 3},
        "fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2},
    },
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_fresh_engine_goes_on_bit_exactly(engine: str, pools: Pools, tmp_path: Path) -> None:
    schedule = {"type": "OptForgeSchedule", "params": {"name": "cosine", "warmup_num_steps": 3, "total_num_steps": 10}}
    config = cases.engine_config(2, cases.MUON, scheduler=schedule, **ENGINES[engine])
    for result in pools[2].run(cases.save_and_load, config, str(tmp_path)):
        assert_same(result["resumed"], result["uninterrupted"])


def test_new_processes_go_on_bit_exactly(pools: Pools, tmp_path: Path) -> None:
    config = cases.engine_config(3, cases.MUON)
    uninterrupted = [result["uninterrupted"] for result in pools[2].run(cases.save_and_load, config, str(tmp_path))]
    pools[2].close()
    for resumed, expected in zip(pools[2].run(cases.load, config, str(tmp_path)), uninterrupted, strict=True):
        assert_same(resumed, expected)


def assert_same(resumed: dict[str, Any], uninterrupted: dict[str, Any]) -> None:
    assert resumed["losses"] == uninterrupted["losses"]
    assert resumed["state"] == uninterrupted["state"]
    for name, parameter in uninterrupted["parameters"].items():
        assert torch.equal(resumed["parameters"][name], parameter), name


@pytest.mark.quick
def test_a_checkpoint_of_other_groups_is_refused_before_anything_changes(pools: Pools, tmp_path: Path) -> None:
    saved, loading = cases.engine_config(2, cases.MUON), cases.engine_config(2, {"name": "adamw"})
    for message, unchanged in pools[2].run(cases.load_into_another, saved, loading, str(tmp_path)):
        assert "matrix.muon" in message
        assert "matrix.adamw" in message
        assert unchanged
