"""train.py is killed, asked to stop, and started again: it ends as the uninterrupted run does, bit for bit."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.launch.commands import LAUNCH_LIMIT, ROOT, environment, free_port, on_this_machine

STEPS, EVERY = 24, 4


class Job:
    """torchrun with two ranks, and the ranks' process ids."""

    def __init__(self, out: Path, text: Path, *arguments: str) -> None:
        self.out = out
        command = ["torchrun", "--nproc-per-node=2", f"--master-port={free_port()}", "train.py", f"--out={out}"]
        command += [f"--data={text}", "--sequence-length=32", f"--steps={STEPS}", f"--save-every={EVERY}", *arguments]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    @property
    def ranks(self) -> list[psutil.Process]:
        return [child for child in psutil.Process(self.process.pid).children() if "train.py" in child.cmdline()]

    def after(self, step: int) -> Job:
        """Wait until that many steps are in the log."""
        self._wait(lambda: len(losses(self.out)) >= step)
        return self

    def _wait(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LAUNCH_LIMIT
        while not happened():
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> str:
        """What it printed."""
        output, _ = self.process.communicate(timeout=LAUNCH_LIMIT)
        return output


def losses(out: Path) -> list[float]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]


@pytest.fixture
def job(tmp_path: Path, text: Path) -> Iterator[Callable[..., Job]]:
    jobs = []

    def start(name: str, *arguments: str) -> Job:
        jobs.append(Job(tmp_path / name, text, *arguments))
        return jobs[-1]

    yield start
    for each in jobs:
        if each.process.poll() is None:
            for process in [*psutil.Process(each.process.pid).children(recursive=True), each.process]:
                process.kill()
            each.process.wait()


def test_a_run_that_is_stopped_and_killed_ends_as_if_nothing_had_happened(job: Callable[..., Job], text: Path) -> None:
    uninterrupted = job("uninterrupted")
    output = uninterrupted.end()
    assert uninterrupted.process.returncode == 0, output
    assert len(losses(uninterrupted.out)) == STEPS

    stopped = job("interrupted", "--resume").after(6)  # --resume: nothing is there yet, so it starts afresh
    stopped.process.send_signal(signal.SIGTERM)
    output = stopped.end()
    assert "stopped by SIGTERM after step" in output
    assert "go on with --resume" in output
    done = len(losses(stopped.out))
    assert 6 <= done < STEPS
    assert (stopped.out / "checkpoints" / f"step_{done:08d}" / "checkpoint.json").is_file()

    killed = job("interrupted", "--resume").after(done + EVERY + 2)
    killed.ranks[1].send_signal(signal.SIGKILL)
    killed.end()
    assert killed.process.returncode != 0

    last = job("interrupted", "--resume")
    output = last.end()
    assert last.process.returncode == 0, output
    assert losses(last.out) == losses(uninterrupted.out)
    ends = [json.loads((run.out / "summary.json").read_text()) for run in (uninterrupted, last)]
    assert ends[0]["validation_loss"] == ends[1]["validation_loss"]
    kept = sorted(path.name for path in (last.out / "checkpoints").iterdir())
    assert kept == [f"step_{STEPS - EVERY:08d}", f"step_{STEPS:08d}"]  # --keep-last 2

    other = on_this_machine(f"python train.py --data {text} --sequence-length 32 --seed 1 --out {last.out} --resume")
    assert other.returncode == 2
    assert "it was trained with seed 0, this run has 1" in other.stderr
