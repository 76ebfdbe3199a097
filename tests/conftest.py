"""Tests that not every machine can run, by their markers: they are skipped with the reason."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

from benchmarks import hosts

SLURM_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "srun")


def missing_slurm() -> str | None:
    absent = [program for program in SLURM_PROGRAMS if shutil.which(program) is None]
    return f"needs {', '.join(absent)} (Debian: slurm-wlm)" if absent else None


def missing_root() -> str | None:
    return None if os.geteuid() == 0 and sys.platform == "linux" else "needs root on Linux, to mount a small file system"


NEEDS = {"root": missing_root, "two_hosts": hosts.missing, "slurm": missing_slurm}  # registered in setup.cfg


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, missing in NEEDS.items():
        if item.get_closest_marker(marker) and (reason := missing()):
            pytest.skip(reason)
