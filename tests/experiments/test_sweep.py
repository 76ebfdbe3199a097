"""`ds-optforge sweep`: phases, winners, noise, and going on after whatever happened."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_optforge.cli import main
from ds_optforge.experiments.spec import read_sweep
from tests.experiments.files import ROOT, launches, lr, phase, results, sweep, write_config
from tests.processes import wait_until_gone

SHIPPED = ROOT / "benchmarks" / "sweeps" / "muon_adamw.yaml"
CLI = [sys.executable, "-c", "import sys; from ds_optforge.cli import main; sys.exit(main())"]


def status_of(folder: Path) -> dict[str, str]:
    return {row["experiment"]: row["status"] for row in results(folder)}


def ran_with(folder: Path, name: str) -> tuple[float, float | None]:
    """The learning rate of an experiment's run, and where it began."""
    (content, *_) = [path.read_text() for path in (folder / "out" / "runs").glob(f"{name}-*/config.json")]
    config = json.loads(content)
    return config["optimizer"]["params"]["lr"], config.get("start")


@pytest.mark.promise("sweep-winner", "sweep-combined")
def test_a_phases_winner_is_the_next_phases_baseline(tmp_path: Path) -> None:
    near = {"changes": {"start": 2.0}}
    path = sweep(tmp_path, [phase("rate", A=lr(0.2), B=lr(0.3), C=lr(0.05)), phase("place", D=near), phase("more", E=lr(0.5))])
    assert main(["sweep", str(path)]) == 0
    status = status_of(tmp_path)
    assert [status[name] for name in "ABCDE"] == ["discard", "keep", "discard", "keep", "keep"]
    rows = {row["experiment"]: row for row in results(tmp_path)}
    assert "better, but not as good as B" in rows["A"]["description"]
    assert [ran_with(tmp_path, name) for name in "BDE"] == [(0.3, None), (0.3, 2.0), (0.5, 2.0)]
    assert ran_with(tmp_path, "combined-seed3") == (0.5, 2.0)  # of D and E, which came after B
    assert ran_with(tmp_path, "baseline-seed3") == (0.1, None)
    assert rows["combined"]["status"] == "keep"
    assert float(rows["combined"]["metric"]) < float(rows["baseline-again"]["metric"])


@pytest.mark.promise("sweep-combined")
def test_all_winners_are_measured_together_on_seeds_that_chose_none_of_them(tmp_path: Path) -> None:
    main(["sweep", str(sweep(tmp_path, [phase("p", A=lr(0.3))]))])
    assert [name.partition("-seed")[2][0] for name in launches(tmp_path)[-6:]] == ["3", "4", "5"] * 2


def test_results_tsv_has_a_row_for_each_experiment(tmp_path: Path) -> None:
    main(["sweep", str(sweep(tmp_path, [phase("p", A=lr(0.3, description="a\tb\nc"))]))])
    rows = results(tmp_path)
    assert list(rows[0]) == ["commit", "experiment", "metric", "memory_gb", "status", "description"]
    assert [row["experiment"] for row in rows] == ["baseline", "A", "baseline-again", "combined"]
    assert rows[1]["description"].startswith("p: a b c; -")
    assert rows[1]["memory_gb"] == "0.50"


def test_one_lucky_seed_does_not_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lucky = {"changes": {"lucky_seed": 1}}
    assert main(["sweep", str(sweep(tmp_path, [phase("p", A=lucky)]))]) == 0
    assert status_of(tmp_path) == {"baseline": "keep", "A": "discard"}
    assert "No experiment beat the baseline by more than the noise" in capsys.readouterr().out


def test_what_is_far_behind_gets_no_further_seeds(tmp_path: Path) -> None:
    main(["sweep", str(sweep(tmp_path, [phase("p", A=lr(0.01))]))])
    assert [name for name in launches(tmp_path) if name.startswith("A")] == [launches(tmp_path)[3]]
    assert "behind after 1 of 3 seeds" in results(tmp_path)[1]["description"]


