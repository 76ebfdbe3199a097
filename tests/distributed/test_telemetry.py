"""What a step records is the whole model's, on the same ranks and in odd layouts, and reaches DeepSpeed's monitor.

That every rule records the same numbers on every stage is in test_conformance.py.
"""

import csv
import json
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ds_optforge import build_optimizer
from ds_optforge.step.health import PATIENCE
from tests import models
from tests.distributed import cases, records
from tests.distributed.conftest import Pools
from tests.distributed.pool import RankFailure
from tests.launch.commands import on_this_machine
from tests.oracles import EXACT

STEPS = 4
DEEP = {"depth": 8}  # 11 matrices, more than the sample for the orthogonality error
MUON = {**cases.MUON, **EXACT}


def watched(params: dict[str, Any], every: int = 2) -> dict[str, Any]:
    return {**params, "telemetry": {"every": every}}


@cache
def plain() -> dict[str, Any]:
    """The record of one process without DeepSpeed."""
    model = models.build(**DEEP)
    optimizer = build_optimizer(model, watched(MUON))
    for step in range(STEPS):
        model(*models.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.telemetry


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """1e-4: as in test_parity, and a difference of two float32 weights; padding counts as state."""
    assert found["step"] == expected["step"]
    assert found["groups"].keys() == expected["groups"].keys()
    for group, numbers in expected["groups"].items():
        assert found["groups"][group] == {
            name: pytest.approx(value, rel=0.05 if name == "state_bytes" else 1e-4) for name, value in numbers.items()
        }, group


def test_offload_and_several_sub_groups(pools: Pools) -> None:
    zero = {"offload_optimizer": {"device": "cpu"}, "sub_group_size": 1500}
    config = cases.engine_config(3, watched(MUON), zero_optimization=zero)
    for found in pools[2].run(records.train, config, STEPS, DEEP):
        assert_same(found["telemetry"], plain())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_with_empty_slices_take_part(stage: int, pools: Pools) -> None:
    results = pools[4].run(records.train_one_scalar, cases.engine_config(stage, watched(MUON)), STEPS)
    groups = results[0]["telemetry"]["groups"]
    assert all(result["telemetry"]["groups"] == groups for result in results)
    assert groups["scalar.adamw"]["parameter_rms"] == pytest.approx(1.0, abs=0.05)


def test_experts_of_several_ranks_are_in_one_sum(pools: Pools) -> None:
    """Each rank two of the four, or all four on both: the numbers of all of them, on both."""
    shared, split = (pools[2].run(records.train_mixture, cases.engine_config(2, watched(MUON)), n, STEPS) for n in (1, 2))
    expected = shared[0]["telemetry"]["groups"]["matrix.muon.ep_size_1"]
    for found in split:
        assert found["telemetry"]["groups"]["matrix.muon.ep_size_2"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("mode", ["gather", "shard_local"])
@pytest.mark.parametrize("stage", [2, 3])
def test_one_all_reduce_in_a_recorded_step_and_none_in_others(stage: int, mode: str, pools: Pools) -> None:
    params = {**MUON, "sharding": {"wire_dtype": "float32", "mode": mode}}
    off, on = (pools[2].run(records.train, cases.engine_config(stage, section), STEPS) for section in (params, watched(params)))
    for without, with_it in zip(off, on, strict=True):
        counts = zip(with_it["all_reduces"], without["all_reduces"], strict=True)
        assert [recorded - usual for recorded, usual in counts] == [0, 1, 0, 1]
        assert without["telemetry"] == {}


@pytest.mark.parametrize("stage", [2, 3])
def test_the_first_rank_warns_of_what_is_not_healthy(stage: int, pools: Pools) -> None:
    """A momentum of one direction in matrices of 24: sqrt(23 / 24) = 0.98 is far from orthogonal."""
    config = cases.engine_config(stage, watched({**MUON, "weight_decay": 0.0}, every=1))
    first, second = pools[2].run(records.train_on_one_token, config, PATIENCE + 2)
    assert sorted(message.partition(" is ")[0] for message in first) == [
        "matrix.muon: orthogonality_error",
        "matrix.muon: update_rms",
    ]
    assert second == []


def test_ranks_that_disagree_on_it_are_told(pools: Pools) -> None:
    with pytest.raises(RankFailure) as failure:
        pools[2].run(records.train_with_own_interval, cases.engine_config(2, watched(MUON)))
    assert failure.value.types == {0: "LayoutError", 1: "LayoutError"}
    assert "every=2" in failure.value.messages[0]
    assert "every=3" in failure.value.messages[0]


def test_train_writes_metrics_and_the_monitors_files(tmp_path: Path) -> None:
    config = cases.engine_config(
        2, watched(MUON), csv_monitor={"enabled": True, "output_path": str(tmp_path), "job_name": "csv"}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 500)
    given = {"ds_config": "config.json", "data": "text.txt", "out": "out"}
    paths = " ".join(f"--{option} {shlex.quote(str(tmp_path / name))}" for option, name in given.items())
    finished = on_this_machine(f"python train.py --steps {STEPS} --sequence-length 16 {paths}")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "telemetry" in row] == [2, 4]
    with (tmp_path / "csv" / "OptForge_matrix.muon_update_rms.csv").open() as file:
        header, *written = csv.reader(file)
    assert header == ["step", "update_rms"]
    assert [(int(step), float(value)) for step, value in written] == [
        (row["step"], pytest.approx(row["telemetry"]["matrix.muon"]["update_rms"])) for row in rows if "telemetry" in row
    ]
