"""`ds-optforge doctor`: one report of what is installed and whether two ranks train."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

from ds_optforge.cli import main
from ds_optforge.doctor import Finding, examine, report


def found(findings: list[Finding]) -> dict[str, Finding]:
    return {each.name: each for each in findings}


def test_versions_are_those_that_are_installed() -> None:
    findings = found(examine(run=False))
    assert {name: findings[name].found for name in ("torch", "deepspeed", "pydantic")} == {
        name: version(name) for name in ("torch", "deepspeed", "pydantic")
    }
    assert findings["deepspeed"].verdict == findings["torch.distributed"].verdict == "ok"


def test_a_compiler_that_deepspeed_needs_and_does_not_find_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    findings = found(examine(run=False))
    assert findings["g++"].found == "not on the path"
    assert findings["g++"].verdict == "problem"


def test_the_report_is_a_table_to_paste() -> None:
    lines = report(
        [Finding("versions", "torch", "2.13.0", "ok"), Finding("backends", "mpirun", "not on the path")]
    ).splitlines()
    assert lines == [
        "| | | found | |",
        "| --- | --- | --- | --- |",
        "| versions | torch | 2.13.0 | ok |",
        "| backends | mpirun | not on the path | - |",
    ]


def test_json_is_all_that_is_printed() -> None:
    """DeepSpeed warns on the standard output while it is imported."""
    done = subprocess.run([sys.executable, "-m", "ds_optforge", "doctor", "--no-run", "--json"], capture_output=True, text=True)
    assert "versions" in {each["topic"] for each in json.loads(done.stdout)}


def test_two_ranks_train_and_nothing_is_a_problem_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    last = json.loads(capsys.readouterr().out)[-1]
    assert last == {
        "topic": "run",
        "name": "muon on two ranks",
        "found": "ZeRO-0 to 3 train as one process",
        "verdict": "ok",
    }
