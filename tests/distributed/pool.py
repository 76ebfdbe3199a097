"""Warm pools of ranks: distributed test cases without paying for start-up each time.

A pool of n ranks is n processes, forked of others that have imported torch and DeepSpeed (`nursery`), that run any number
of jobs:

    results = pool.run(cases.train, stage=2, steps=20)     # one result per rank, in rank order

The job is a function of an importable module; it runs on every rank at once, inside a fresh gloo process group of n
ranks. Arguments and results are pickled, tensors included. ``RankFailure`` tells what went wrong, rank by rank. Whatever
a job does, the next one finds a working pool: ranks that hang or die are killed and started anew.
"""

from __future__ import annotations

import contextlib
import os
import reprlib
import signal
import sys
import time
from collections.abc import Callable, Container
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tests.distributed.channel import READY, RESET, Failed, Returned, dump, load
from tests.distributed.nursery import Nursery, nursery

START_TIMEOUT_S = 600.0
RESET_TIMEOUT_S = 60.0
GRACE_S = 60.0
STACK_DUMP_S = 0.5
STACK_DUMP_TIMEOUT_S = 30.0
STACK_DUMP_BEGINS = "(most recent call first):"
TAIL_LINES = 60
IMPORT_ROOT = Path(__file__).resolve().parents[2]


class RankFailure(AssertionError):
    """A job that did not return on every rank; ``types`` and ``messages`` hold one entry per failed rank."""

    def __init__(self, job: str, failures: dict[int, Failed], outputs: dict[int, str]) -> None:
        self.types = {rank: failure.type for rank, failure in failures.items()}
        self.messages = {rank: failure.message for rank, failure in failures.items()}
        sections = [_section(rank, failures[rank], outputs[rank]) for rank in sorted(failures)]
        super().__init__("\n\n".join([f"{job} failed on rank {', '.join(map(str, sorted(failures)))}", *sections]))


def _section(rank: int, failure: Failed, output: str) -> str:
    parts = [f"--- rank {rank}: {failure.type}: {failure.message}", failure.traceback.rstrip()]
    parts += [f"--- rank {rank}: end of its output", output] if output else []
    return "\n".join(filter(None, parts))


