"""`check_rule` from scripts: it finds a rule there, survives its ranks, and leaves nothing behind."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ds_optforge import ConfigError
from ds_optforge.testing import check_rule
from tests.distributed.pool import IMPORT_ROOT

BAD_RULES = IMPORT_ROOT / "tests" / "testing" / "bad_rules.py"


def started(script: Path, folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """The script, with its temporary files in a folder of its own."""
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(IMPORT_ROOT), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(script), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ranks_of(folder: Path) -> list[psutil.Process]:
    """The ranks that run now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(folder) and "ds_optforge.testing.worker" in process.cmdline():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


SCRIPT = """
from ds_optforge.rules import register_rule
from ds_optforge.rules.lion import LionSettings
from ds_optforge.testing import check_rule


@register_rule
class MineSettings(LionSettings):
    rule = "mine"
    title = "Mine"


check_rule("mine", {"betas": [0.8, 0.9]}, ranks=3, checks=["small_buckets", "state_dict"])
print("passed")
"""


def test_a_rule_in_a_script_is_found_in_its_ranks(tmp_path: Path) -> None:
    """Which import the script, and meet the call."""
    script, folder = tmp_path / "script.py", tmp_path / "temporary"
    script.write_text(SCRIPT)
    folder.mkdir()
    process = started(script, folder)
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, output.splitlines()[-1:]) == (0, ["passed"]), errors
    assert not list(folder.glob("ds_optforge*"))


def test_a_check_that_kills_a_rank_is_told_and_the_others_are_run(tmp_path: Path) -> None:
    process = started(BAD_RULES, tmp_path, "dying", "300", "gradients_unchanged", "state_bytes")
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 1
    for check in ("gradients_unchanged", "state_bytes"):
        assert f"dying, {check}, rank 1: ended with status -9" in errors
    assert not ranks_of(tmp_path)
    assert not list(tmp_path.glob("ds_optforge*"))


def test_ranks_that_hang_end_when_the_time_is_up(tmp_path: Path) -> None:
    process = started(BAD_RULES, tmp_path, "hanging", "20", "state_bytes")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert re.search(r"hanging, .*, rank 1: gave no answer in time", errors)  # on a slow machine, before any check
    assert not ranks_of(tmp_path)
    assert not list(tmp_path.glob("ds_optforge*"))


def test_ranks_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    process = started(BAD_RULES, tmp_path, "hanging", "600", "state_bytes")
    deadline = time.monotonic() + 120
    while len(ranks_of(tmp_path)) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    process.kill()
    process.communicate()
    while ranks_of(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_what_cannot_be_run_is_refused_before_any_rank_is_started() -> None:
    with pytest.raises(ConfigError, match=r"rule: got 'nothing', which nothing registers"):
        check_rule("nothing")
    with pytest.raises(ConfigError, match=r"momentum"):
        check_rule("adamw", {"momentum": 0.9})
    with pytest.raises(ValueError, match=r"ranks: got 5; allowed: a divisor of 12"):
        check_rule("adamw", ranks=5)
    with pytest.raises(ValueError, match=r"checks: got party; allowed: gradients_unchanged, "):
        check_rule("adamw", checks=["party"])
