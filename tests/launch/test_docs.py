"""docs/launching.md and the files in launch/."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from importlib import import_module
from pathlib import Path

import pytest

from tests.launch.commands import ROOT

TABLE_ROW = re.compile(r"^\|(?:[^|]*\|){4} `([^`]+)` \|$", re.MULTILINE)  # launcher, framework, stage, offload, command
DOCUMENTED = TABLE_ROW.findall((ROOT / "docs" / "launching.md").read_text())
MODULES = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))
EXECUTED = {command for name in MODULES for command in getattr(import_module(f"tests.launch.{name}"), "COMMANDS", {}).values()}
LAUNCH_FILES = sorted((ROOT / "launch").iterdir())
SCRIPTS = [path for path in LAUNCH_FILES if path.suffix in (".sh", ".sbatch")]


def test_the_table_is_found():
    assert len(DOCUMENTED) >= 10


@pytest.mark.parametrize("command", DOCUMENTED)
def test_every_documented_command_is_executed(command: str):
    assert command in EXECUTED, "in COMMANDS of no module of tests/launch"


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_three_lines_at_the_top_say_when_to_use_it(path: Path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#!")]
    assert all(line.startswith("# ") for line in lines[:3])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_can_read_it(path: Path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path):
    shellcheck = shutil.which("shellcheck", path=sysconfig.get_path("scripts")) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("needs shellcheck (the extra `test` brings it)")
    found = subprocess.run([shellcheck, path], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
