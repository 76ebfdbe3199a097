"""Launches runs of a training program from an argument-list template, and records each when it has ended.

A run that has a record is not launched again. The program gets a DeepSpeed configuration file, a folder, a seed and a number of
steps. It writes metrics.jsonl (a row per step: step, loss, grad_norm, tokens_per_second, peak_memory_gb) and summary.json
(numbers, validation_loss among them) into the folder, as train.py does, and exits with 0.
"""

import fcntl
import hashlib
import json
import math
import os
import queue
import re
import shutil
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from pydantic import TypeAdapter

from ds_optforge.errors import ConfigError
from ds_optforge.experiments.run_files import read_rows, read_summary, replace_text
from ds_optforge.experiments.spec import PLACEHOLDER
from ds_optforge.reading import json_value, text

Status: TypeAlias = Literal["finished", "crashed", "diverged", "timed out"]
RECORD = "record.json"
GRACE_SECONDS = 20.0  # from SIGTERM to SIGKILL: train.py saves a checkpoint in between
POLL_SECONDS = 0.1


class ExperimentError(RuntimeError):
    """Runs that cannot be evaluated; the message says what to run again."""


@dataclass(frozen=True, slots=True)
class Run:
    """One launch: a configuration, a seed and a number of steps. The name is for people."""

    name: str
    config: dict[str, Any]
    seed: int
    steps: int


@dataclass(frozen=True, slots=True)
class Record:
    """The end of a run, kept as record.json in its folder.

    Attributes:
        name, seed, steps: those of the run.
        status, reason: how it ended, and why, where it did not finish.
        seconds: wall time of the launch.
        commit: the commit of the working folder.
        command: the arguments that were launched.
        measured: finite numbers by name.
        conditions: values of summary.json that runs must share to be compared.
        folder: the folder of the run.
    """

    name: str
    seed: int
    steps: int
    status: Status
    reason: str
    seconds: float
    commit: str
    command: list[str]
    measured: dict[str, float]
    conditions: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path()

    @property
    def finished(self) -> bool:
        """True where the run ended well, with finite losses."""
        return self.status == "finished"


_RECORD = TypeAdapter(Record)


class Watcher(Protocol):
    """Receives the start and the end of each run, in several threads."""

    def started(self, run: Run, folder: Path) -> None:
        """Receive a run that has been launched."""

    def ended(self, record: Record, reused: bool) -> None:
        """Receive the record of a run; ``reused`` where it was found and not launched."""


@dataclass(slots=True)
class Launcher:
    """Launches runs, each in a folder of its own under ``out``/runs.

    Attributes:
        template: the command, with placeholders (`filled`).
        out: the folder for runs and results.
        watcher: receives starts and ends.
        timeout: seconds after which a run is ended; None for no limit.
        parallel: number of runs at a time.
        retry: launch runs again whose record says that they did not finish.
    """

    template: Sequence[str]
    out: Path
    watcher: Watcher
    timeout: float | None = None
    parallel: int = 1
    retry: bool = False
    _lock: int = -1
    _retried: set[str] = field(default_factory=set)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Lock the folder, because a second command, or a run that a killed one left behind, would write into the same files.

        Raises:
            ExperimentError: another process holds the folder.
        """
        (self.out / "runs").mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.out / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ExperimentError(f"{self.out}: in use by {self._users()}; wait for it, or end it, and run again") from None
            yield
        finally:
            os.close(self._lock)

    def _users(self) -> str:
        left = [f"process {path.read_text()} ({path.parent})" for path in self.out.glob("runs/*/pid")]
        return f"another command or the runs of a killed one: {', '.join(left)}" if left else "another command"

    def run(self, runs: Sequence[Run]) -> list[Record]:
        """Launch the runs that have no record yet; return one record per run, in order.

        An exception, an interrupt among them, ends all processes before it is passed on.

        Raises:
            ConfigError: a record.json cannot be read.
        """
        slots: queue.Queue[int] = queue.Queue()
        for slot in range(self.parallel):
            slots.put(slot)
        distinct = {self._key(run): run for run in runs}
        with ThreadPoolExecutor(self.parallel) as pool:
            try:
                futures = {key: pool.submit(self._once, run, slots) for key, run in distinct.items()}
                wait(futures.values())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # first: or where one run has ended, the next would start
                self._stop.set()
                raise
        return [futures[self._key(run)].result() for run in runs]

    def _once(self, run: Run, slots: "queue.Queue[int]") -> Record:
        key = self._key(run)
        earlier = next(self.out.glob(f"runs/*-{key}"), None)
        folder = earlier or self.out / "runs" / f"{run.name}-seed{run.seed}-{key}"
        if (folder / RECORD).is_file():
            record = read_record(folder)
            if record.finished or not self.retry or key in self._retried:
                self.watcher.ended(record, reused=True)
                return record
        self._retried.add(key)
        slot = slots.get()
        try:
            record = self._launch(run, folder, slot)
        finally:
            slots.put(slot)
        self.watcher.ended(record, reused=False)
        return record

    def _key(self, run: Run) -> str:
        """A digest of all that decides a run's result: two runs with the same key are one, whatever their names."""
        content = json.dumps([list(self.template), run.config, run.seed, run.steps], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:10]

    def _launch(self, run: Run, folder: Path, slot: int) -> Record:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was ended: its checkpoints are not this one's
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(run.config, indent=2) + "\n")
        command = filled(self.template, run, folder, slot)
        commit = current_commit()
        start = time.monotonic()
        self.watcher.started(run, folder)
        status, reason = self._wait(command, folder, start)
        measured, conditions = measure(folder) if status == "finished" else ({}, {})
        if status == "finished":
            status, reason = judged(folder)
        finite = {key: value for key, value in measured.items() if math.isfinite(value)}
        seconds = round(time.monotonic() - start, 2)
        record = Record(run.name, run.seed, run.steps, status, reason, seconds, commit, command, finite, conditions, folder)
        write_record(record)
        return record

    def _wait(self, command: list[str], folder: Path, start: float) -> tuple[Status, str]:
        with open(folder / "log.txt", "wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, so that all its ranks can be ended
                pass_fds=(self._lock,),  # as long as it lives, the folder is in use
            )
        (folder / "pid").write_text(str(process.pid))
        try:
            while not _has_ended(process):
                if self._stop.is_set():
                    raise InterruptedError
                if self.timeout is not None and time.monotonic() - start > self.timeout:
                    return "timed out", f"ended after {self.timeout:g} seconds"
        finally:
            _end(process)
            (folder / "pid").unlink()
        if process.returncode:
            return "crashed", f"exit status {process.returncode}: {last_line(folder / 'log.txt')}"
        return "finished", ""


