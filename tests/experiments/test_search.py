"""Phases of `ds-optforge sweep` that search ranges with Optuna."""

import json
import math
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ds_optforge.cli import main
from ds_optforge.errors import ConfigError
from ds_optforge.experiments.search import Searcher
from ds_optforge.experiments.spec import RangeSection, Search, read_sweep
from tests.experiments.files import ROOT, launches, phase, results, sweep, write_config, write_yaml

RATE = "optimizer.params.lr"


def search(ranges: dict[str, Any], trials: int = 4, **more: Any) -> dict[str, Any]:
    return {"name": "rates", "search": {"trials": trials, "ranges": ranges, **more}}


def searching(folder: Path, sleep: float = 0.0) -> Path:
    """Five points from 0.02 to 0.9, two at a time; the quick program's best rate is 1, the baseline's is 0.1."""
    phases = [search({RATE: {"low": 0.02, "high": 0.9, "log": True}}, trials=5, batch=2)]
    path = sweep(folder, phases, seeds=[0, 1])
    write_config(folder, sleep=sleep)
    return path


def rates_of(folder: Path) -> dict[str, float]:
    """The learning rate of each trial, by name."""
    configs = {path.parent.name.partition("-seed")[0]: path for path in (folder / "out" / "runs").glob("trial-*/config.json")}
    return {name: json.loads(path.read_text())["optimizer"]["params"]["lr"] for name, path in configs.items()}


@pytest.mark.promise("sweep-search")
def test_the_best_point_of_a_search_is_the_next_phases_baseline(tmp_path: Path) -> None:
    path = sweep(tmp_path, [search({RATE: {"low": 0.02, "high": 0.9, "log": True}}, 5), phase("q", B={"changes": {"x": 1}})])
    assert main(["sweep", str(path)]) == 0
    rates = rates_of(tmp_path)
    assert sorted(rates) == [f"trial-{number}" for number in range(1, 6)]
    assert all(0.02 <= rate <= 0.9 for rate in rates.values())
    rows = {row["experiment"]: row for row in results(tmp_path)}
    best = max(rates, key=lambda name: rates[name])
    assert [name for name in rates if rows[name]["status"] == "keep"] == [best]
    assert rows[best]["description"].startswith(f"rates: lr = {rates[best]:g}; -")
    config = json.loads(next((tmp_path / "out" / "runs").glob("B-*/config.json")).read_text())
    assert config["optimizer"]["params"]["lr"] == rates[best]


