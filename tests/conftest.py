"""What holds for all tests: one thread, the files that run beside each other, and skips with their reasons.

Tests that not every machine can run have a marker; `NEEDS` says what for.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable

import pytest

from benchmarks import hosts

# Before torch is imported. Threads that share out the products of matrices this small wait for each other, and long
# where other processes use the cores: on a busy machine, 55 seconds of processor time for what takes one thread 9.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# All that tests start inherits this. A collective wakes two threads of each rank, and as batch work none of them interrupts
# another: on two cores, half the time in the kernel.
if hasattr(os, "sched_setscheduler"):
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

SLURM_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "srun")


def missing_slurm() -> str | None:
    absent = [program for program in SLURM_PROGRAMS if shutil.which(program) is None]
    return f"needs {', '.join(absent)} (Debian: slurm-wlm)" if absent else None


@functools.cache
def missing_root() -> str | None:
    """Root in a container may mount nothing either."""
    if os.geteuid() != 0 or sys.platform != "linux":
        return "needs root on Linux, to mount a small file system"
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode != 0:
            return "needs a root that may mount a small file system"
        subprocess.run(["umount", folder], check=True)
    return None


@functools.cache
def missing_fp16() -> str | None:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    unsupported = f"DeepSpeed has no fp16 on this {accelerator.device_name()} (a CPU needs avx512_fp16)"
    return None if accelerator.is_fp16_supported() else unsupported


@functools.cache
def missing_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else f"needs a CUDA device: torch {torch.__version__} finds none here"


# By marker; registered in setup.cfg.
NEEDS = {"gpu": missing_gpu, "fp16": missing_fp16, "root": missing_root, "two_hosts": hosts.missing, "slurm": missing_slurm}


# Their tests start ranks and launches. `make quick` has only those of them that are marked for it, and all other tests.
WITH_RANKS = (
    "tests/distributed/",
    "tests/launch/",
    "tests/experiments/",
    "tests/frameworks/",
    "tests/gpu/",
    "tests/testing/",
    "tests/test_benchmarks.py",
    "tests/test_wheel.py",
)

# Folders whose files share what lasts a session: ranks, and the runs that others are compared with. They take longest,
# so with `pytest -n 2 --dist loadgroup --no-loadscope-reorder` each starts at once, in a process of its own.
SHARED = ("tests/distributed/", "tests/launch/")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Markers that follow from names and places. With pytest-xdist a file, or a folder of `SHARED`, stays in one process."""
    side_by_side = config.getoption("numprocesses", None) or hasattr(config, "workerinput")
    for item in items:
        if "fp16" in item.name.partition("[")[2]:
            item.add_marker("fp16")
        if not item.nodeid.startswith(WITH_RANKS):
            item.add_marker("quick")
        if side_by_side:
            item.add_marker(pytest.mark.xdist_group(group_of(item)))
    if side_by_side:
        items.sort(key=lambda item: group_of(item) not in SHARED)


def group_of(item: pytest.Item) -> str:
    path = item.nodeid.partition("::")[0]
    return next((folder for folder in SHARED if path.startswith(folder)), path)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, missing in NEEDS.items():
        if item.get_closest_marker(marker) and (reason := missing()):
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rich prints is asserted: no colours that the caller's environment asks for."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def record_errors(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """For docs/compatibility.md: ``record_errors(row, stage, muon=, adamw=)`` puts relative errors into the report."""

    def record(row: str, stage: int | str, *, muon: float, adamw: float) -> None:
        record_property("compatibility", json.dumps({"row": row, "stage": stage, "muon": muon, "adamw": adamw}))

    return record
