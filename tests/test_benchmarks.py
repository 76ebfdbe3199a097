"""The benchmarks of a step run from end to end in their quick form, and count what they say they count. No times."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from ds_optforge.rules import rule_names, rule_settings
from tests.launch.commands import on_this_machine

TORCHRUN = "torchrun --nproc-per-node 2"
PNG = b"\x89PNG\r\n\x1a\n"


def run(launcher: str, name: str, out: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """Run ``benchmarks/NAME.py --quick``. Returns its rows by (stage, optimizer)."""
    finished = on_this_machine(f"{launcher} benchmarks/{name}.py --quick --out {shlex.quote(str(out))}")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    written = json.loads((out / f"{name}.json").read_text())
    assert written["machine"] in finished.stdout
    assert set(written["versions"]) == {"torch", "deepspeed", "ds_optforge"}
    assert (out / f"{name}.png").read_bytes().startswith(PNG)
    return {(row["stage"], row["optimizer"]): row for row in written["rows"]}


def test_step(tmp_path: Path) -> None:
    rows = run(TORCHRUN, "step", tmp_path)
    assert [optimizer for _, optimizer in rows] == [
        "AdamW",
        "AdamW of torch",
        "gather",
        "shard_local",
        "built-in, standard",
        "built-in, gram",
    ]
    assert all(row["rounds"] > 0 and row["iteration_ms"] > 0 for row in rows.values())
    assert rows[2, "gather"]["products_ms"] > 0


def test_memory(tmp_path: Path) -> None:
    """Elementwise rules allocate nothing; state and workspace are those of the formats and modes."""
    rows = run(TORCHRUN, "memory", tmp_path)
    adamw, gather, compact, local = (rows[3, name] for name in ("AdamW", "gather", "gather, 8-bit state", "shard_local"))
    assert adamw["workspace_mb"] == pytest.approx(0, abs=0.001)
    assert 0 < local["workspace_mb"] < gather["workspace_mb"]
    assert compact["held_mb"] < gather["held_mb"] < adamw["held_mb"]
    assert gather["at_peak"][0]["mb"] > 0


@pytest.mark.two_hosts
def test_wire(tmp_path: Path) -> None:
    """On ZeRO-3 Muon sends what the plan says, and DeepSpeed's four gathers of everything are eight times that."""
    rows = run("python", "wire", tmp_path)
    gather, local = rows[3, "gather"], rows[3, "shard_local"]
    assert gather["megabytes"] == pytest.approx(gather["plan_megabytes"], rel=0.03)
    assert gather["megabytes"] == pytest.approx(gather["floor_megabytes"], rel=0.03)
    assert local["megabytes"] == pytest.approx(0, abs=0.01 * gather["megabytes"])
    assert rows[3, "built-in, standard"]["megabytes"] > 7 * gather["megabytes"]


def test_telemetry(tmp_path: Path) -> None:
    rows = run(TORCHRUN, "telemetry", tmp_path)
    assert set(rows) == {(2, "muon"), (2, "adamw")}
    assert all(row["iteration_ms"] > 0 for row in rows.values())
    assert all(row["cpu_long_iteration_ms"] > row["cpu_iteration_ms"] for row in rows.values())


def test_qk_clip(tmp_path: Path) -> None:
    finished = on_this_machine(f"python benchmarks/qk_clip.py --quick --out {shlex.quote(str(tmp_path))}")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = json.loads((tmp_path / "qk_clip.json").read_text())["rows"]
    assert [(row["kind"], row["every"]) for row in rows] == [("clips", 1), ("clips", 10), ("watches", 1), ("watches", 10)]
    assert all(row["ratio"] > 0 for row in rows)


