"""Every group follows one curve from its own initial rate under Accelerate and the HF Trainer too (checklist 10)."""

from pathlib import Path
from typing import Any

import pytest

from ds_optforge.config import schedule_config
from ds_optforge.schedules import learning_rate_factor
from tests.distributed import cases
from tests.distributed.conftest import Pools

STEPS = 10
SCHEDULE: dict[str, Any] = {"name": "cosine", "warmup_num_steps": 3, "total_num_steps": STEPS}


def assert_on_the_curve(rates: list[dict[str, float]], matrix: float, beside: float) -> None:
    assert len(rates) == STEPS
    for step, found in enumerate(rates):
        factor = learning_rate_factor(step, schedule_config(SCHEDULE))
        for group, rate in found.items():
            assert rate == pytest.approx(factor * (matrix if "muon" in group else beside)), (step, group)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate(stage: int, ranks: int, pools: Pools) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed (extra 'accelerate')")
    scheduler = {"type": "OptForgeSchedule", "params": SCHEDULE}
    config = cases.engine_config(stage, cases.MUON, scheduler=scheduler, train_batch_size=8 * ranks)
    config["train_micro_batch_size_per_gpu"] = 8
    for rates in pools[ranks].run(cases.rates_under_accelerate, config, STEPS):
        assert_on_the_curve(rates, cases.MUON["lr"], cases.MUON["adamw"]["lr"])


@pytest.mark.parametrize("stage", [2, 3])
def test_hugging_face_trainer(stage: int, pools: Pools, tmp_path: Path) -> None:
    """lr and the lengths are "auto", filled from TrainingArguments."""
    pytest.importorskip("transformers", reason="transformers is not installed (extra 'hf')")
    params = {**cases.MUON, "lr": "auto", "weight_decay": "auto"}
    auto = {**SCHEDULE, "warmup_num_steps": "auto", "total_num_steps": "auto"}
    config = cases.engine_config(stage, params, scheduler={"type": "OptForgeSchedule", "params": auto})
    config["train_batch_size"] = config["train_micro_batch_size_per_gpu"] = "auto"
    for rates in pools[2].run(cases.rates_under_trainer, config, STEPS, str(tmp_path)):
        assert_on_the_curve(rates, 0.01, cases.MUON["adamw"]["lr"])
