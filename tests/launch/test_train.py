"""train.py under each launcher, with each of the shipped DeepSpeed configs, and what it does with bad input."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 3
LAUNCH_LIMIT = 240  # seconds; the first launch on a machine also compiles a DeepSpeed operator
RUNS = {  # config: (launcher, ranks); tests/distributed/test_presets.py trains with every config
    "muon_zero1": ("python", 1),
    "muon_zero2": ("deepspeed", 2),
    "muon_zero3": ("torchrun", 2),
    "adamw_zero2": ("deepspeed", 2),
}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def launch(launcher: str, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run train.py as a user would, from the repository's root."""
    scripts = Path(sysconfig.get_path("scripts"))
    command = {
        "python": [sys.executable],
        "torchrun": [str(scripts / "torchrun"), f"--nproc-per-node={ranks}", f"--master-port={free_port()}"],
        "deepspeed": [str(scripts / "deepspeed"), f"--num_gpus={ranks}", f"--master_port={free_port()}"],
    }[launcher]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [*command, "train.py", *arguments],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LAUNCH_LIMIT,
    )


@dataclass(frozen=True)
class Run:
    """A finished launch of train.py and what it left in its --out folder."""

    process: subprocess.CompletedProcess[str]
    out: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.out / "summary.json").read_text()))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text with some structure, long enough for a few validation windows."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"line {index}: {index * index}\n" for index in range(4000)))
    return path


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Every config of RUNS, launched once on the same data."""
    finished = {}
    for config, (launcher, ranks) in RUNS.items():
        out = tmp_path_factory.mktemp(config) / "results"
        arguments = f"--ds_config ds_configs/{config}.json --steps {STEPS} --sequence-length 32".split()
        finished[config] = Run(launch(launcher, ranks, *arguments, "--data", str(text), "--out", str(out)), out)
    return finished


@pytest.mark.parametrize("config", RUNS)
def test_a_run_ends_cleanly(runs: dict[str, Run], config: str):
    process = runs[config].process
    assert process.returncode == 0, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    assert "destroy_process_group" not in process.stderr  # torch's complaint about a group that was left open


@pytest.mark.parametrize("config", RUNS)
def test_metrics_have_a_row_for_each_step(runs: dict[str, Run], config: str):
    metrics = runs[config].metrics
    assert [row["step"] for row in metrics] == [1, 2, 3]
    for row in metrics:
        assert set(row) == {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gb"}
        assert 1 < row["loss"] < 7
        assert row["grad_norm"] > 0
        assert row["tokens_per_second"] > 0
        assert 0.1 < row["peak_memory_gb"] < 10


def test_each_role_has_its_own_learning_rate_and_all_fall_to_zero_together(runs: dict[str, Run]):
    first, second, third = (row["learning_rate"] for row in runs["muon_zero3"].metrics)
    params = runs["muon_zero3"].summary["config"]["optimizer"]["params"]
    adamw_groups = ("embedding.adamw", "unembedding.adamw", "scalar.adamw")
    assert first == pytest.approx({"matrix.muon": params["lr"]} | dict.fromkeys(adamw_groups, params["adamw"]["lr"]))
    assert second == pytest.approx({group: rate / 2 for group, rate in first.items()})
    assert set(third.values()) == {0.0}


@pytest.mark.parametrize("config", RUNS)
def test_the_summary_says_what_ran_and_how_it_ended(runs: dict[str, Run], config: str):
    summary = runs[config].summary
    assert 1 < summary["validation_loss"] < 6
    assert summary["training_loss"] == runs[config].metrics[-1]["loss"]
    assert summary["world_size"] == RUNS[config][1]
    assert (summary["steps"], summary["seed"], summary["model"]) == (STEPS, 0, "tiny")
    assert summary["config"]["scheduler"]["params"]["total_num_steps"] == STEPS
    assert set(summary["versions"]) == {"python", "torch", "deepspeed", "ds_optforge"}
    assert summary["seconds"] > 0


@pytest.mark.parametrize("config", RUNS)
def test_the_loss_is_drawn(runs: dict[str, Run], config: str):
    image = (runs[config].out / "loss.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000


def test_launcher_world_size_and_zero_stage_leave_the_curve_alone(runs: dict[str, Run]):
    curves = {config: [row["loss"] for row in runs[config].metrics] for config in RUNS if config.startswith("muon")}
    assert curves["muon_zero2"] == pytest.approx(curves["muon_zero1"], rel=1e-3)
    assert curves["muon_zero3"] == pytest.approx(curves["muon_zero1"], rel=1e-3)


def test_rank_0_logs_the_routing_once(runs: dict[str, Run]):
    lines = [line for line in runs["muon_zero2"].process.stderr.splitlines() if line.startswith("ds_optforge")]
    assert len([line for line in lines if "Muon" in line and "AdamW" in line]) == 1


# ------------------------------------------------------------------------------------------- bad input


def assert_refused(process: subprocess.CompletedProcess[str], message: str) -> None:
    assert process.returncode != 0
    assert f"train.py: error: {message}" in process.stderr
    assert "Traceback" not in process.stderr


def test_bad_data_stops_every_rank_before_they_meet(tmp_path: Path):
    process = launch("deepspeed", 2, "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    assert_refused(process, f"data path {str(tmp_path / 'nowhere')!r}: no such file or folder")
    assert not (tmp_path / "out").exists()


def test_a_text_shorter_than_the_sequence_is_refused(text: Path):
    process = launch("python", 1, "--data", str(text), "--sequence-length", "100000")
    assert_refused(process, "the training text holds ")


def test_a_batch_that_the_ranks_cannot_share_is_refused(text: Path, tmp_path: Path):
    config = tmp_path / "odd.json"
    config.write_text('{"train_batch_size": 15, "optimizer": {"type": "OptForge", "params": {"name": "muon"}}}')
    process = launch("deepspeed", 2, "--ds_config", str(config), "--data", str(text))
    assert_refused(process, "train_batch_size 15 cannot be shared equally by 2 ranks")


def test_a_config_error_is_one_block_and_not_a_traceback(text: Path, tmp_path: Path):
    config = tmp_path / "typo.json"
    config.write_text('{"train_batch_size": 16, "optimizer": {"type": "OptForge", "params": {"name": "moun"}}}')
    process = launch("python", 1, "--ds_config", str(config), "--data", str(text))
    assert_refused(process, "")
    assert process.returncode == 2
    assert "moun" in process.stderr


def test_a_config_file_that_is_not_json_is_refused(text: Path, tmp_path: Path):
    config = tmp_path / "broken.json"
    config.write_text("{")
    assert_refused(launch("python", 1, "--ds_config", str(config), "--data", str(text)), "--ds_config ")