class _Process:
    """One rank as its pool sees it."""

    def __init__(self, parent: Nursery, rank: int, world_size: int, port: int, log: Path) -> None:
        self.log = log
        self.log_start = 0
        self.connection, other_end = Pipe()
        with other_end:
            self.process = parent.bear(_environment(rank, world_size, port), other_end, log)

    def receive(self) -> Returned | Failed:
        """The answer that has arrived, or the news that the rank has died."""
        try:
            answer: Returned | Failed = load(self.connection.recv_bytes())
            return answer
        except (EOFError, ConnectionError):
            self.process.wait(GRACE_S)
            return Failed("Died", f"the process ended with status {self.process.returncode}", "")

    def log_tail(self) -> str:
        """The last lines that this rank printed during the job."""
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-TAIL_LINES:])

    def signal(self, number: int) -> None:
        """Signal this one process."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End the rank and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(None)
        self.connection.close()


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return _common_environment() | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _common_environment() -> dict[str, str]:
    """What does not differ between ranks."""
    search_path = [str(IMPORT_ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # DeepSpeed's own Muon compiles itself, which takes half a minute
        "DS_ACCELERATOR": "cpu",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, search_path)),
    }


class Pool:
    """``size`` ranks that start with the first job and stay until ``close()``, or until this process is gone.

    ``python``: of another environment, in which the job's module can be imported too. ``nurseries``: the number of processes of
    which the ranks are forked; None for one each, which differ in the order of sets, but take 250 MB each.

    ``grace_s``: how long the others may take to come back after a first failure.
    """

    def __init__(
        self,
        size: int,
        log_directory: Path,
        python: str = sys.executable,
        nurseries: int | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        self.size = size
        self.grace_s = grace_s
        self._nurseries = nurseries or size
        self._python = python
        self._log_directory = log_directory
        self._ranks: list[_Process] = []
        self._store: TCPStore | None = None

    @property
    def pids(self) -> list[int]:
        """The process ids of the ranks, in rank order; empty while none run."""
        return [rank.process.pid for rank in self._ranks]

    def run(self, function: Callable[..., Any], /, *args: Any, timeout_s: float = 120.0, **kwargs: Any) -> list[Any]:
        """Run ``function(*args, **kwargs)`` on every rank; return the results in rank order, or raise RankFailure.

        After a first failure the other ranks have a few seconds to come back, for they may be waiting for the failed
        one in a collective. Ranks that do not come back show the stack they hang in.
        """
        __tracebackhide__ = True
        job = dump((function, args, kwargs))
        self._make_ready()
        answers: dict[int, Returned | Failed] = {}
        try:
            self._hand_out(job)
            self._collect(answers, timeout_s)
            failures = {number: answer for number, answer in answers.items() if isinstance(answer, Failed)}
            failures |= self._hung(answers, failures, timeout_s)
            if failures:
                raise RankFailure(_title(function, args, kwargs), failures, self._outputs())
            return [answer.value for _, answer in sorted(answers.items()) if isinstance(answer, Returned)]
        finally:
            self._reset_or_kill(len(answers) == self.size)

    def close(self) -> None:
        """End all ranks. A later job would start new ones."""
        for rank in self._ranks:
            rank.signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        for rank in self._ranks:
            rank.process.wait(max(0.0, deadline - time.monotonic()))
        self._kill()

    def _make_ready(self) -> None:
        """Running ranks, all past the reset after their last job; started anew where they are not."""
        if self._ranks and not self._await_ready(RESET_TIMEOUT_S):
            self._kill()
        if not self._ranks:
            self._start()
            if not self._await_ready(START_TIMEOUT_S):
                failure = Failed("NotStarted", f"not ready {START_TIMEOUT_S:.0f} s after its start, or dead", "")
                outputs = self._outputs()
                self._kill()
                raise RankFailure("start-up", dict.fromkeys(outputs, failure), outputs)

    def _start(self) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        logs = [self._log_directory / f"rank{number}.log" for number in range(self.size)]
        parents = [
            nursery(self._python, number % self._nurseries, _common_environment(), log) for number, log in enumerate(logs)
        ]
        try:
            for number, (parent, log) in enumerate(zip(parents, logs, strict=True)):
                self._ranks.append(_Process(parent, number, self.size, self._store.port, log))
        except OSError:
            self._kill()
            raise

    def _await_ready(self, timeout_s: float) -> bool:
        """Whether all ranks say that they are ready; false as soon as one is known to have died."""
        deadline = time.monotonic() + timeout_s
        awaited = {rank.connection for rank in self._ranks}
        while awaited:
            arrived = wait(awaited, max(0.0, deadline - time.monotonic()))
            ready = {connection for connection in awaited if connection in arrived and _says_ready(connection)}
            if not arrived or len(ready) < len(arrived):
                return False
            awaited -= ready
        return all(not rank.process.wait(0) for rank in self._ranks)

    def _hand_out(self, job: bytes) -> None:
        for rank in self._ranks:
            rank.log_start = rank.log.stat().st_size
            rank.connection.send_bytes(job)

    def _collect(self, answers: dict[int, Returned | Failed], timeout_s: float) -> None:
        """Fill in the answers that come in time."""
        deadline = time.monotonic() + timeout_s
        while len(answers) < self.size:
            numbers = {rank.connection: number for number, rank in enumerate(self._ranks) if number not in answers}
            arrived = wait(numbers, max(0.0, deadline - time.monotonic()))
            if not arrived:
                return
            for connection in arrived:
                number = numbers[connection]  # type: ignore[index]
                answers[number] = self._ranks[number].receive()
                if isinstance(answers[number], Failed):
                    deadline = min(deadline, time.monotonic() + self.grace_s)

    def _hung(self, answers: Container[int], failures: dict[int, Failed], timeout_s: float) -> dict[int, Failed]:
        """Describe the ranks that gave no answer; they write their stacks to their output."""
        hung = [number for number in range(self.size) if number not in answers]
        for number in hung:
            self._ranks[number].signal(signal.SIGUSR1)
        deadline = time.monotonic() + STACK_DUMP_TIMEOUT_S
        while not all(STACK_DUMP_BEGINS in self._ranks[number].log_tail() for number in hung) and time.monotonic() < deadline:
            time.sleep(STACK_DUMP_S)
        if hung:
            time.sleep(STACK_DUMP_S)
        after = f"{self.grace_s:.0f} s after the failure of another rank" if failures else f"after {timeout_s:g} s"
        return {number: Failed("Hung", f"no answer {after}", "") for number in hung}

    def _outputs(self) -> dict[int, str]:
        return {number: rank.log_tail() for number, rank in enumerate(self._ranks)}

    def _reset_or_kill(self, all_answered: bool) -> None:
        """Let the ranks clean up while the test goes on; only when all are back, as cleaning up closes connections."""
        if not all_answered or any(rank.process.wait(0) for rank in self._ranks):
            self._kill()
            return
        try:
            for rank in self._ranks:
                rank.connection.send_bytes(RESET)
        except OSError:
            self._kill()

    def _kill(self) -> None:
        for rank in self._ranks:
            rank.kill()
        self._ranks = []
        self._store = None


def _says_ready(connection: Connection) -> bool:
    try:
        return connection.recv_bytes() == READY
    except (EOFError, OSError):
        return False


def _title(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    arguments = [reprlib.repr(value) for value in args] + [f"{k}={reprlib.repr(v)}" for k, v in kwargs.items()]
    return f"{function.__module__}.{function.__qualname__}({', '.join(arguments)})"
