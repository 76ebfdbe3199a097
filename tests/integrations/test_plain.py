"""The door without DeepSpeed: optimizer, schedule and routing table from one configuration."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ds_optforge import ConfigError, build_optimizer, build_scheduler, explain
from tests import models
from tests.oracles import table_rows

PARAMS = {"name": "muon", "lr": 0.02, "adamw": {"lr": 0.001}}
SCHEDULE = {"name": "linear", "warmup_num_steps": 2, "total_num_steps": 10}
WHOLE = {
    "train_batch_size": 8,
    "optimizer": {"type": "OptForge", "params": PARAMS},
    "scheduler": {"type": "OptForgeSchedule", "params": SCHEDULE},
}


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("section", [PARAMS, WHOLE], ids=["params alone", "the whole"])
def test_an_optimizer_from_a_deepspeed_configuration_or_its_params(section: dict[str, Any]) -> None:
    """checklist 25"""
    optimizer = build_optimizer(nn.Linear(4, 4), section)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert rates(optimizer) == [0.02, 0.001]


@pytest.mark.parametrize("section", [SCHEDULE, WHOLE], ids=["params alone", "the whole"])
def test_a_schedule_from_a_deepspeed_configuration_or_its_params(section: dict[str, Any]) -> None:
    """checklist 25"""
    optimizer = build_optimizer(nn.Linear(4, 4), PARAMS)
    schedule = build_scheduler(optimizer, section)
    assert isinstance(schedule, torch.optim.lr_scheduler.LRScheduler)
    assert rates(optimizer) == [0.01, 0.0005]


def test_both_from_one_file(tmp_path: Path) -> None:
    """checklist 25"""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(WHOLE))
    optimizer = build_optimizer(nn.Linear(4, 4), path)
    build_scheduler(optimizer, str(path))
    assert rates(optimizer) == [0.01, 0.0005]


@pytest.mark.parametrize("section", [{"name": "linear"}, {"name": "linear", "total_num_steps": "auto"}])
def test_total_steps_fill_in_what_the_configuration_leaves_open(section: dict[str, Any]) -> None:
    """checklist 29: epochs times the loader's length, which only the caller knows."""
    optimizer = build_optimizer(nn.Linear(4, 4), PARAMS)
    assert build_scheduler(optimizer, section, total_steps=3 * 7).config.total_num_steps == 21


def test_total_steps_do_not_overrule_the_configuration() -> None:
    optimizer = build_optimizer(nn.Linear(4, 4), PARAMS)
    assert build_scheduler(optimizer, SCHEDULE, total_steps=99).config.total_num_steps == 10


def test_a_configuration_without_a_schedule_is_an_error_that_says_so() -> None:
    optimizer = build_optimizer(nn.Linear(4, 4), PARAMS)
    with pytest.raises(ConfigError, match=r"^scheduler: missing; allowed: "):
        build_scheduler(optimizer, {"train_batch_size": 8, "optimizer": WHOLE["optimizer"]})


def test_a_schedule_of_another_type_is_an_error_that_says_so() -> None:
    optimizer = build_optimizer(nn.Linear(4, 4), PARAMS)
    with pytest.raises(ConfigError, match=r"^scheduler\.type: got 'WarmupLR'; allowed: 'OptForgeSchedule'"):
        build_scheduler(optimizer, {**WHOLE, "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1}}})


@pytest.mark.parametrize("config", [{"name": "sgd"}, {"optimizer": {"type": "AdamW"}}], ids=["params", "type"])
def test_a_bad_configuration_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build_optimizer(nn.Linear(4, 4), config)


def test_explain_has_a_line_per_trainable_parameter() -> None:
    lines = table_rows(explain(models.build(frozen=True), WHOLE))
    assert lines["embed.weight"][:3] == ["50x24", "embedding", "adamw"]
    assert lines["up.weight"] == ["40x24", "matrix", "muon", "1 of 40x24", "float32", "0.02", "0"]
    assert lines["norm.bias"] == ["24", "scalar", "adamw", "-", "float32", "0.001", "0"]
    assert "blocks.0.weight" not in lines
    assert "blocks.1.weight" in lines


def test_explain_needs_no_weights() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(50_000, 50_000))
    assert "50000x50000" in explain(model, PARAMS)


def test_explain_refuses_a_bad_configuration() -> None:
    with pytest.raises(ConfigError):
        explain(nn.Linear(4, 4), {"name": "sgd"})