@pytest.mark.promise("sweep-order")
def test_first_then_by_priority_then_as_written(tmp_path: Path) -> None:
    experiments = {"A": lr(0.2, priority="low"), "B": lr(0.2), "C": lr(0.2, priority="high"), "D": lr(0.2, first=True)}
    read = read_sweep(sweep(tmp_path, [phase("p", **experiments, E=lr(0.2, priority="high"))]))
    assert [experiment.name for experiment in read.phases[0].experiments] == ["D", "C", "E", "B", "A"]


@pytest.mark.promise("sweep-budget")
def test_crash_nan_and_time_out_are_rows_and_the_sweep_goes_on(tmp_path: Path) -> None:
    crash, hang = {"changes": {"train_batch_size": 0}}, {"changes": {"sleep": 30}}
    path = sweep(tmp_path, [phase("p", CRASH=crash, NAN=lr(1e200), HANG=hang, GOOD=lr(0.3))], timeout=8.0)
    assert main(["sweep", str(path), "--parallel", "4"]) == 0
    rows = {row["experiment"]: row for row in results(tmp_path)}
    assert [rows[name]["status"] for name in ("CRASH", "NAN", "HANG", "GOOD")] == ["crash", "crash", "crash", "keep"]
    assert "exit status 1: ZeroDivisionError" in rows["CRASH"]["description"]
    assert "diverged: " in rows["NAN"]["description"]
    assert "timed out: ended after 8 seconds" in rows["HANG"]["description"]


def held_sweep(folder: Path) -> Path:
    """The runs of B do not end before FOLDER/go is there."""
    return sweep(folder, [phase("p", A=lr(0.3)), phase("q", B={"changes": {"wait_for": str(folder / "go")}})], seeds=[0, 1])


