"""The shipped files with train.py itself, shortened: fewer configurations, steps and seeds, and a small text."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_optforge.cli import main
from tests.experiments.files import ROOT, results, write_yaml

SHORT = ["--sequence-length", "16", "--data", "train.py"]


def shortened(name: str, folder: Path, **more: Any) -> Path:
    content = yaml.safe_load((ROOT / "benchmarks" / name).read_text())
    content |= {"launcher": [*content["launcher"], *SHORT], "out": str(folder / "out"), "steps": 3, "seeds": [0, 1]}
    return write_yaml(folder, content | {key: change(content[key]) for key, change in more.items()})


@pytest.mark.promise("fair-comparison", "comparison-metrics")
def test_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    two = shortened("compare/all_optimizers.yaml", tmp_path, runs=lambda runs: {name: runs[name] for name in ("muon", "lion")})
    assert main(["compare", str(two), "--parallel", "2"]) == 0
    rows = {row["optimizer"]: row for row in results(tmp_path)}
    assert rows.keys() == {"muon", "lion"}
    for row in rows.values():
        assert row["status"] == "keep"
        assert 2 < float(row["validation_loss"]) < 6
        assert float(row["validation_loss_standard_error"]) > 0
        assert all(float(row[key]) > 0 for key in ("grad_norm", "tokens_per_second", "peak_memory_gb"))
    assert float(rows["lion"]["state_bytes_per_parameter"]) == pytest.approx(4.0, rel=0.01)
    assert 4 < float(rows["muon"]["state_bytes_per_parameter"]) < 5


@pytest.mark.promise("sweep-file")
def test_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)

    def one_experiment(phases: list[Any]) -> list[Any]:
        return [{**phases[0], "experiments": {"W-2": {"changes": {"scheduler.params.warmup_ratio": 0.5}}}}]

    path = shortened("sweeps/muon_adamw.yaml", tmp_path, phases=one_experiment)
    assert main(["sweep", str(path), "--parallel", "2"]) == 0
    assert [row["experiment"] for row in results(tmp_path)][:2] == ["baseline", "W-2"]
    rates = {}
    for folder in (tmp_path / "out" / "runs").glob("*-seed0-*"):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rates[folder.name.partition("-seed")[0]] = rows[0]["learning_rate"]["matrix.muon"]
    assert rates == pytest.approx({"baseline": 0.04, "W-2": 0.02})  # two of three steps are warm-up
