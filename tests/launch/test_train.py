"""train.py under each launcher, with each of the shipped DeepSpeed configs, and what it does with bad input."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ds_optforge.checkpoint.export import export
from tests.distributed.checkpoints import logical_tensors
from tests.launch.commands import DEEPSPEED, STEPS, TORCHRUN, Launches, Process, Run, on_this_machine
from workload import build_model, load_corpus

COMMANDS = {  # tests/distributed/test_presets.py trains with every config
    "muon_zero1": "python train.py --ds_config ds_configs/muon_zero1.json",
    "muon_zero2": DEEPSPEED,
    "muon_zero3": TORCHRUN,
    "adamw_zero2": DEEPSPEED.replace("muon", "adamw"),
}
RANKS = {"muon_zero1": 1, "muon_zero2": 2, "muon_zero3": 2, "adamw_zero2": 2}


@pytest.fixture(scope="module")
def runs(launched: Launches) -> dict[str, Run]:
    return {config: launched(command) for config, command in COMMANDS.items()}


@pytest.mark.promise("deepspeed-launcher")
@pytest.mark.parametrize("config", COMMANDS)
def test_a_run_ends_cleanly(runs: dict[str, Run], config: str):
    process = runs[config].process
    assert process.returncode == 0, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    assert "destroy_process_group" not in process.stderr  # torch's complaint about a group that was left open


@pytest.mark.parametrize("config", COMMANDS)
def test_metrics_have_a_row_for_each_step(runs: dict[str, Run], config: str):
    metrics = runs[config].metrics
    assert [row["step"] for row in metrics] == [1, 2, 3]
    for row in metrics:
        assert set(row) == {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gb"}
        assert 1 < row["loss"] < 7
        assert row["grad_norm"] > 0
        assert row["tokens_per_second"] > 0
        assert 0.1 < row["peak_memory_gb"] < 10


@pytest.mark.promise("adamw-beside-curve")
def test_each_role_has_its_own_learning_rate_and_all_fall_to_zero_together(runs: dict[str, Run]):
    first, second, third = (row["learning_rate"] for row in runs["muon_zero3"].metrics)
    params = runs["muon_zero3"].summary["config"]["optimizer"]["params"]
    adamw_groups = ("embedding.adamw", "unembedding.adamw", "scalar.adamw")
    assert first == pytest.approx({"matrix.muon": params["lr"]} | dict.fromkeys(adamw_groups, params["adamw"]["lr"]))
    assert second == pytest.approx({group: rate / 2 for group, rate in first.items()})
    assert set(third.values()) == {0.0}


@pytest.mark.parametrize("config", COMMANDS)
def test_the_summary_says_what_ran_and_how_it_ended(runs: dict[str, Run], config: str):
    summary = runs[config].summary
    assert 1 < summary["validation_loss"] < 6
    assert summary["training_loss"] == runs[config].metrics[-1]["loss"]
    assert summary["world_size"] == RANKS[config]
    assert (summary["steps"], summary["seed"], summary["model"]) == (STEPS, 0, "tiny")
    assert summary["config"]["scheduler"]["params"]["total_num_steps"] == STEPS
    assert set(summary["versions"]) == {"python", "torch", "deepspeed", "ds_optforge"}
    assert summary["seconds"] > 0
    assert (summary["optimizer_bytes_per_step"] > 0) == (config == "muon_zero3")  # elsewhere no matrix is cut


@pytest.mark.parametrize("config", COMMANDS)
def test_the_loss_is_drawn(runs: dict[str, Run], config: str):
    image = (runs[config].out / "loss.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000


@pytest.mark.promise("deepspeed-launcher", "zero-stages")
def test_launcher_world_size_and_zero_stage_leave_the_curve_alone(runs: dict[str, Run]):
    assert runs["muon_zero2"].losses == pytest.approx(runs["muon_zero1"].losses, rel=1e-3)
    assert runs["muon_zero3"].losses == pytest.approx(runs["muon_zero1"].losses, rel=1e-3)


@pytest.mark.promise("deepspeed-launcher")
@pytest.mark.parametrize("config", COMMANDS)
def test_a_run_has_learned(runs: dict[str, Run], config: str):
    """From a loss of about 5.55 nats per byte, uniform. The validation loss is that of the weights at the end."""
    assert runs[config].losses[0] == pytest.approx(math.log(256), abs=0.3)
    assert runs[config].summary["validation_loss"] < runs[config].losses[0] - 0.1


@pytest.mark.promise("muon-counts")
def test_rank_0_logs_the_routing_once(runs: dict[str, Run]):
    lines = [line for line in runs["muon_zero2"].process.stderr.splitlines() if line.startswith("ds_optforge")]
    assert len([line for line in lines if "Muon" in line and "AdamW" in line]) == 1


@pytest.mark.promise("averaged-evaluation")
def test_the_average_of_schedule_free_is_evaluated_and_exported(launched: Launches, text: Path, tmp_path: Path):
    """A checkpoint holds the training weights, of which `export` makes the average."""
    run = launched("python train.py --ds_config ds_configs/schedule_free_adamw_zero2.json --save-every 3")
    export(run.out / "checkpoints" / "step_00000003", tmp_path / "average")
    (averaged,) = map(load_file, (tmp_path / "average").glob("*.safetensors"))
    trained = logical_tensors(run.out / "checkpoints" / "step_00000003")
    exported = load_file(run.out / "model.safetensors")
    assert exported.keys() == averaged.keys()
    assert all(torch.equal(exported[name], averaged[name]) for name in exported)
    assert not any(torch.equal(exported[name].flatten(), trained[f"model/{name}"]) for name in exported)
    model = build_model("tiny", sequence_length=32)
    model.load_state_dict(exported)
    with torch.no_grad():
        loss = model(*load_corpus(str(text)).validation_windows(32, 512)).item()
    assert run.summary["validation_loss"] == pytest.approx(loss, rel=1e-5)


def test_a_llama_of_transformers_trains_from_random_weights_to_weights_under_its_names(launched: Launches):
    run = launched("python train.py --model llama --ds_config ds_configs/muon_zero1.json")
    assert run.losses[0] == pytest.approx(math.log(256), abs=0.3)
    assert run.losses[-1] < run.losses[0]
    assert "model.model.layers.0.self_attn.q_proj.weight" in load_file(run.out / "model.safetensors")


def test_fine_tuning_begins_where_the_weights_ended(launched: Launches, text: Path):
    """The loss of the first step, before any update, is that of the weights."""
    earlier = launched(COMMANDS["muon_zero1"])
    weights = earlier.out / "model.safetensors"
    run = launched(f"python train.py --ds_config ds_configs/muon_zero1.json --weights {shlex.quote(str(weights))}")
    model = build_model("tiny", sequence_length=32)
    model.load_state_dict(load_file(weights))
    batch = run.summary["config"]["train_batch_size"]
    with torch.no_grad():
        expected = model(*load_corpus(str(text)).batch(0, 0, batch, 32)).item()
    assert run.losses[0] == pytest.approx(expected, rel=1e-4)
    assert run.losses[0] < earlier.losses[0] - 0.1


# ------------------------------------------------------------------------------------------- bad input


def launch(launcher: str, *arguments: str) -> Process:
    return on_this_machine(f"{launcher} train.py {shlex.join(arguments)}")


def assert_refused(process: Process, message: str) -> None:
    assert process.returncode != 0
    assert f"train.py: error: {message}" in process.stderr
    assert "Traceback" not in process.stderr


def test_bad_data_stops_every_rank_before_they_meet(tmp_path: Path):
    process = launch("deepspeed --num_gpus 2", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    assert_refused(process, f"data path {str(tmp_path / 'nowhere')!r}: no such file or folder")
    assert not (tmp_path / "out").exists()


def test_weights_that_cannot_be_read_or_are_of_another_model_are_refused(runs: dict[str, Run], text: Path, tmp_path: Path):
    assert_refused(launch("python", "--data", str(text), "--weights", str(text)), f"--weights {str(text)!r} cannot be read")
    weights = str(runs["muon_zero1"].out / "model.safetensors")
    other = ("--data", str(text), "--model", "small", "--sequence-length", "32", "--out", str(tmp_path / "out"))
    assert_refused(launch("python", *other, "--weights", weights), f"--weights {weights!r} are not those of --model small")


def test_missing_matplotlib_names_the_extra_before_training():
    without = "import runpy, sys; sys.modules['matplotlib'] = None; runpy.run_path('train.py', run_name='__main__')"
    process = on_this_machine(f"python -c {shlex.quote(without)}")
    assert_refused(process, "the loss is drawn, but matplotlib is not installed; run: pip install 'ds-optforge[experiments]'")


def test_a_text_shorter_than_the_sequence_is_refused(text: Path):
    process = launch("python", "--data", str(text), "--sequence-length", "100000")
    assert_refused(process, "the training text holds ")


def test_a_batch_that_the_ranks_cannot_share_is_refused(text: Path, tmp_path: Path):
    config = tmp_path / "odd.json"
    config.write_text('{"train_batch_size": 15, "optimizer": {"type": "OptForge", "params": {"name": "muon"}}}')
    process = launch("deepspeed --num_gpus 2", "--ds_config", str(config), "--data", str(text))
    assert_refused(process, "train_batch_size 15 cannot be shared equally by 2 ranks")


def test_a_config_error_is_one_block_and_not_a_traceback(text: Path, tmp_path: Path):
    config = tmp_path / "typo.json"
    config.write_text('{"train_batch_size": 16, "optimizer": {"type": "OptForge", "params": {"name": "moun"}}}')
    process = launch("python", "--ds_config", str(config), "--data", str(text))
    assert_refused(process, "")
    assert process.returncode == 2
    assert "moun" in process.stderr


def test_a_config_file_that_is_not_json_is_refused(text: Path, tmp_path: Path):
    config = tmp_path / "broken.json"
    config.write_text("{")
    assert_refused(launch("python", "--ds_config", str(config), "--data", str(text)), "--ds_config ")