class TestGpu:
    """benchmarks/gpu.py, so that it works the first time."""

    def test_a_dry_run_on_the_cpu_has_every_number(self, tmp_path: Path) -> None:
        options = "--device cpu --size tiny --stages 3 --sequence 8 --accumulation 2 --steps 1"
        finished = on_this_machine(f"{TORCHRUN} benchmarks/gpu.py {options} --out {shlex.quote(str(tmp_path))}")
        assert finished.returncode == 0, finished.stdout + finished.stderr
        written = json.loads((tmp_path / "gpu.json").read_text())
        rows = {row["optimizer"]: row for row in written["rows"]}
        assert list(rows) == ["AdamW", "gather", "shard_local", "gather, normuon", "DeepSpeed's Muon", "AdamW, again"]
        for row in rows.values():
            assert row["step_ms"] > row["in_step_ms"] > 0
            assert row["tokens_per_second"] == pytest.approx(8 * 2 * 2 / row["step_ms"] * 1e3)
            assert row["launches"] > 0
        assert rows["AdamW"]["over_adamw"] == pytest.approx(-rows["AdamW, again"]["over_adamw"])
        assert rows["gather"]["planned_over_adamw"] > 0
        assert [row["optimizer"] for row in written["alone"]][1:] == ["torch.optim.Muon", "ds_optforge muon"]
        assert len(list(tmp_path.glob("gpu_*.json"))) == 6 + 3  # traces

    def test_without_a_device_it_says_so(self) -> None:
        finished = on_this_machine("CUDA_VISIBLE_DEVICES= python benchmarks/gpu.py")
        assert finished.returncode == 2
        assert "--device: got cuda, and torch" in finished.stderr
        assert "allowed: cpu, for a dry run" in finished.stderr


@pytest.mark.promise("lr-transfer")
def test_lr_transfer(tmp_path: Path) -> None:
    """Every search ends with two rates on either side of the best one."""
    finished = on_this_machine(f"python benchmarks/lr_transfer.py --quick --out {shlex.quote(str(tmp_path))}")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert (tmp_path / "lr_transfer.png").read_bytes().startswith(PNG)
    rows = json.loads((tmp_path / "lr_transfer.json").read_text())["rows"]
    assert [row["width"] for row in rows] == 4 * [16, 32]
    assert {row["scale"] for row in rows} == {"shape", "match_rms_adamw", "spectral", "none"}
    for row in rows:
        losses = list(row["losses"].values())
        assert min(losses) in losses[2:-2]
        assert row["loss"] <= min(losses)


def test_from_adamw(tmp_path: Path) -> None:
    """AdamW and what `ds-optforge init` makes of it, at the tuned rate and at the file's, fine-tune the pretrained model."""
    options = f"--quick --only finetune --parallel 2 --out {shlex.quote(str(tmp_path))}"
    finished = on_this_machine(f"python benchmarks/from_adamw.py {options}")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    written = json.loads((tmp_path / "from_adamw.json").read_text())
    (tuning,) = written["tuning"].values()
    rows = {(row["rate"], row["optimizer"]): row for row in written["rows"]}
    rates = {float(min(tuning, key=tuning.get)), 0.0003}
    assert set(rows) == {(rate, optimizer) for rate in rates for optimizer in ("adamw", "init")}
    for rate in rates:
        adamw, init = rows[rate, "adamw"]["losses"], rows[rate, "init"]
        assert init["gain"] == pytest.approx(mean(adamw) - mean(init["losses"]))
        assert init["threshold"] == pytest.approx(6.314 * abs(adamw[0] - adamw[1]) / 2**0.5)
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("finetune/runs/*/summary.json")]
    assert {each["weights"] for each in summaries} == {str(tmp_path / "pretrained" / "model.safetensors")}
    assert {each["config"]["optimizer"]["params"]["name"] for each in summaries} == {"adamw", "muon"}


def test_choosing_has_a_cost_for_every_contender(tmp_path: Path) -> None:
    """The losses are those of `ds-optforge compare`, which has its own tests."""
    finished = on_this_machine(f"python benchmarks/choosing.py --quick --only costs --out {shlex.quote(str(tmp_path))}")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = {row["rule"]: row for row in json.loads((tmp_path / "choosing.json").read_text())["costs"]}
    assert rows["adamw"]["over_adamw"] == 1.0
    assert (rows["adamw"]["sent_mb"], rows["adamw"]["tflops"]) == (0.0, 0.0)
    assert rows["aurora"]["tflops"] > rows["muon"]["tflops"] > 0
    assert {name for name in rule_names() if rule_settings(name).needs_matrix()} <= {rule.partition("+")[0] for rule in rows}
