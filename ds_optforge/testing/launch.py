"""`check_rule`: starts ranks, has them run every check, and says what failed. A rank is `ds_optforge.testing.worker`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ds_optforge
from ds_optforge.testing import model as awkward
from ds_optforge.testing.engines import ROWS
from ds_optforge.testing.params import settings_of, usual
from ds_optforge.testing.suite import CHECKS

IN_RANK = "DS_OPTFORGE_TESTING_FOLDER"  # set in a rank
_GRACE_S = 10.0  # for the other ranks, once one has failed: they may have something to tell too
_POLL_S = 0.05


def check_rule(
    name: str,
    params: Mapping[str, Any] | None = None,
    ranks: int = 2,
    checks: Sequence[str] = tuple(CHECKS),
    timeout_s: float = 1800.0,
) -> None:
    """Run the checks of `ds_optforge.testing.CHECKS` on a registered rule, in ranks of its own on this machine.

    All of them take about a minute on two cores. Ranks use the devices that DeepSpeed finds (``DS_ACCELERATOR=cpu``: none),
    and share one where there are fewer. They import the module that the rule's settings are in; a script is imported too,
    under another name than ``__main__``, and a call of `check_rule` that they meet there does nothing.

    Args:
        name: of the rule.
        params: of the configuration, on top of what makes a rule's numbers comparable: float32 for products, wire and
            state, an ``eps`` of 1e-5 and a ``weight_decay`` of 0.1 where it has such settings, decay rates of at most 0.99.
        ranks: how many: 1, 2, 3, 4, 6 or 12, which share batches of 12.
        checks: names of those to run.
        timeout_s: for everything. No process is left behind.

    Raises:
        AssertionError: a line for every failure, with the rule, the check, the stage and the numbers.
        ConfigError: nothing offers the rule, or it does not take ``params``.
        ValueError: another number of ranks, or an unknown check; or the rule's settings are in no file.
    """
    if IN_RANK in os.environ:
        return
    if ranks < 1 or ROWS % ranks:
        raise ValueError(f"ranks: got {ranks}; allowed: a divisor of {ROWS}")
    if unknown := [check for check in checks if check not in CHECKS]:
        raise ValueError(f"checks: got {', '.join(unknown)}; allowed: {', '.join(CHECKS)}")
    ds_optforge.build_optimizer(awkward.build(), usual(name, params))
    job = {"rule": name, "params": dict(params or {}), **_source(name)}
    deadline = time.monotonic() + timeout_s
    failures: list[str] = []
    remaining = list(checks)
    while remaining:
        attempt = _attempt({**job, "checks": remaining}, ranks, deadline)
        failures += attempt.failures
        remaining = remaining[attempt.begun :] if attempt.begun and time.monotonic() < deadline else []
    if failures:
        raise AssertionError("\n".join(_shortened(failures)))


def _shortened(failures: Sequence[str]) -> Iterator[str]:
    """Yield the failures, of those that end with the same error in the same place the first one whole."""
    first: dict[str, str] = {}
    for failure in failures:
        where, _, traceback = failure.partition(": Traceback ")
        same = "\n".join(traceback.splitlines()[-3:])
        if traceback and same in first:
            yield f"{where}: as in {first[same]}: {same.splitlines()[-1]}"
        else:
            first.setdefault(same, where)
            yield failure


def _source(name: str) -> dict[str, str]:
    """The module that registers a rule, and its file, which a rank loads where it cannot import the module by name."""
    module = settings_of(name).__module__
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None) or ""
    if module == "__main__":
        spec = getattr(loaded, "__spec__", None)
        module = spec.name if spec else ""
    if not (module or file):
        raise ValueError(
            f"rule '{name}': its settings are in no file, where ranks could find them; allowed: a module, a script"
        )
    return {"module": module, "file": file and str(Path(file).resolve())}


@dataclass(frozen=True, slots=True)
class _Attempt:
    """How far ranks have come with their checks.

    Attributes:
        begun: how many checks they have begun.
        failures: a line, or a text, each.
    """

    begun: int
    failures: list[str]


def _attempt(job: Mapping[str, Any], ranks: int, deadline: float) -> _Attempt:
    """Run checks until all are done, or one breaks a rank; then the ranks are killed."""
    with tempfile.TemporaryDirectory(prefix="ds_optforge_testing_") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job))
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(ranks):
                processes.append(_start(folder, rank, ranks))
            statuses = _wait(processes, deadline)
        finally:
            for process in processes:
                _kill(process)
        return _outcome(job, folder, statuses)


def _start(folder: Path, rank: int, ranks: int) -> "subprocess.Popen[bytes]":
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",  # DeepSpeed looks whether they are there; the ranks meet in the folder
        "MASTER_PORT": "29500",
        "OMP_NUM_THREADS": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # the same bits every time
        "PYTHONPATH": os.pathsep.join(place or os.getcwd() for place in sys.path),
        IN_RANK: str(folder),
    }
    with (folder / f"rank{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "ds_optforge.testing.worker"],
            env=environment,
            stdin=subprocess.PIPE,  # closed with this process, however it ends; then a rank ends too
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(processes: Sequence["subprocess.Popen[bytes]"], deadline: float) -> list[int | None]:
    """Until all have ended, or one has failed and the others have had their time; None for those that have not ended."""
    until = deadline
    while True:
        statuses = [process.poll() for process in processes]
        if None not in statuses or time.monotonic() >= until:
            return statuses
        if until == deadline and any(statuses):
            until = min(deadline, time.monotonic() + _GRACE_S)
        time.sleep(_POLL_S)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End a rank and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        process.stdin.close()


def _outcome(job: Mapping[str, Any], folder: Path, statuses: Sequence[int | None]) -> _Attempt:
    """What the ranks have written."""
    told = [_told(folder / f"rank{rank}.jsonl") for rank in range(len(statuses))]
    begun = max(sum("begun" in line for line in lines) for lines in told)
    failures = [failure for line in told[0] for failure in line.get("failed", [])]
    broken = {rank: line["broken"] for rank, lines in enumerate(told) for line in lines if "broken" in line}
    for rank, status in enumerate(statuses):
        if status and rank not in broken:
            broken[rank] = f"ended with status {status}\n{_tail(folder / f'rank{rank}.log')}"
        elif status is None:
            broken[rank] = "gave no answer in time"
    where = job["checks"][begun - 1] if begun else "before any check"
    failures += [f"{job['rule']}, {where}, rank {rank}: {text}" for rank, text in sorted(broken.items())]
    return _Attempt(begun, failures)


def _told(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _tail(path: Path, lines: int = 20) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