def _has_ended(process: "subprocess.Popen[bytes]") -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(POLL_SECONDS)
    return process.returncode is not None


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the processes that are left of a run, its ranks included."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    if process.poll() != 0:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def filled(template: Sequence[str], run: Run, folder: Path, slot: int) -> list[str]:
    """Make the command of a run: placeholders are filled in argument by argument, and no shell reads it."""
    values = {
        "config": str(folder / "config.json"),
        "out": str(folder),
        "seed": str(run.seed),
        "steps": str(run.steps),
        "slot": str(slot),
    }
    if any("{port}" in argument for argument in template):
        with socket.socket() as probe:
            probe.bind(("", 0))
            values["port"] = str(probe.getsockname()[1])
    return [PLACEHOLDER.sub(lambda match: values[match[1]], argument) for argument in template]


def measure(folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Read the numbers of a finished run, and the conditions that must be the same in all runs that are compared.

    Both are empty where summary.json cannot be read.
    """
    try:
        summary = read_summary(folder)
    except (OSError, ValueError):
        return {}, {}
    measured = {key: float(value) for key, value in summary.items() if _is_number(value) and key not in _CONDITIONS}
    rows = read_rows(folder)
    for name, combine in (("grad_norm", _late_mean), ("tokens_per_second", statistics.median), ("peak_memory_gb", max)):
        values = [float(row[name]) for row in rows if _is_number(row.get(name))]
        if values:
            measured[name] = combine(values)
    return measured, {key: summary[key] for key in _CONDITIONS if key in summary}


_CONDITIONS = ("world_size", "data", "model", "sequence_length", "versions")


def _late_mean(values: Sequence[float]) -> float:
    return statistics.mean(values[len(values) // 2 :])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def judged(folder: Path) -> tuple[Status, str]:
    """Judge a run that exited with 0: finished, crashed without results, or diverged; and the reason."""
    try:
        summary = read_summary(folder)
    except (OSError, ValueError) as error:
        return "crashed", f"it exited with 0 and left no summary.json that can be read ({error})"
    rows = read_rows(folder)
    losses = {key: value for key, value in summary.items() if key.endswith("loss") and _is_number(value)}
    if rows and _is_number(rows[-1].get("loss")):
        losses["loss of the last step"] = rows[-1]["loss"]
    for name, value in losses.items():
        if not math.isfinite(value):
            return "diverged", f"{name} is {value}"
    return "finished", ""


def write_record(record: Record) -> None:
    """Write record.json atomically: a run has a complete one, or is launched again."""
    content = {key: value for key, value in asdict(record).items() if key != "folder"}
    replace_text(record.folder / RECORD, json.dumps(content, indent=2) + "\n")


def read_record(folder: Path) -> Record:
    """Read a run's record.

    Raises:
        ConfigError: no version of this module wrote it.
    """
    try:
        return _RECORD.validate_python({**json_value(text(folder / RECORD)), "folder": folder})
    except (ValueError, TypeError) as error:
        found = " ".join(str(error).split())
        raise ConfigError(f"{folder / RECORD}: not a record ({found}); remove {folder} to run it again") from None


def current_commit() -> str:
    """The commit of the working folder, with -dirty where files have been changed since; "unknown" outside of git."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    command = [git, "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def last_line(log: Path) -> str:
    """The last line of a log that names an error, else its last line, without the control codes of a terminal."""
    said = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    lines = [line.strip() for line in re.split(r"[\r\n]+", said) if line.strip()]
    telling = [line for line in lines if re.match(r"(\[rank\d+\]: )?(\w+\.)*\w*(Error|Exception)\b|.*\berror: ", line)]
    return (telling or lines or ["it said nothing"])[-1][:300]
