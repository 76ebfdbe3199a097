"""`ds-optforge compare`: the protocol, and what it leaves."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ds_optforge.cli import main
from ds_optforge.errors import ConfigError
from ds_optforge.experiments.spec import read_comparison
from tests.experiments.files import ROOT, common, launches, results, write_config, write_yaml

SHIPPED = ROOT / "benchmarks" / "compare" / "all_optimizers.yaml"


def comparison(folder: Path, contenders: dict[str, dict[str, Any]], **more: Any) -> Path:
    """A file of {name: what its configuration has, "lr" among it}."""
    runs = {
        name: {"config": write_config(folder, f"{name}.json", **{**values, "lr": 9.0}), "lr": values.get("lr", 0.1)}
        for name, values in contenders.items()
    }
    return write_yaml(folder, common(folder, runs=runs) | more)


def later_norms(folder: Path) -> list[float]:
    """Of a run of 250 steps, in its second half."""
    return [json.loads(line)["grad_norm"] for line in (folder / "metrics.jsonl").read_text().splitlines()[125:]]


@pytest.mark.promise("fair-comparison", "comparison-metrics")
def test_a_table_a_tsv_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = comparison(tmp_path, {"slow": {"lr": 0.01}, "fast": {"lr": 0.5}}, steps=250)
    assert main(["compare", str(path), "--parallel", "2"]) == 0
    rows = results(tmp_path)
    assert [(row["optimizer"], row["lr"], row["seeds"], row["status"]) for row in rows] == [
        ("fast", "0.5", "3", "keep"),
        ("slow", "0.01", "3", "keep"),
    ]
    said = {"tokens_per_second": 100.0, "peak_memory_gb": 0.5, "state_bytes_per_parameter": 4.0}  # by the program
    for row in rows:
        assert {key: float(row[key]) for key in said} == said
        norms = [norm for folder in (tmp_path / "out" / "runs").glob(f"{row['optimizer']}-*") for norm in later_norms(folder)]
        assert float(row["grad_norm"]) == pytest.approx(sum(norms) / (3 * 125), rel=1e-4)
    assert all(0 < float(row["validation_loss_standard_error"]) < float(rows[-1]["validation_loss"]) for row in rows)
    assert "validation loss" in capsys.readouterr().out


@pytest.mark.promise("comparison-metrics")
def test_time_and_traffic_stand_beside_the_loss(tmp_path: Path) -> None:
    """The program says 100 tokens a second, 10 tokens a sequence and 2.5 MB a step; a step of its batch of 8 takes 0.8 s."""
    main(["compare", str(comparison(tmp_path, {"a": {}, "b": {"lr": 0.5}}))])
    records = [json.loads(path.read_text()) for path in (tmp_path / "out" / "runs").glob("b-*/record.json")]
    seconds = sum(record["seconds"] for record in records) / 3
    row = results(tmp_path)[0]
    assert (row["optimizer"], row["step_seconds"], row["optimizer_bytes_per_step"]) == ("b", "0.8", "2.5e+06")
    assert float(row["wall_seconds"]) == pytest.approx(seconds, rel=1e-4)
    heading, _, best, _ = (tmp_path / "out" / "results.md").read_text().splitlines()
    shown = dict(zip(heading.split(" | "), best.split(" | "), strict=True))
    assert (shown["step, ms"], shown["run, s"], shown["sent, MB a step"]) == ("800.0", f"{seconds:,.1f}", "2.50")


def test_the_page_opens_without_a_server_or_a_network(tmp_path: Path) -> None:
    main(["compare", str(comparison(tmp_path, {"a": {}, "b": {"lr": 0.5}}))])
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 2
    assert not re.search(r"(src|href)=\"(?!data:)|@import|url\(|fetch|import\(", page)
    assert "//" not in re.sub(r"^//.*|base64,[^\"]*", "", page, flags=re.MULTILINE)
    assert f'<button type="button">copy</button><pre>{(tmp_path / "out" / "results.md").read_text()}</pre>' in page
    for name in ("loss_by_step.png", "loss_by_time.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.promise("steady-loss")
def test_the_steady_loss_is_the_mean_after_200_steps_or_three_warm_ups(tmp_path: Path) -> None:
    """The same steps count for all: here those of the longest warm-up."""
    schedule = {"type": "OptForgeSchedule", "params": {"name": "constant", "warmup_num_steps": 70}}
    path = comparison(tmp_path, {"a": {"scheduler": schedule}, "b": {"scheduler": schedule, "lr": 0.001}}, steps=220)
    main(["compare", str(path)])
    expected = []
    for folder in sorted((tmp_path / "out" / "runs").glob("b-*")):
        losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        expected.append(sum(losses[210:]) / 10)
    row = next(row for row in results(tmp_path) if row["optimizer"] == "b")
    assert float(row["steady_loss"]) == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_runs_too_short_for_a_steady_state_are_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", str(comparison(tmp_path, {"a": {}, "b": {"lr": 0.2}}))])
    assert "There is no steady-state loss: it begins after step 200" in capsys.readouterr().out
    assert [row["steady_loss"] for row in results(tmp_path)] == ["", ""]


@pytest.mark.promise("fair-comparison")
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"train_batch_size": 16}, "train_batch_size is 16, but 8 for 'a'"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2, but None for 'a'"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization is {'stage': 3}, but None for 'a'"),
        ({"scheduler": {"params": {"warmup_num_steps": 5}}}, "scheduler is "),
    ],
)
def test_an_unfair_comparison_is_refused_and_the_field_named(values: dict[str, Any], expected: str, tmp_path: Path) -> None:
    path = comparison(tmp_path, {"a": {}, "b": values})
    with pytest.raises(ConfigError, match=re.escape(f"runs.b: not a fair comparison: {expected}")):
        read_comparison(path)


def test_schedule_free_may_be_without_the_schedule_of_the_others(tmp_path: Path) -> None:
    """It refuses one that decays."""
    free = {"optimizer": {"type": "OptForge", "params": {"name": "schedule_free_adamw"}}}
    other = {"scheduler": {"type": "OptForgeSchedule", "params": {"name": "linear", "total_num_steps": 5}}}
    path = comparison(
        tmp_path, {"a": other, "b": {**free, "scheduler": {"type": "OptForgeSchedule", "params": {"name": "none"}}}}
    )
    assert [contender.name for contender in read_comparison(path).contenders] == ["a", "b"]


@pytest.mark.promise("fair-comparison")
def test_runs_on_another_number_of_ranks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = comparison(tmp_path, {"a": {}, "b": {"lr": 0.2}})
    main(["compare", str(path)])
    (record,) = (tmp_path / "out" / "runs").glob("b-seed1-*/record.json")
    content = json.loads(record.read_text())
    content["conditions"]["world_size"] = 4
    record.write_text(json.dumps(content))
    assert main(["compare", str(path)]) == 1
    assert f"not a fair comparison: world_size is 4 in {record.parent}, but 1 in" in capsys.readouterr().err


def test_one_that_crashes_has_its_row_and_the_others_are_compared(tmp_path: Path) -> None:
    crashing = {"a": {}, "b": {"lr": 1e200}, "c": {"lr": 0.2}}
    assert main(["compare", str(comparison(tmp_path, crashing))]) == 1
    assert [(row["optimizer"], row["status"]) for row in results(tmp_path)] == [("c", "keep"), ("a", "keep"), ("b", "crash")]


def test_when_nothing_finishes_it_says_what_to_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = comparison(tmp_path, {"a": {"lr": 1e200}, "b": {"lr": 1e201}})
    assert main(["compare", str(path)]) == 1
    assert "no configuration finished; run again with --retry\n  a: seed 0 diverged" in capsys.readouterr().err


def test_a_second_call_launches_nothing_and_a_new_contender_only_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["compare", str(comparison(tmp_path, {"a": {}, "b": {"lr": 0.2}}))])
    assert len(launches(tmp_path)) == 6
    capsys.readouterr()
    main(["compare", str(comparison(tmp_path, {"a": {}, "b": {"lr": 0.2}, "c": {"lr": 0.3}})), "--json"])
    assert [name[0] for name in launches(tmp_path)[6:]] == ["c"] * 3
    found = json.loads(capsys.readouterr().out)["results"]  # for programs, what is printed while it runs aside
    assert [each["optimizer"] for each in found] == ["c", "b", "a"]
    losses = [run["measured"]["validation_loss"] for run in found[0]["runs"]]
    assert found[0]["figures"]["validation_loss"]["mean"] == pytest.approx(sum(losses) / 3)


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = comparison(tmp_path, {"a": {}, "b": {"lr": 0.2}})
    assert main(["compare", str(path), "--parallel", "0"]) == 2
    assert main(["compare", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: cannot be read" in capsys.readouterr().err


def test_the_shipped_file_compares_every_optimizer_that_has_a_shipped_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shipped = read_comparison(SHIPPED)
    rules = [contender.config["optimizer"]["params"]["name"] for contender in shipped.contenders]
    configured = [json.loads(path.read_text())["optimizer"]["params"]["name"] for path in (ROOT / "ds_configs").glob("*.json")]
    assert set(rules) == set(configured)
    assert len(shipped.settings.seeds) >= 3
    assert shipped.settings.steps > 200
