"""The door without DeepSpeed: optimizer, schedule and routing table from one configuration."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ds_optforge import ConfigError, MuonWithAuxAdam, OptForge, build_optimizer, build_scheduler, evaluation_weights, explain
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


@pytest.mark.promise("one-config")
@pytest.mark.parametrize("section", [PARAMS, WHOLE], ids=["params alone", "the whole"])
def test_an_optimizer_from_a_deepspeed_configuration_or_its_params(section: dict[str, Any]) -> None:
    optimizer = build_optimizer(nn.Linear(4, 4), section)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert rates(optimizer) == [0.02, 0.001]


@pytest.mark.promise("one-config")
@pytest.mark.parametrize("section", [SCHEDULE, WHOLE], ids=["params alone", "the whole"])
def test_a_schedule_from_a_deepspeed_configuration_or_its_params(section: dict[str, Any]) -> None:
    optimizer = build_optimizer(nn.Linear(4, 4), PARAMS)
    schedule = build_scheduler(optimizer, section)
    assert isinstance(schedule, torch.optim.lr_scheduler.LRScheduler)
    assert rates(optimizer) == [0.01, 0.0005]


@pytest.mark.promise("one-config")
def test_both_from_one_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(WHOLE))
    optimizer = build_optimizer(nn.Linear(4, 4), path)
    build_scheduler(optimizer, str(path))
    assert rates(optimizer) == [0.01, 0.0005]


@pytest.mark.promise("schedule-epochs")
@pytest.mark.parametrize("section", [{"name": "linear"}, {"name": "linear", "total_num_steps": "auto"}])
def test_total_steps_fill_in_what_the_configuration_leaves_open(section: dict[str, Any]) -> None:
    """Epochs times the loader's length, which only the caller knows."""
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


@pytest.mark.parametrize("config", [{"name": "adagrad"}, {"optimizer": {"type": "AdamW"}}], ids=["params", "type"])
def test_a_bad_configuration_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build_optimizer(nn.Linear(4, 4), config)


def test_explain_has_a_line_per_trainable_parameter() -> None:
    lines = table_rows(explain(models.build(frozen=True), WHOLE, full=True))
    assert lines["embed.weight"][:3] == ["50x24", "embedding", "adamw"]
    assert lines["up.weight"] == ["40x24", "matrix", "muon", "1 of 40x24", "float32", "0.02", "0", "1.29", "hidden linear map"]
    assert lines["norm.bias"] == ["24", "scalar", "adamw", "-", "float32", "0.001", "0", "-", "norm"]
    assert "blocks.0.weight" not in lines
    assert "blocks.1.weight" in lines


def test_explain_needs_no_weights() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(50_000, 50_000))
    assert "50000x50000" in explain(model, PARAMS)


def test_explain_refuses_a_bad_configuration() -> None:
    with pytest.raises(ConfigError):
        explain(nn.Linear(4, 4), {"name": "adagrad"})


def test_parameters_in_place_of_the_model_say_why_it_is_needed() -> None:
    message = r"^model: got a generator; allowed: a torch\.nn\.Module, because names and places in it decide"
    with pytest.raises(ConfigError, match=message):
        build_optimizer(nn.Linear(4, 4).parameters(), PARAMS)  # type: ignore[arg-type]


def test_parameters_in_place_of_groups_say_what_is_allowed() -> None:
    message = r"^param_groups\[0\]: got a Parameter; allowed: a dict with 'params' and 'use_muon' \(build_optimizer"
    with pytest.raises(ConfigError, match=message):
        MuonWithAuxAdam(nn.Linear(4, 4).parameters())  # type: ignore[arg-type]


def test_parameters_that_no_one_registered_name_both_ways_out() -> None:
    with pytest.raises(
        ConfigError, match=r"call ds_optforge\.register\(model\).*ds_optforge\.build_optimizer\(model, config\)"
    ):
        OptForge(nn.Linear(4, 4).parameters(), **PARAMS)


FRESH_PROCESS = """
import sys, torch, ds_optforge
doors = {
    "build_optimizer": lambda model: ds_optforge.build_optimizer(model, {"name": "muon"}),
    "MuonWithAuxAdam": lambda model: ds_optforge.MuonWithAuxAdam([{"params": [model.weight], "use_muon": True}]),
}
make = doors[sys.argv[1]]
make(torch.nn.Linear(4, 4))
assert "deepspeed" not in sys.modules
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.zero import utils
assert ds_optforge.OptForge not in utils.ZERO_SUPPORTED_OPTIMIZERS
make(torch.nn.Linear(4, 4))
assert ds_optforge.OptForge in utils.ZERO_SUPPORTED_OPTIMIZERS
assert "OptForgeSchedule" in lr_schedules.VALID_LR_SCHEDULES
"""


@pytest.mark.promise("client-optimizer")
@pytest.mark.parametrize("door", ["build_optimizer", "MuonWithAuxAdam"])
def test_objects_are_known_to_deepspeed_where_it_takes_part(door: str) -> None:
    """Elsewhere plain PyTorch does not wait for its import, which takes seconds."""
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, door], check=True, timeout=120)


@pytest.mark.promise("averaged-round-trip")
def test_averaged_weights_in_plain_pytorch() -> None:
    """As with an engine, given the optimizer; a framework's own optimizer.eval() inside changes nothing."""
    model = models.build()
    optimizer = build_optimizer(model, {"name": "schedule_free_adamw", "lr": 0.01})
    for step in range(3):
        model(*models.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with evaluation_weights(optimizer):
        optimizer.eval()
        assert not torch.equal(model.up.weight, before[1])
    assert all(torch.equal(parameter, weight) for parameter, weight in zip(model.parameters(), before, strict=True))
    optimizer.state_dict()  # refused on averaged weights
