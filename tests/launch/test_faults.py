"""train.py is killed, asked to stop, and started again: it ends as the uninterrupted run does, bit for bit."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest

from tests.launch.commands import Process, on_this_machine

STEPS, EVERY = 24, 4
TORCHRUN = "torchrun --nproc-per-node=2 -m"
# torchrun's own store outlives the ranks, and has the addresses of those that died (pytorch#135712), unless it is not shared.
RESTARTING = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --max-restarts=3 --nproc-per-node=2 -m"
DEEPSPEED = "deepspeed --num_gpus 2 --module"


class Job:
    """Launches that go on in one folder, with the faults of `faulty.py`."""

    def __init__(self, out: Path, text: Path) -> None:
        self.out = out
        self.small = f"--sequence-length 32 --data {shlex.quote(str(text))} --out {shlex.quote(str(out))}"
        self.small += f" --steps {STEPS} --save-every {EVERY} --resume"

    def launch(self, launcher: str = TORCHRUN, **fault: str) -> Process:
        return on_this_machine(f"{launcher} tests.launch.faulty {self.small}", **fault)

    @property
    def losses(self) -> list[float]:
        return [json.loads(line)["loss"] for line in (self.out / "metrics.jsonl").read_text().splitlines()]

    @property
    def checkpoints(self) -> list[int]:
        """The steps of the complete ones."""
        return sorted(int(path.parent.name[-8:]) for path in self.out.glob("checkpoints/step_????????/checkpoint.json"))

    @property
    def validation_loss(self) -> float:
        return float(json.loads((self.out / "summary.json").read_text())["validation_loss"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Job:
    job = Job(tmp_path_factory.mktemp("uninterrupted"), text)
    finished = job.launch()
    assert finished.returncode == 0, finished.stderr
    assert len(job.losses) == STEPS
    return job


def test_a_run_that_is_stopped_and_killed_ends_as_if_nothing_had_happened(
    uninterrupted: Job, tmp_path: Path, text: Path
) -> None:
    """Asked to stop; then killed in its first exchange, in mid-step and in a save, and started again each time by torchrun."""
    interrupted = Job(tmp_path / "interrupted", text)
    stopped = interrupted.launch(STOP_AFTER="step_00000008")
    assert "stopped by SIGTERM after step 9; go on with --resume" in stopped.stderr
    assert len(interrupted.losses) == interrupted.checkpoints[-1] == 9
    oldest = interrupted.out / "checkpoints" / "step_00000008"
    os.utime(oldest, (2**31, 2**31))  # of a host whose clock is years ahead: the newest is the one of the most steps

    faults = "exchange.py:collect:1,optimizer.py:step:16,step_00000016"
    finished = interrupted.launch(RESTARTING, DIE_IN=faults)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("failed (exitcode: -9) local_rank: 1") == 3
    assert interrupted.losses == uninterrupted.losses
    assert interrupted.validation_loss == uninterrupted.validation_loss
    kept = sorted(path.name for path in (interrupted.out / "checkpoints").iterdir())
    assert kept == [f"step_{STEPS - EVERY:08d}", f"step_{STEPS:08d}"]  # --keep-last 2

    other = on_this_machine(f"python train.py {interrupted.small} --seed 1")
    assert other.returncode == 2
    assert "it was trained with seed 0, this run has 1" in other.stderr


def test_deepspeeds_launcher_ends_when_a_rank_is_killed_and_one_rank_goes_on(
    uninterrupted: Job, tmp_path: Path, text: Path
) -> None:
    """Killed in a save, so that the newest whole checkpoint is the one before it."""
    job = Job(tmp_path / "job", text)
    killed = job.launch(DEEPSPEED, DIE_IN="step_00000008")
    assert killed.returncode != 0
    assert "--local_rank=1" in killed.stderr + killed.stdout
    assert "exits with return code = -9" in killed.stderr + killed.stdout
    assert "step_00000008: not written" in killed.stderr
    assert job.checkpoints == [EVERY]

    alone = on_this_machine(f"python train.py {job.small}")
    assert alone.returncode == 0, alone.stderr
    assert job.losses == pytest.approx(uninterrupted.losses, rel=2e-2)
