"""Every group follows one curve from its own initial rate under Accelerate and the HF Trainer too."""

from pathlib import Path
from typing import Any

import pytest

from ds_optforge.config.schedule import schedule_config
from ds_optforge.schedules import learning_rate_factor
from tests.distributed import cases
from tests.distributed.conftest import Pools

frameworks = pytest.importorskip(
    "tests.distributed.frameworks", reason="accelerate and transformers are not installed (extra 'hf')"
)

STEPS = 10
SCHEDULE: dict[str, Any] = {"name": "cosine", "warmup_num_steps": 3, "total_num_steps": STEPS}
PAIRS = {  # Accelerate steps a scheduler that it does not hand to DeepSpeed once per process
    "both dummies": (False, False),
    "a real scheduler": (False, True),
    "a real optimizer": (True, False),
    "both real": (True, True),
}


def assert_on_the_curve(rates: list[dict[str, float]], matrix: float, beside: float) -> None:
    assert len(rates) == STEPS
    for step, found in enumerate(rates):
        factor = learning_rate_factor(step, schedule_config(SCHEDULE))
        for group, rate in found.items():
            assert rate == pytest.approx(factor * (matrix if "muon" in group else beside)), (step, group)


@pytest.mark.promise("adamw-beside-curve")
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("stage", "ranks"), [(2, 2), (3, 2), (2, 4)])
def test_accelerate(stage: int, ranks: int, pair: str, pools: Pools) -> None:
    scheduler = {"type": "OptForgeSchedule", "params": SCHEDULE}
    config = cases.engine_config(stage, cases.MUON, scheduler=scheduler, train_batch_size=8 * ranks)
    config["train_micro_batch_size_per_gpu"] = 8
    for rates in pools[ranks].run(frameworks.rates_under_accelerate, config, STEPS, PAIRS[pair]):
        assert_on_the_curve(rates, cases.MUON["lr"], cases.MUON["adamw"]["lr"])


@pytest.mark.promise("adamw-beside-curve")
@pytest.mark.parametrize(("stage", "ranks"), [(2, 2), (3, 4)])
def test_hugging_face_trainer(stage: int, ranks: int, pools: Pools, tmp_path: Path) -> None:
    """lr and the lengths are "auto", filled from TrainingArguments."""
    params = {**cases.MUON, "lr": "auto", "weight_decay": "auto"}
    auto = {**SCHEDULE, "warmup_num_steps": "auto", "total_num_steps": "auto"}
    config = cases.engine_config(stage, params, scheduler={"type": "OptForgeSchedule", "params": auto})
    config["train_batch_size"] = config["train_micro_batch_size_per_gpu"] = "auto"
    settings = {"learning_rate": 0.01, "warmup_steps": 3, "max_steps": STEPS, "max_grad_norm": 0.0}
    for result in pools[ranks].run(frameworks.train_llama, config, str(tmp_path), settings):
        assert_on_the_curve(result["rates"], 0.01, cases.MUON["adamw"]["lr"])
