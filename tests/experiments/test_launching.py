"""Runs are subprocesses of a list of arguments; a run that has its record is never launched again."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ds_optforge.experiments.launching import ExperimentError, Launcher, Record, Run, filled, last_line, read_record
from tests.experiments.files import LAUNCHER, config
from tests.processes import wait_until_gone


class Heard:
    """Notes what a launcher tells, and how many runs were under way at once."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.active = self.most = 0

    def started(self, run: Run, folder: Path) -> None:
        self.active += 1
        self.most = max(self.most, self.active)
        self.events.append(f"{run.name} started")

    def ended(self, record: Record, reused: bool) -> None:
        self.active -= not reused
        self.events.append(f"{record.name} {'reused' if reused else record.status}")


def launcher(folder: Path, template: Sequence[str] = LAUNCHER, **more: Any) -> Launcher:
    return Launcher(template, folder, Heard(), **more)


def run(name: str = "a", seed: int = 0, steps: int = 5, **more: Any) -> Run:
    return Run(name, config(**more), seed, steps)


def launch(folder: Path, *runs: Run, template: Sequence[str] = LAUNCHER, **more: Any) -> tuple[list[Record], Any]:
    launched = launcher(folder, template, **more)
    with launched.opened():
        return launched.run(runs), launched.watcher


def test_a_finished_run_is_recorded_with_its_numbers(tmp_path: Path) -> None:
    (record,), _ = launch(tmp_path, run())
    assert record.status == "finished"
    assert record.measured["tokens_per_second"] == 100.0
    assert record.measured["state_bytes_per_parameter"] == 4.0
    assert record.conditions == {"world_size": 1, "sequence_length": 10}
    assert read_record(record.folder) == record
    assert json.loads((record.folder / "config.json").read_text()) == config()


def test_arguments_are_filled_in_one_by_one_and_no_shell_reads_them(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    rest = [f"$(touch {trace})", f"; touch {trace}", "two words", "seed={seed},{seed}", "{slot}"]
    (record,), _ = launch(tmp_path, run(seed=7), template=[*LAUNCHER, *rest])
    received = json.loads((record.folder / "arguments.json").read_text())
    assert received == [f"$(touch {trace})", f"; touch {trace}", "two words", "seed=7,7", "0"]
    assert not trace.exists()


def test_each_run_gets_a_free_port(tmp_path: Path) -> None:
    (port,) = filled(["{port}"], run(), tmp_path, slot=0)
    assert 1024 <= int(port) < 65536


def test_a_recorded_run_is_not_launched_again_under_any_name(tmp_path: Path) -> None:
    launch(tmp_path, run("a"))
    _, heard = launch(tmp_path, run("b"), run("c", seed=1))
    assert sorted(heard.events) == ["a reused", "c finished", "c started"]


def test_equal_runs_are_launched_once(tmp_path: Path) -> None:
    records, heard = launch(tmp_path, run("a"), run("b"))
    assert len(heard.events) == 2
    assert records[0] == records[1]


def test_so_many_at_a_time(tmp_path: Path) -> None:
    runs = [run(seed=seed, steps=2, sleep=0.5) for seed in range(5)]
    _, heard = launch(tmp_path, *runs, parallel=3)
    assert heard.most == 3


def test_a_crash_is_recorded_with_the_error_that_the_program_ended_with(tmp_path: Path) -> None:
    (record,), _ = launch(tmp_path, run(train_batch_size=0))
    assert record.status == "crashed"
    assert record.reason == "exit status 1: ZeroDivisionError: float division by zero"
    _, heard = launch(tmp_path, run(train_batch_size=0))
    assert heard.events == ["a reused"]


def test_retry_launches_again_what_failed_and_nothing_else(tmp_path: Path) -> None:
    runs = [run("good"), run("bad", train_batch_size=0)]
    launch(tmp_path, *runs)
    _, heard = launch(tmp_path, *runs, retry=True)
    assert sorted(heard.events) == ["bad crashed", "bad started", "good reused"]


def test_nan_is_a_divergence(tmp_path: Path) -> None:
    (record,), _ = launch(tmp_path, run(lr=1e200))
    assert record.status == "diverged"
    assert "is nan" in record.reason or "is inf" in record.reason


@pytest.mark.promise("sweep-budget")
def test_a_timed_out_run_is_ended_with_the_processes_that_it_started(tmp_path: Path) -> None:
    (record,), _ = launch(tmp_path, run(steps=1000, sleep=0.1, child=True), timeout=5.0)
    assert record.status == "timed out"
    assert record.seconds < 60  # of 100
    child = int((record.folder / "child").read_text())
    assert not wait_until_gone([child], timeout_s=30)  # it would run for 60


def test_a_program_that_leaves_no_summary_has_crashed_whatever_an_earlier_attempt_left(tmp_path: Path) -> None:
    silent = ["true", *LAUNCHER[2:]]
    (record,), _ = launch(tmp_path, run(), template=silent)
    assert record.status == "crashed"
    assert "left no summary.json" in record.reason
    (record.folder / "summary.json").write_text('{"validation_loss": 1.0}')
    (again,), _ = launch(tmp_path, run(), template=silent, retry=True)
    assert again.folder == record.folder
    assert again.status == "crashed"
    assert again.measured == {}


def test_a_folder_in_use_is_refused_and_the_process_named(tmp_path: Path) -> None:
    """As after kill -9: the run that the command left behind still writes into its folder."""
    first = launcher(tmp_path)
    with first.opened():
        second = launcher(tmp_path)
        with pytest.raises(ExperimentError, match="in use by another command"), second.opened():
            pass
        left = subprocess.Popen(["sleep", "60"], pass_fds=(first._lock,))
    try:
        folder = tmp_path / "runs" / "left"
        folder.mkdir()
        (folder / "pid").write_text(str(left.pid))
        with pytest.raises(ExperimentError, match=rf"process {left.pid} .*runs/left"), launcher(tmp_path).opened():
            pass
    finally:
        left.kill()
        left.wait()
    with launcher(tmp_path).opened():
        pass


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What a background job of a shell does not begin with."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_runs_and_leaves_no_record(tmp_path: Path) -> None:
    class Interrupting(Heard):
        def started(self, run: Run, folder: Path) -> None:
            super().started(run, folder)
            os.kill(os.getpid(), signal.SIGINT)

    interrupted = Launcher(LAUNCHER, tmp_path, Interrupting())
    with pytest.raises(KeyboardInterrupt), interrupted.opened():
        interrupted.run([run(steps=1000, sleep=0.1), run(seed=1, steps=1000, sleep=0.1)])
    assert not list(tmp_path.glob("runs/*/record.json"))
    assert len(list(tmp_path.glob("runs/*/config.json"))) == 1


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("a\nValueError: bad\nthe end\n", "ValueError: bad"),
        ("[rank0]: KeyError: 'groups'\n[rank0]: more\n", "[rank0]: KeyError: 'groups'"),
        ("train.py: error: no such file\n 50%|###\r 60%|###\r", "train.py: error: no such file"),
        ("\x1b[31mend\x1b[0m\n", "end"),
        ("", "it said nothing"),
    ],
)
def test_the_reason_of_a_crash_is_the_telling_line_of_its_log(log: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text(log)
    assert last_line(tmp_path / "log.txt") == expected