@pytest.mark.promise("sweep-search")
def test_an_interrupted_search_goes_on_with_the_points_of_one_that_was_not(tmp_path: Path) -> None:
    """Whatever --parallel is. A step takes 30 ms, so that the run of the third point is under way when the signal comes."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "halves").mkdir()
    assert main(["sweep", str(searching(tmp_path / "whole", sleep=0.03)), "--parallel", "2"]) == 0
    path = searching(tmp_path / "halves", sleep=0.03)

    def interrupt() -> None:
        while not any(name.startswith("trial-3") for name in launches(tmp_path / "halves")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    assert main(["sweep", str(path)]) == 130
    interrupting.join()
    before = launches(tmp_path / "halves")
    assert [name.partition("-seed0")[0] for name in before[2:]] == ["trial-1", "trial-2", "trial-3"]
    assert main(["sweep", str(path), "--parallel", "2"]) == 0
    again = launches(tmp_path / "halves")[len(before) :]
    assert not any(name.startswith(("baseline-seed0", "trial-1-seed0", "trial-2-seed0")) for name in again)
    assert rates_of(tmp_path / "halves") == rates_of(tmp_path / "whole")
    assert [row["metric"] for row in results(tmp_path / "halves")] == [row["metric"] for row in results(tmp_path / "whole")]


def test_points_that_crash_are_rows_and_the_search_goes_on(tmp_path: Path) -> None:
    path = sweep(tmp_path, [search({RATE: [0.3, 1e200], "betas": [[0.9, 0.95]]}, trials=5)])
    assert main(["sweep", str(path)]) == 0
    rows = {row["experiment"]: row for row in results(tmp_path) if row["experiment"].startswith("trial")}
    assert len(rows) == 5
    assert {"keep", "crash"} <= {row["status"] for row in rows.values()}
    for name, rate in rates_of(tmp_path).items():
        assert (rows[name]["status"] == "crash") == (rate == 1e200)
        assert "betas = [0.9, 0.95]" in rows[name]["description"]


def test_the_sampler_learns_where_the_metric_is_low() -> None:
    """The metric is the distance to 0.01 in decades; a blind search has a mean of 1 on four decades with it in the middle."""
    searcher = Searcher(Search(40, 1, {"lr": RangeSection(low=1e-4, high=1.0, log=True)}), seed=0)
    distances = []
    for _ in range(40):
        (trial,) = searcher.propose(1)
        distances.append(abs(math.log10(trial.changes["lr"]) + 2))
        searcher.tell(trial.name, distances[-1])
    assert sum(distances[20:]) / 20 < 0.5


def test_whole_numbers_stay_whole() -> None:
    searcher = Searcher(Search(8, 8, {"steps": RangeSection(low=3, high=5)}), seed=0)
    found = {trial.changes["steps"] for trial in searcher.propose(8)}
    assert found <= {3, 4, 5}
    assert all(isinstance(value, int) for value in found)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {RATE: {"low": 1.0, "high": 1.0}},
            "ranges.optimizer.params.lr.high: got 1.0 with low 1.0; allowed: a number above it",
        ),
        ({RATE: {"low": 0, "high": 1.0, "log": True}}, "lr.low: got 0 with log; allowed: a number above 0"),
        ({RATE: {"low": 0.1}}, "lr.high: missing; allowed: the highest value"),
        ({RATE: []}, "lr: got an empty list; allowed: one value or more"),
        ({"optimiser.lr": [1]}, "no section 'optimiser'; did you mean 'optimizer'?"),
    ],
)
def test_a_range_that_cannot_be_searched_is_named(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        read_sweep(sweep(tmp_path, [search(given)]))
    assert "phases[0].search.ranges." in str(raised.value)
    assert said in str(raised.value)


def test_both_ends_of_a_range_are_checked_before_anything_is_launched(tmp_path: Path) -> None:
    path = sweep(tmp_path, [search({"optimizer.params.momentum": {"low": 0.5, "high": 1.5}})])
    write_config(tmp_path, optimizer={"type": "OptForge", "params": {"name": "muon", "lr": 0.1, "adamw": {"lr": 0.1}}})
    with pytest.raises(ConfigError, match=r"no configuration to run: optimizer\.params\.momentum: got 1\.5"):
        read_sweep(path)


def test_the_example_of_the_page_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    (whole,) = re.findall(r"```yaml\n(out: runs/sweeps.*?)```", page, re.DOTALL)
    (example,) = re.findall(r"```yaml\n(  - name: rates.*?)```", page, re.DOTALL)
    read = read_sweep(write_yaml(tmp_path, whole + example))
    assert [read_phase.size for read_phase in read.phases] == [2, 4, 20]


def test_without_optuna_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)  # as if it were not installed
    assert main(["sweep", str(searching(tmp_path))]) == 2
    said = capsys.readouterr().err
    assert "phases[0].search: needs Optuna, which is not installed; run: pip install 'ds-optforge[optuna]'" in said


def test_dry_run_prints_the_ranges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(searching(tmp_path)), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("5 experiments in 1 phases")
    assert lines[2:5] == ["rates:", "  5 trials, 2 at a time, of", "  optimizer.params.lr: 0.02 to 0.9, in logarithms"]
    assert main(["sweep", str(searching(tmp_path)), "--dry-run", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["phases"]
    assert found["search"]["ranges"] == {RATE: {"low": 0.02, "high": 0.9, "log": True}}
