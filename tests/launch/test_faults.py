"""train.py is killed, asked to stop, and started again: it ends as the uninterrupted run does, bit for bit."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from tests.launch.commands import Process, on_this_machine

STEPS, EVERY = 24, 4


class Job:
    """Launches that go on in one folder, with the faults of `faulty.py`."""

    def __init__(self, out: Path, text: Path) -> None:
        self.out = out
        small = f"--sequence-length 32 --data {shlex.quote(str(text))} --out {shlex.quote(str(out))}"
        self._command = (
            f"torchrun --nproc-per-node=2 -m tests.launch.faulty {small} --steps {STEPS} --save-every {EVERY} --resume"
        )

    def launch(self, **fault: str) -> Process:
        return on_this_machine(self._command, **fault)

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


def test_a_run_that_is_stopped_and_killed_ends_as_if_nothing_had_happened(tmp_path: Path, text: Path) -> None:
    uninterrupted, interrupted = Job(tmp_path / "uninterrupted", text), Job(tmp_path / "interrupted", text)
    finished = uninterrupted.launch()
    assert finished.returncode == 0, finished.stderr
    assert len(uninterrupted.losses) == STEPS

    stopped = interrupted.launch(STOP_AFTER="step_00000008")
    assert "stopped by SIGTERM after step 9; go on with --resume" in stopped.stderr
    assert len(interrupted.losses) == interrupted.checkpoints[-1] == 9

    killed = interrupted.launch(DIE_IN="step_00000016")
    assert killed.returncode != 0
    assert interrupted.checkpoints[-1] == 12

    finished = interrupted.launch()
    assert finished.returncode == 0, finished.stderr
    assert interrupted.losses == uninterrupted.losses
    assert interrupted.validation_loss == uninterrupted.validation_loss
    kept = sorted(path.name for path in (interrupted.out / "checkpoints").iterdir())
    assert kept == [f"step_{STEPS - EVERY:08d}", f"step_{STEPS:08d}"]  # --keep-last 2

    small = f"--sequence-length 32 --data {shlex.quote(str(text))} --out {shlex.quote(str(interrupted.out))}"
    other = on_this_machine(f"python train.py {small} --seed 1 --resume")
    assert other.returncode == 2
    assert "it was trained with seed 0, this run has 1" in other.stderr
