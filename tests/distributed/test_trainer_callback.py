"""The HF Trainer's own arguments: TrainerOptimizer in its optimizer's place, and OptForgeCallback among its callbacks."""

import re
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

DOCS = Path(__file__).parents[2] / "docs"
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
@pytest.mark.parametrize("place", [*PLACES, "stage 3, from the file"])
def test_with_the_callback_the_trainer_evaluates_averaged_weights_and_goes_on(place: str, pools: Pools, tmp_path: Path) -> None:
    """It evaluates, saves a checkpoint, trains on and evaluates again."""
    params = trainer.SCHEDULE_FREE
    settings = {**SCHEDULE, "learning_rate": 0.01, "adam_epsilon": 1e-5, "max_grad_norm": 0.0}
    for what in ("eval", "save"):
        settings |= {f"{what}_strategy": "steps", f"{what}_steps": SAVED}
    stage = PLACES[place.partition(",")[0]]
    given = config(stage)
    if "file" in place:
        assert stage
        given = {**trainer.config(stage, params), "scheduler": {"type": "OptForgeSchedule", "params": {"name": "none"}}}
    ranks = 2 if stage else 1
    expected = [trainer.average_after(SAVED, ranks), trainer.average_after(STEPS, ranks)]
    optimizer = None if "file" in place else params
    for found in pools[ranks].run(frameworks.train_llama, given, str(tmp_path), settings, optimizer=optimizer, callback={}):
        assert found["evaluated"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("page", ["launching", "quickstart"])
@pytest.mark.parametrize("place", PLACES)
def test_the_pages_lines_train(place: str, page: str, pools: Pools, tmp_path: Path) -> None:
    (snippet,) = re.findall(r"<!-- snippet: trainer -->\n```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    stage = PLACES[place]
    ranks = 2 if stage else 1
    losses, _ = in_plain_pytorch({"name": "muon", "lr": 0.02, "adamw": {"lr": 0.003}}, ranks)
    for found in pools[ranks].run(frameworks.train_llama, config(stage), str(tmp_path), SCHEDULE, snippet=snippet):
        assert found["losses"] == pytest.approx(losses, rel=1e-2)  # products in bfloat16


@pytest.mark.promise("trainer-log")
@pytest.mark.parametrize("place", PLACES)
def test_the_trainers_log_has_the_rate_of_every_group_and_the_records_of_telemetry(
    place: str, pools: Pools, tmp_path: Path
) -> None:
    """Rates are those of the step, before the scheduler goes on. A callback that was there before sees all of it."""
    params = {**MUON, "telemetry": {"every": 3}}
    settings = {**SCHEDULE, "max_steps": 4, "lr_scheduler_type": "linear"}
    stage = PLACES[place]
    for found in pools[2 if stage else 1].run(
        frameworks.train_llama, config(stage), str(tmp_path), settings, optimizer=params, callback={}
    ):
        records = [entry for entry in found["log"] if "loss" in entry]
        for entry, factor in zip(records, [1, 0.75, 0.5, 0.25], strict=True):
            rates = {key: rate for key, rate in entry.items() if key.startswith("learning_rate/")}
            assert rates.keys() == {f"learning_rate/{group['optforge_group']}" for group in found["groups"]}
            assert rates == pytest.approx({key: factor * (0.01 if "muon" in key else 0.003) for key in rates})
        told = [{key for key in entry if key.startswith("optforge/")} for entry in records]
        assert [bool(keys) for keys in told] == [False, False, True, False]
        assert "optforge/scalar.adamw/update_rms" in told[2]
        assert [entry for entry in found["reported"] if "loss" in entry] == [
            {key: value for key, value in entry.items() if key != "step"} for entry in records
        ]


@pytest.mark.promise("trainer-portable")
@pytest.mark.parametrize("stage", [2, 3])
def test_a_portable_checkpoint_of_the_trainers_resumes_on_another_stage(stage: int, pools: Pools, tmp_path: Path) -> None:
    """The Trainer's own resumes on the same ranks; both are written anew where a run comes by again."""
    settings = {**SCHEDULE, "save_strategy": "steps", "save_steps": SAVED}
    arguments = {"optimizer": MUON, "callback": {"portable": True}}
    first = pools[2].run(frameworks.train_llama, config(stage), str(tmp_path), settings, **arguments)
    again = pools[2].run(frameworks.train_llama, config(stage), str(tmp_path), settings, resume=SAVED, **arguments)
    assert_same(again[0]["parameters"], first[0]["parameters"], 0.0)
    for step, losses in ((SAVED, first[0]["losses"][SAVED:]), (STEPS, [])):
        folder = tmp_path / f"checkpoint-{step}" / "optforge"
        (found,) = pools[1].run(frameworks.go_on, {2: 3, 3: 2}[stage], MUON, str(folder), step, STEPS - step)
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        assert_same(found["parameters"], first[0]["parameters"], 1e-5)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no DeepSpeed to write it": (
        {},
        {"optimizer": MUON, "callback": {"portable": True}},
        "portable: got True without DeepSpeed; allowed: False",
    ),
    "two optimizers": (
        trainer.config(2, MUON),
        {"optimizer": MUON, "callback": {}},
        'optimizer: got an "optimizer" section in DeepSpeed\'s file and optimizer_cls_and_kwargs',
    ),
    "Accelerate's replacement": (
        {**config(2, offload_optimizer={"device": "cpu"}), "zero_force_ds_cpu_optimizer": True},
        {"optimizer": MUON},
        "zero_force_ds_cpu_optimizer: got true with offload_optimizer",
    ),
    "auto, which nobody fills": (config(2), {"optimizer": trainer.MUON}, 'optimizer.params.lr: got "auto"'),
    "another optimizer": ({}, {"callback": {}}, "optimizer: got a AdamW; allowed: an OptForge"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused_before_a_step(case: str, pools: Pools, tmp_path: Path) -> None:
    given, arguments, message = REFUSED[case]
    with pytest.raises(RankFailure) as refused:
        pools[2 if given else 1].run(frameworks.train_llama, given, str(tmp_path), SCHEDULE, **arguments)
    assert message in str(refused.value)


def test_a_transformers_that_hands_over_parameter_groups_is_told_the_version() -> None:
    with pytest.raises(ds_optforge.ConfigError, match=r"allowed: transformers>=5\.2"):
        ds_optforge.TrainerOptimizer([{"params": []}], name="muon")
