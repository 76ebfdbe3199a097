"""Lightning's own Trainer and DeepSpeedStrategy train with OptForge as one process does, and resume."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_optforge
from ds_optforge.checkpoint.convert import convert
from tests import models
from tests.distributed.test_parity import assert_same
from tests.frameworks.environments import launch
from tests.oracles import EXACT

MUON = {**EXACT, "name": "muon", "lr": 0.02, "weight_decay": 0.1, "adamw": {"lr": 3e-3, "eps": 1e-5}}
STEPS, EPOCH = 12, 4


@cache
def plain() -> dict[str, Tensor]:
    """What one process in plain PyTorch trains."""
    model = nn.ModuleDict({"model": models.build()})
    optimizer = ds_optforge.build_optimizer(model, MUON)
    scheduler = ds_optforge.build_scheduler(optimizer, {"name": "cosine", "warmup_num_steps": 2}, total_steps=STEPS)
    for step in range(STEPS):
        model["model"](*models.batch(step % EPOCH)).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def run(stage: int, folder: Path, *snippets: str, **arguments: Any) -> dict[str, Any]:
    """What two ranks found, with these blocks of docs/frameworks/lightning.md."""
    command = f"torchrun --nproc-per-node 2 -m tests.frameworks.lightning_run {stage} found.pt"
    launch("lightning", f"{command} --snippets {' '.join(snippets)} --arguments '{json.dumps(arguments)}'", folder)
    return dict(torch.load(folder / "found.pt"))


@pytest.mark.compatibility("lightning", verdict="exact")
@pytest.mark.parametrize("stage", [1, 3])
def test_the_pages_lines_train_as_one_process_does(stage: int, tmp_path: Path) -> None:
    found = run(stage, tmp_path, "module", "fit")
    assert found["optimizer"] == "OptForge"
    assert found["wrapper"] == ("DeepSpeedZeroOptimizer_Stage3" if stage == 3 else "DeepSpeedZeroOptimizer")
    assert_same(found["parameters"], plain())
    assert found["losses"][-1] < found["losses"][0]


@pytest.mark.compatibility("lightning", stages=(2, 3), verdict="exact")
def test_it_resumes_bit_for_bit_and_from_a_portable_checkpoint_on_another_stage(tmp_path: Path) -> None:
    """From the end of the second of three epochs, whose checkpoint `convert` takes."""
    whole = run(2, tmp_path, "module", "resume")
    assert_same(whole["parameters"], plain())
    checkpoint = tmp_path / "checkpoints" / "epoch=1.ckpt"
    resumed = run(2, tmp_path, "module", "resume", last=str(checkpoint))
    assert resumed["losses"] == whole["losses"][2 * EPOCH :]
    assert all(torch.equal(resumed["parameters"][name], found) for name, found in whole["parameters"].items())
    convert(checkpoint, tmp_path / "portable")
    moved = run(3, tmp_path, "module", "portable")
    assert moved["rates"] == whole["rates"][2 * EPOCH :]
    assert_same(moved["parameters"], plain())
