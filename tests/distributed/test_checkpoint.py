"""Same topology: engine.save_checkpoint and load_checkpoint with nothing special."""

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
    "fp16": {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True, "initial_scale_power": 8}},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_fresh_engine_goes_on_bit_exactly(engine: str, pools: Pools, tmp_path: Path) -> None:
    schedule = {"type": "OptForgeSchedule", "params": {"name": "cosine", "warmup_num_steps": 3, "total_num_steps": 10}}
    config = cases.engine_config(2, cases.MUON, scheduler=schedule, **ENGINES[engine])
    for result in pools[2].run(cases.save_and_load, config, str(tmp_path)):
        uninterrupted, resumed = result["uninterrupted"], result["resumed"]
        assert resumed["losses"] == uninterrupted["losses"]
        for name, parameter in uninterrupted["parameters"].items():
            assert torch.equal(resumed["parameters"][name], parameter), name


RULES: dict[str, dict[str, Any]] = {
    "normuon, 8-bit": {"name": "normuon", "state_dtype": "8bit", "adamw": {"lr": 1e-3}},
    "normuon, bf16": {"name": "normuon", "state_dtype": "bfloat16", "adamw": {"lr": 1e-3}},
    "lion, bf16": {"name": "lion", "state_dtype": "bfloat16"},
    "adamw_8bit": {"name": "adamw_8bit"},
    "schedule_free_adamw, 8-bit": {"name": "schedule_free_adamw", "state_dtype": "8bit"},
}


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("rule", RULES)
def test_every_state_format_goes_on_bit_exactly(rule: str, stage: int, pools: Pools, tmp_path: Path) -> None:
    """torch casts loaded state to float32; OptForge restores what was saved."""
    config = cases.engine_config(stage, RULES[rule])
    wide = {"depth": 1, "width": 96}  # so that some parameters are large enough for 8-bit state
    for result in pools[2].run(cases.save_and_load, config, str(tmp_path), model_options=wide):
        uninterrupted, resumed = result["uninterrupted"], result["resumed"]
        assert resumed["losses"] == uninterrupted["losses"]
        assert resumed["state"] == uninterrupted["state"]
        for name, parameter in uninterrupted["parameters"].items():
            assert torch.equal(resumed["parameters"][name], parameter), name


def test_a_checkpoint_of_other_groups_is_refused_before_anything_changes(pools: Pools, tmp_path: Path) -> None:
    saved, loading = cases.engine_config(2, cases.MUON), cases.engine_config(2, {"name": "adamw"})
    for message, unchanged in pools[2].run(cases.load_into_another, saved, loading, str(tmp_path)):
        assert "matrix.muon" in message
        assert "matrix.adamw" in message
        assert unchanged