def wait_for(folder: Path, name: str) -> None:
    deadline = time.monotonic() + 120
    while not any(launch.startswith(name) for launch in launches(folder)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def goes_on(path: Path, folder: Path) -> None:
    """A sweep that was ended in the first run of B: two runs of the baseline and two of A stay as they are."""
    assert [name[0] for name in launches(folder)] == ["b", "b", "A", "A", "B"]
    (folder / "go").touch()
    assert main(["sweep", str(path), "--parallel", "2"]) == 0
    assert sorted(name[0] for name in launches(folder)[5:]) == ["B"] * 2 + ["b"] * 2 + ["c"] * 2
    assert status_of(folder)["A"] == "keep"


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It gives the results of one that was not interrupted."""
    path = held_sweep(tmp_path)

    def interrupt() -> None:
        wait_for(tmp_path, "B")
        os.kill(os.getpid(), signal.SIGTERM)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    assert main(["sweep", str(path)]) == 130
    interrupting.join()
    assert "interrupted; the same command goes on from here" in capsys.readouterr().err
    goes_on(path, tmp_path)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "go").touch()
    main(["sweep", str(held_sweep(fresh)), "--parallel", "2"])
    assert [row["metric"] for row in results(fresh)] == [row["metric"] for row in results(tmp_path)]


def test_a_killed_sweep_goes_on_once_the_run_that_it_left_behind_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = held_sweep(tmp_path)
    process = subprocess.Popen([*CLI, "sweep", str(path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for(tmp_path, "B")
    while not (left := "".join(path.read_text() for path in tmp_path.glob("out/runs/B-*/pid"))):
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert main(["sweep", str(path)]) == 1  # two programs would write into one folder
    assert f"in use by another command or the runs of a killed one: process {left} " in capsys.readouterr().err
    os.kill(int(left), signal.SIGKILL)
    assert not wait_until_gone([int(left)])
    goes_on(path, tmp_path)


def test_a_finished_sweep_launches_nothing_and_prints_its_results_for_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sweep(tmp_path, [phase("p", A=lr(0.3), B=lr(0.05))])
    main(["sweep", str(path)])
    count = len(launches(tmp_path))
    capsys.readouterr()
    assert main(["sweep", str(path), "--json"]) == 0
    assert len(launches(tmp_path)) == count
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert "A: keep" in printed.err
    (result,) = found["phases"]
    assert [(row["experiment"], row["verdict"], len(row["runs"])) for row in result["experiments"]] == [
        ("A", "keep", 3),
        ("B", "discard", 1),
    ]
    assert found["winners"] == [{"experiment": "A", "changes": {"optimizer.params.lr": 0.3}}]
    assert [row["experiment"] for row in found["final"]] == ["baseline-again", "combined"]
    values = [run["measured"]["validation_loss"] for run in result["experiments"][0]["runs"]]
    assert result["experiments"][0]["mean"] == pytest.approx(sum(values) / 3)
    assert Path(found["report"]).is_file()


def test_a_baseline_that_crashes_is_an_error_that_says_what_to_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sweep(tmp_path, [phase("p", A=lr(0.3))])
    write_config(tmp_path, lr=0.1, train_batch_size=0)
    assert main(["sweep", str(path)]) == 1
    error = capsys.readouterr().err
    assert "the baseline crashed with seed 0: exit status 1: ZeroDivisionError" in error
    assert "log.txt, then run again with --retry" in error


def test_a_metric_that_no_run_produced_is_an_error_that_lists_those_they_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sweep(tmp_path, [phase("p", A=lr(0.3))], metric="val_bpb")
    assert main(["sweep", str(path)]) == 1
    error = capsys.readouterr().err
    assert "metric: got 'val_bpb', which baseline with seed 0 did not produce; it has: validation_loss," in error
    assert f"remove {tmp_path / 'out' / 'runs'} and run again" in error


def test_a_phase_without_a_finished_run_fails_the_sweep_at_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    crash = {"changes": {"train_batch_size": 0}}
    assert main(["sweep", str(sweep(tmp_path, [phase("broken", A=crash), phase("p", B=lr(0.3))]))]) == 1
    assert "no experiment of 'broken' finished" in capsys.readouterr().err
    assert status_of(tmp_path)["B"] == "keep"


def test_a_combination_that_is_impossible_is_a_crash_of_that_experiment(tmp_path: Path) -> None:
    """Alone each change is possible: the warm-up and the cool-down of one run are not."""
    schedule = {"type": "OptForgeSchedule", "params": {"name": "wsd", "cooldown_ratio": 0.5, "total_num_steps": 10}}
    optimizer = {"type": "OptForge", "params": {"name": "lion", "lr": 0.1}}
    both = {"optimizer.params.lr": 0.3, "scheduler.params.warmup_ratio": 0.4}
    path = sweep(
        tmp_path,
        [phase("p", A={"changes": both}), phase("q", B={"changes": {"scheduler.params.cooldown_ratio": 0.9}}, C=lr(0.2))],
    )
    write_config(tmp_path, optimizer=optimizer, scheduler=schedule)
    assert main(["sweep", str(path)]) == 0
    rows = {row["experiment"]: row for row in results(tmp_path)}
    assert (rows["A"]["status"], rows["B"]["status"]) == ("keep", "crash")
    assert "no configuration to run: scheduler.params.total_num_steps" in rows["B"]["description"]


def test_a_grid_of_one_key_runs_each_of_its_values(tmp_path: Path) -> None:
    grid = {"optimizer.params.lr": [0.1, 0.2, 0.3]}
    section = read_sweep(sweep(tmp_path, [{"name": "rates", "grid": grid}])).phases[0]
    assert [experiment.changes for experiment in section.experiments] == [
        {"optimizer.params.lr": rate} for rate in (0.1, 0.2, 0.3)
    ]


@pytest.mark.promise("sweep-grid")
def test_a_grid_runs_every_pair_and_its_best_is_the_next_baseline(tmp_path: Path) -> None:
    grid = {"optimizer.params.lr": [0.1, 0.3], "train_batch_size": [8, 16]}
    assert main(["sweep", str(sweep(tmp_path, [{"name": "pairs", "grid": grid}])), "--parallel", "2"]) == 0
    status = status_of(tmp_path)
    pairs = {f"lr={rate},train_batch_size={batch}" for rate in (0.1, 0.3) for batch in (8, 16)}
    assert pairs < status.keys()
    (winner,) = (name for name in pairs if status[name] == "keep")
    assert winner.startswith("lr=0.3")
    assert "lr \\ train_batch_size" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.promise("sweep-budget")
def test_a_budget_in_seconds_gives_slower_configurations_fewer_steps(tmp_path: Path) -> None:
    """The program says 100 tokens a second, and a step has batch x 10 of them."""
    slower = {"changes": {"train_batch_size": 16}}
    main(["sweep", str(sweep(tmp_path, [phase("p", A=slower)], steps=None, seconds=8.0))])
    steps = {}
    for record in (tmp_path / "out" / "runs").glob("*-seed0-*/record.json"):
        content = yaml.safe_load(record.read_text())
        steps[content["name"]] = content["steps"]
    assert steps == {"baseline-timing": 20, "baseline": 10, "A-timing": 20, "A": 5}


def test_dry_run_prints_the_order_and_launches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sweep(tmp_path, [phase("early", A=lr(0.3), B=lr(0.2, first=True, description="a hunch"))])
    assert main(["sweep", str(path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:5] == ["early:", "  B  medium, first  lr = 0.2  (a hunch)", "  A  medium         lr = 0.3"]
    assert not (tmp_path / "out").exists()


def test_the_page_has_the_winners_and_every_experiment(tmp_path: Path) -> None:
    main(["sweep", str(sweep(tmp_path, [phase("p", A=lr(0.3), B=lr(0.2, description="<b>a hunch"))]))])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Winners: A." in page
    assert page.count('src="data:image/png;base64,') == 2
    assert "&lt;b&gt;a hunch" in page
    assert "<b>" not in page
    assert "| 800.0 | " in page.partition("<pre>| experiment |")[2]


# The document's table: what each ID changes, in the words of the recipe.
DOCUMENT: dict[str, dict[str, Any]] = {
    **{f"W-{i}": {"warmup_ratio": value} for i, value in enumerate((0.01, 0.05, 0.1), start=1)},
    **{f"MLR-{i}": {"lr": value} for i, value in enumerate((0.02, 0.03, 0.05, 0.06, 0.08), start=1)},
    **{f"ELR-{i}": {"roles.embedding.lr": value} for i, value in enumerate((0.3, 0.45, 0.8, 0.15), start=1)},
    **{f"WDN-{i}": {"cooldown_ratio": value} for i, value in enumerate((0.3, 0.7, 0.15), start=1)},
    **{f"AB-{i}": {"adamw.betas": value} for i, value in enumerate(([0.9, 0.95], [0.9, 0.999]), start=1)},
    **{f"WD-{i}": {"weight_decay": value} for i, value in enumerate((0.1, 0.3, 0.0), start=1)},
    "ULR-1": {"roles.unembedding.lr": 0.008},
    "SLR-1": {"roles.scalar.lr": 0.3},
    "FLR-1": {"final_lr_fraction": 0.05},
}


@pytest.mark.promise("sweep-file")
def test_the_shipped_file_has_every_experiment_of_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    phases = read_sweep(SHIPPED).phases
    found = {
        experiment.name: {path.partition(".params.")[2]: value for path, value in experiment.changes.items()}
        for phase in phases
        if phase.grid is None
        for experiment in phase.experiments
    }
    assert {name: found[name] for name in DOCUMENT} == DOCUMENT
    assert set(found) - set(DOCUMENT) == {"WDS-1", "WDS-2"}  # the variants of the schedule, which have no ID there


@pytest.mark.promise("sweep-order", "sweep-grid")
def test_its_order_is_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    phases = read_sweep(SHIPPED).phases
    assert [phase.experiments[0].name for phase in phases[:6]] == ["W-2", "MLR-3", "ELR-1", "WDN-1", "WD-1", "ULR-1"]
    assert [set(phase.grid) for phase in phases if phase.grid] == [
        {"scheduler.params.warmup_ratio", "optimizer.params.lr"},
        {"scheduler.params.cooldown_ratio", "scheduler.params.final_lr_fraction"},
        {"optimizer.params.momentum", "scheduler.params.warmup_ratio"},
    ]
