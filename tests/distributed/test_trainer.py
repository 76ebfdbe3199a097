"""The HF Trainer on a small Llama: register(model) and the JSON, and it trains as plain PyTorch does on one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_optforge import build_optimizer, build_scheduler
from tests.distributed.conftest import Pools
from tests.distributed.test_parity import assert_same
from tests.oracles import EXACT

frameworks = pytest.importorskip("tests.distributed.frameworks", reason="transformers is not installed (extra 'hf')")

STEPS, SAVED = 8, 4
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "warmup_steps": 3,
    "learning_rate": 0.01,
    "weight_decay": 0.05,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-5,
    "max_grad_norm": 0.5,
}
HEADS = [{"match": "q_proj", "heads": 4}, {"match": "[kv]_proj", "heads": 2}]
MUON = {
    **EXACT,
    "name": "muon",
    "lr": "auto",
    "weight_decay": "auto",
    "adamw": {"lr": 3e-3, "betas": [0.8, 0.9], "eps": 1e-5},
    "overrides": HEADS,
}
ADAMW = {"name": "adamw", **dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
FILLED = {"lr": 0.01, "betas": [0.8, 0.9], "eps": 1e-5, "weight_decay": 0.05}  # by the Trainer, from SETTINGS


def config(stage: int, params: dict[str, Any]) -> dict[str, Any]:
    """A file that leaves to the Trainer all that it can fill."""
    top = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    schedule = {"name": "cosine", "warmup_num_steps": "auto", "total_num_steps": "auto"}
    zero = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    return {
        **dict.fromkeys(top, "auto"),
        "zero_optimization": {"stage": stage, **dict.fromkeys(zero, "auto")},
        "optimizer": {"type": "OptForge", "params": params},
        "scheduler": {"type": "OptForgeSchedule", "params": schedule},
    }


def in_plain_pytorch(params: dict[str, Any], tied: bool, ranks: int = 2) -> tuple[list[float], dict[str, Tensor]]:
    """The same run in one process: losses and weights. Nothing in it is "auto"."""
    model = frameworks.llama(tied)
    optimizer = build_optimizer(model, params)
    scheduler = build_scheduler(optimizer, {"name": "cosine", "warmup_num_steps": 3, "total_num_steps": STEPS})
    rows = frameworks.sentences(64)
    losses = []
    for step in range(STEPS):
        batch = torch.stack([row["input_ids"] for row in rows[2 * ranks * step : 2 * ranks * (step + 1)]])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), SETTINGS["max_grad_norm"])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.compatibility("trainer", verdict="exact")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("stage", [2, 3])
def test_it_trains_as_plain_pytorch_does_and_resumes(stage: int, tied: bool, pools: Pools, tmp_path: Path) -> None:
    """q, k and v are cut into heads; learning rate, decay, clipping, warm-up and length come from TrainingArguments."""
    given = config(stage, MUON)
    saving = {**SETTINGS, "save_strategy": "steps", "save_steps": SAVED}
    losses, weights = in_plain_pytorch({**MUON, "lr": 0.01, "weight_decay": 0.05}, tied)
    for found in pools[2].run(frameworks.train_llama, given, str(tmp_path), saving, tied):
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        assert_same(found["parameters"], weights, 1e-5)
    for resumed in pools[2].run(frameworks.train_llama, given, str(tmp_path), SETTINGS, tied, resume=SAVED):
        assert len(resumed["rates"]) == STEPS - SAVED
        assert resumed["losses"][-SAVED:] == found["losses"][-SAVED:]
        assert_same(resumed["parameters"], found["parameters"], 0.0)


def test_every_auto_of_the_optimizer_is_filled(pools: Pools, tmp_path: Path) -> None:
    """lr, betas, eps and weight_decay, none of them at its default."""
    losses, weights = in_plain_pytorch({"name": "adamw", **FILLED}, tied=False)
    for found in pools[2].run(frameworks.train_llama, config(2, ADAMW), str(tmp_path), SETTINGS):
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        assert_same(found["parameters"], weights, 1e-5)
        decays = {group["optforge_group"]: group["weight_decay"] for group in found["groups"]}
        assert decays == {"embedding.adamw": 0.05, "matrix.adamw": 0.05, "scalar.adamw": 0.0, "unembedding.adamw": 0.05}


def test_heads_change_the_run() -> None:
    """Else the runs above would not show that the Trainer keeps them."""
    params = {**MUON, "lr": 0.01, "weight_decay": 0.05}
    with_heads, _ = in_plain_pytorch(params, tied=False)
    without, _ = in_plain_pytorch({**params, "overrides": []}, tied=False)
    assert with_heads[-1] != pytest.approx(without[-1], rel=1e-4)


@pytest.mark.promise("qk-clip-everywhere")
def test_the_trainer_bounds_attention_logits(pools: Pools, tmp_path: Path) -> None:
    """A tau below the logits of new weights, so that every step clips."""
    clipped = {"qk_clip": {"tau": 1e-3}}
    params = {**MUON, "lr": 0.01, "weight_decay": 0.05}
    losses, weights = in_plain_pytorch({**params, **clipped}, tied=False)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert weights[name].norm() < 0.9 * in_plain_pytorch(params, tied=False)[1][name].norm()
    for found in pools[2].run(frameworks.train_llama, config(3, {**MUON, **clipped}), str(tmp_path), SETTINGS):
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        assert_same(found["parameters"], weights, 1e-5)


SCHEDULE_FREE = {"name": "schedule_free_adamw", "lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-5}


def average_after(steps: int, ranks: int = 2) -> float:
    """The loss of plain PyTorch's averaged weights on the Trainer's evaluation set."""
    model = frameworks.llama(tied=False)
    optimizer = build_optimizer(model, SCHEDULE_FREE)
    rows = frameworks.sentences(64)
    for step in range(steps):
        batch = torch.stack([row["input_ids"] for row in rows[2 * ranks * step : 2 * ranks * (step + 1)]])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()
    rows = torch.stack([row["input_ids"] for row in frameworks.sentences(16)])
    return float(model(input_ids=rows, labels=rows).loss.detach())
