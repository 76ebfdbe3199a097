"""Tests that not every machine can run, by their markers: they are skipped with the reason."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile

import pytest

from benchmarks import hosts

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


# By marker; registered in setup.cfg.
NEEDS = {"fp16": missing_fp16, "root": missing_root, "two_hosts": hosts.missing, "slurm": missing_slurm}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The cases of fp16 are named so."""
    for item in items:
        if "fp16" in item.name.partition("[")[2]:
            item.add_marker("fp16")


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
