"""The schedules that `init` writes beside those of DeepSpeed and of transformers: the same rates, two steps off at most."""

import math
from typing import Any

import deepspeed
import pytest
import torch

from ds_optforge.config.schedule import schedule_config
from ds_optforge.schedules import learning_rate_factor
from tests.migrate.conftest import Init

STEPS, WARMUP, RATE = 100, 20, 3e-4
# Theirs begin with two steps of rate zero, ours with a twentieth of the rate, in a warm-up of 20 steps.
APART = 2 / WARMUP
LENGTHS = {"total_num_steps": STEPS, "warmup_num_steps": WARMUP, "warmup_type": "linear"}


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)


def rates_of(scheduler: Any, stepped: torch.optim.Optimizer) -> list[float]:
    """The rate of each step."""
    found = []
    for _ in range(STEPS):
        found.append(stepped.param_groups[0]["lr"])
        stepped.step()
        scheduler.step()
    return found


def ours(config: dict[str, Any], rate: float) -> list[float]:
    params = {key: value for key, value in config["scheduler"]["params"].items() if value != "auto"}
    lengths = {"total_num_steps": STEPS} if config["scheduler"]["params"].get("total_num_steps") == "auto" else {}
    if config["scheduler"]["params"].get("warmup_num_steps") == "auto":
        lengths["warmup_num_steps"] = WARMUP
    schedule = schedule_config({**params, **lengths})
    return [rate * learning_rate_factor(step, schedule) for step in range(STEPS)]


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("WarmupCosineLR", {**LENGTHS, "cos_min_ratio": 0.1}),
        ("WarmupCosineLR", LENGTHS),
        ("WarmupDecayLR", {**LENGTHS, "warmup_max_lr": RATE}),
        ("WarmupDecayLR", LENGTHS),
        ("WarmupLR", {"warmup_num_steps": WARMUP, "warmup_type": "linear", "warmup_max_lr": 1e-4}),
        ("WarmupLR", {"warmup_num_steps": WARMUP, "warmup_type": "linear"}),
    ],
)
def test_deepspeeds_schedules(kind: str, params: dict[str, Any], init: Init) -> None:
    """Also the rate that they write over the optimizer's: WarmupDecayLR its own default of 0.001."""
    stepped = optimizer()
    theirs = rates_of(getattr(deepspeed.runtime.lr_schedules, kind)(stepped, **params), stepped)
    given = {"optimizer": {"type": "AdamW", "params": {"lr": RATE}}, "scheduler": {"type": kind, "params": params}}
    config = init({"train_batch_size": 8, **given})
    rate = config["optimizer"]["params"]["lr"]
    assert ours(config, rate) == pytest.approx(theirs, abs=APART * rate + 1e-12)
    assert max(theirs) == pytest.approx(rate, rel=0.02)
    assert config["optimizer"]["params"]["adamw"]["lr"] == rate


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("cosine_with_min_lr", {"min_lr": RATE / 10}),
        ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
        ("warmup_stable_decay", {"num_decay_steps": 30}),
        ("warmup_stable_decay", {"num_decay_steps": 30, "decay_type": "1-sqrt", "min_lr_ratio": 0.05}),
    ],
)
def test_the_trainers_schedules(kind: str, arguments: dict[str, Any], init: Init) -> None:
    """The 1-sqrt cool-down begins with the steepest fall, of a root of one part in thirty, one step earlier or later."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra 'hf')")
    stepped = optimizer()
    theirs = rates_of(transformers.get_scheduler(kind, stepped, WARMUP, STEPS, arguments), stepped)
    content = f"output_dir: x\nlearning_rate: {RATE}\nlr_scheduler_type: {kind}\nlr_scheduler_kwargs: {arguments}\n"
    apart = math.sqrt(1 / 30) if "1-sqrt" in arguments.values() else APART
    assert ours(init.text("args.yaml", content), RATE) == pytest.approx(theirs, abs=apart * RATE)
