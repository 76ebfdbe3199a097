"""The HF Trainer's own arguments: TrainerOptimizer in its optimizer's place, and OptForgeCallback among its callbacks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_optforge
from ds_optforge import build_optimizer
from tests.distributed.conftest import Pools
from tests.distributed.pool import RankFailure
from tests.distributed.test_parity import assert_same

frameworks = pytest.importorskip("tests.distributed.frameworks", reason="transformers is not installed (extra 'hf')")
trainer = pytest.importorskip("tests.distributed.test_trainer")

STEPS, SAVED = trainer.STEPS, trainer.SAVED
MUON = {**trainer.MUON, "lr": 0.01, "weight_decay": 0.05}
PLACES = {"stage 2": 2, "stage 3": 3, "plain PyTorch": None}


def config(stage: int | None, **zero: Any) -> dict[str, Any]:
    """A file without an optimizer, or nothing."""
    if stage is None:
        return {}
    given = trainer.config(stage, {})
    del given["optimizer"], given["scheduler"]
    given["zero_optimization"].update(zero)
    return dict(given)


SCHEDULE = {"max_steps": STEPS, "lr_scheduler_type": "constant", "max_grad_norm": 0.5}


def in_plain_pytorch(params: dict[str, Any], ranks: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same run in one process at constant learning rates: losses and weights."""
    model = frameworks.llama(tied=False)
    optimizer = build_optimizer(model, params)
    rows = frameworks.sentences(64)
    losses = []
    for step in range(STEPS):
        batch = torch.stack([row["input_ids"] for row in rows[2 * ranks * step : 2 * ranks * (step + 1)]])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.promise("trainer-argument")
@pytest.mark.parametrize("place", [*PLACES, "stage 2, offload", "stage 3, offload"])
def test_the_trainers_own_argument_trains_as_plain_pytorch_does(place: str, pools: Pools, tmp_path: Path) -> None:
    stage = PLACES[place.partition(",")[0]]
    given = config(stage, **({"offload_optimizer": {"device": "cpu"}} if "offload" in place else {}))
    ranks = 2 if stage else 1
    losses, weights = in_plain_pytorch(MUON, ranks)
    for found in pools[ranks].run(frameworks.train_llama, given, str(tmp_path), SCHEDULE, optimizer=MUON):
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        assert_same(found["parameters"], weights, 1e-5)


@pytest.mark.promise("averaged-evaluation")
@pytest.mark.parametrize("place", PLACES)
def test_with_the_callback_the_trainer_evaluates_averaged_weights_and_goes_on(
    place: str, pools: Pools, tmp_path: Path
) -> None:
    """It evaluates, saves a checkpoint, trains on and evaluates again."""
    params = trainer.SCHEDULE_FREE
    every = {"strategy": "steps", "steps": SAVED}
    settings = {**SCHEDULE, "max_grad_norm": 0.0, **{f"{what}_{key}": value for what in ("eval", "save") for key, value in every.items()}}
    stage = PLACES[place]
    ranks = 2 if stage else 1
    expected = [trainer.average_after(SAVED, ranks), trainer.average_after(STEPS, ranks)]
    runs = pools[ranks].run(frameworks.train_llama, config(stage), str(tmp_path), settings, optimizer=params, callback={})
    for found in runs:
        assert found["evaluated"] == pytest.approx(expected, rel=1e-5)
