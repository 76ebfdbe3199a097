"""A rule of another package, from its wheel: named in the JSON it runs everywhere as this package's own rules do.

Its environment is one of its own, which the tests make; the runs of "without it" are in the environment that runs them.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_optforge import CheckpointError
from ds_optforge.checkpoint.convert import convert
from ds_optforge.checkpoint.export import export
from ds_optforge.cli import main
from ds_optforge.rules import rule_names
from tests.distributed import cases, checkpoints, external, records
from tests.distributed.conftest import Pools
from tests.distributed.external import PARAMS
from tests.distributed.pool import Pool
from tests.distributed.test_parity import assert_same, one_process
from tests.launch.commands import LAUNCH_LIMIT, ROOT, environment, free_port
from tests.oracles import table_rows

RULE = "steady_muon"
STEPS = cases.STEPS
STAGES = [(0, "none"), *((stage, device) for stage in (1, 2, 3) for device in ("none", "cpu"))]
ENGINES = (0, 2, 3)  # stages, whose engine checkpoints have their state in different files


@dataclass(frozen=True)
class Installed:
    """The environment with the package, and ranks that run in it."""

    python: str
    pools: dict[int, Pool]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command of its Python, which finds ds_optforge in this repository."""
        variables = environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        return subprocess.run(
            [self.python, *command], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=LAUNCH_LIMIT
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    python = external.install(tmp_path_factory.mktemp("external"))
    pools = {size: Pool(size, tmp_path_factory.mktemp(f"external_pool{size}"), python) for size in (1, 2)}
    yield Installed(python, pools)
    for pool in pools.values():
        pool.close()


def configuration(stage: int, offload: str = "none", params: dict[str, Any] = PARAMS, **extra: Any) -> dict[str, Any]:
    return cases.engine_config(stage, params, zero_optimization={"offload_optimizer": {"device": offload}}, **extra)


# ------------------------------------------------------------------------------------------ with it


def test_the_commands_know_it_by_its_entry_point(installed: Installed, tmp_path: Path) -> None:
    """Nothing has imported it before they ask for it."""
    config = str(tmp_path / "config.json")
    Path(config).write_text(json.dumps(configuration(2)))
    program = f"""
import sys
from ds_optforge.cli import main
assert "{RULE}" not in sys.modules
statuses = [
    main(["check", {config!r}]),
    main(["explain", "--config", {config!r}, "--model", "gpt2"]),
    main(["plan", "gpt2", "--world-size", "8", "--stage", "3", "--config", {config!r}]),
]
print(statuses)
"""
    finished = installed.run("-c", program)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"{config}: valid" in finished.stdout
    assert "[0, 0, 0]" in finished.stdout
    rows = table_rows(finished.stdout)
    assert rows["layers.0-11.mlp.up.weight"][2] == RULE
    assert rows["token_embedding.weight"][2] == "adamw"
    assert "48 matrices with 84,934,656 of 124,439,808 parameters" in finished.stdout


@pytest.fixture(scope="module")
def in_one_process(installed: Installed) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Plain PyTorch."""
    (result,) = installed.pools[1].run(one_process, PARAMS, STEPS)
    losses, parameters = result
    return losses, parameters


@pytest.mark.promise("external-rule", "any-rule")
def test_the_suite_for_authors_passes(installed: Installed) -> None:
    """It starts ranks of its own, and exits with an error if any check fails."""
    finished = installed.run("-c", f"from ds_optforge.testing import check_rule\ncheck_rule({RULE!r})")
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.promise("external-rule")
@pytest.mark.parametrize(("stage", "offload"), STAGES)
def test_every_stage_equals_plain_pytorch(stage: int, offload: str, installed: Installed, in_one_process: Any) -> None:
    losses, parameters = in_one_process
    for found in installed.pools[2].run(external.train_by_json, configuration(stage, offload), STEPS):
        assert_same(found["parameters"], parameters, 1e-5)
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        assert f"matrix.{RULE}" in found["rules"]


def test_it_learns_and_is_not_muon(in_one_process: Any) -> None:
    """Else the runs above could be of anything."""
    losses, parameters = in_one_process
    assert losses[-1] < 0.9 * losses[0]
    muon = one_process({**PARAMS, "name": "muon"}, STEPS)[1]
    name = "blocks.1.weight"
    assert (parameters[name] - muon[name]).norm() > 0.01 * muon[name].norm()


def test_the_deepspeed_launcher_trains_with_it_from_the_json_alone(installed: Installed, tmp_path: Path) -> None:
    """train.py of this repository, which has never heard of it; its telemetry is in the metrics."""
    (tmp_path / "config.json").write_text(json.dumps(configuration(3, params={**PARAMS, "telemetry": {"every": 3}})))
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 500)
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", free_port()]
    options = ["--ds_config", "config.json", "--data", "text.txt", "--out", "out"]
    paths = [part if part.startswith("--") else str(tmp_path / part) for part in options]
    finished = installed.run(*launcher, "train.py", "--steps", "6", "--sequence-length", "32", *paths)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["telemetry"][f"matrix.{RULE}"]["update_rms"] > 0


@pytest.mark.parametrize("stage", [0, 3])
def test_telemetry_is_that_of_plain_pytorch(stage: int, installed: Installed) -> None:
    """1e-4: as in test_telemetry; padding counts as state."""
    params = {**PARAMS, "telemetry": {"every": 2}}
    (expected,) = installed.pools[1].run(external.telemetry_of_one_process, params, 4, {})
    numbers = expected["groups"][f"matrix.{RULE}"]
    assert numbers["update_rms"] > 0
    assert 0 < numbers["orthogonality_error"] < 1
    for found in installed.pools[2].run(records.train, configuration(stage, params=params), 4):
        assert found["telemetry"]["step"] == expected["step"] == 4
        assert found["telemetry"]["groups"][f"matrix.{RULE}"] == {
            name: pytest.approx(value, rel=0.05 if name == "state_bytes" else 1e-4) for name, value in numbers.items()
        }


@pytest.fixture(scope="module")
def saved(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A portable checkpoint of ZeRO-2 on two ranks, and what follows it."""
    folder = tmp_path_factory.mktemp("saved") / "portable"
    return folder, installed.pools[2].run(checkpoints.run_and_save, configuration(2), str(folder))[0]


@pytest.mark.parametrize(
    ("ranks", "stage", "offload"), [(2, 2, "none"), (2, 3, "cpu"), (2, 0, "none"), (1, 1, "none"), (1, 3, "none")]
)
def test_its_portable_checkpoint_goes_on_anywhere(
    ranks: int, stage: int, offload: str, installed: Installed, saved: tuple[Path, dict[str, Any]]
) -> None:
    """To tolerance; bit for bit where it was saved."""
    folder, expected = saved
    for found in installed.pools[ranks].run(checkpoints.resume, configuration(stage, offload), str(folder)):
        assert found["steps"] == checkpoints.HALF
        same = (ranks, stage, offload) == (2, 2, "none")
        assert found["losses"] == (expected["losses"] if same else pytest.approx(expected["losses"], rel=1e-5))
        assert_same(found["parameters"], expected["parameters"], 0.0 if same else 1e-5)


@pytest.fixture(scope="module")
def engine_checkpoints(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """One for each of `ENGINES`, and the runs that went on from it."""
    folder = tmp_path_factory.mktemp("engines")
    runs = [
        installed.pools[2].run(cases.save_and_load, configuration(stage), str(folder / str(number)), {})
        for number, stage in enumerate(ENGINES)
    ]
    return folder, [list(of_rank) for of_rank in zip(*runs, strict=True)]


@pytest.mark.parametrize("number", range(len(ENGINES)), ids=[f"ZeRO-{stage}" for stage in ENGINES])
def test_its_engine_checkpoint_goes_on_bit_for_bit(number: int, engine_checkpoints: tuple[Path, list[Any]]) -> None:
    for of_rank in engine_checkpoints[1]:
        uninterrupted, resumed = of_rank[number]["uninterrupted"], of_rank[number]["resumed"]
        assert resumed["losses"] == uninterrupted["losses"]
        assert_same(resumed["parameters"], uninterrupted["parameters"], 0.0)
        assert ("second_moment", "torch.float32") in resumed["state"]
        assert resumed["state"] == uninterrupted["state"]


def test_the_hugging_face_trainer_finds_it_by_the_json(installed: Installed, tmp_path: Path) -> None:
    """Its learning rate is "auto", filled from TrainingArguments."""
    trainer = pytest.importorskip("tests.distributed.test_trainer", reason="transformers is not installed (extra 'hf')")
    params = {**PARAMS, "lr": "auto", "weight_decay": "auto"}
    params["adamw"] = {"lr": 3e-3, "betas": [0.8, 0.9], "eps": 1e-5}
    filled = {**params, "lr": 0.01, "weight_decay": 0.05}
    ((losses, weights),) = installed.pools[1].run(trainer.in_plain_pytorch, filled, False)
    given = trainer.config(2, params), str(tmp_path), trainer.SETTINGS
    for found in installed.pools[2].run(trainer.frameworks.train_llama, *given):
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        assert_same(found["parameters"], weights, 1e-5)


# ------------------------------------------------------------------------------------------ without it

MUON = {**cases.MUON, "sharding": {"wire_dtype": "float32"}}


def test_this_environment_is_without_it() -> None:
    assert RULE not in rule_names()


def test_without_it_its_portable_checkpoint_is_refused_by_name(pools: Pools, saved: tuple[Path, dict[str, Any]]) -> None:
    for message, unchanged in pools[2].run(checkpoints.refused, configuration(2, params=MUON), str(saved[0])):
        assert f"parameter group 'matrix.{RULE}': was trained by the rule '{RULE}', which nothing here offers" in message
        assert "allowed: install the package of that rule, or import it (or strict=False" in message
        assert unchanged


@pytest.mark.parametrize("number", range(len(ENGINES)), ids=[f"ZeRO-{stage}" for stage in ENGINES])
def test_without_it_its_engine_checkpoint_is_refused_by_name(
    number: int, pools: Pools, engine_checkpoints: tuple[Path, list[Any]]
) -> None:
    given = configuration(ENGINES[number], params=MUON), str(engine_checkpoints[0] / str(number))
    for message, unchanged in pools[2].run(external.load_engine_checkpoint, *given):
        assert f"the checkpoint holds the state of the rule '{RULE}' (parameter group 'matrix.{RULE}')" in message
        assert "which nothing here offers; allowed: install the package of that rule, or import it" in message
        assert unchanged


def test_without_it_the_weights_load_and_the_state_starts_afresh(pools: Pools, saved: tuple[Path, dict[str, Any]]) -> None:
    """Its momentum has the name of Muon's, and is not taken for it. What AdamW had stays AdamW's."""
    tensors = checkpoints.logical_tensors(saved[0])
    assert "optimizer/blocks.1.weight/momentum_buffer" in tensors
    for found in pools[2].run(external.load_weights_alone, configuration(2, params=MUON), str(saved[0])):
        for name, parameter in found["parameters"].items():
            assert torch.equal(parameter.flatten(), tensors[f"model/{name}"]), name
        assert found["steps"] == [float(checkpoints.HALF)] * 3  # embedding, unembedding and scalar
        assert found["losses"][-1] < found["losses"][0]


def test_without_it_the_export_is_refused_by_name(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether its weights are averages, only the rule knows."""
    with pytest.raises(CheckpointError, match=rf"was trained by the rule '{RULE}', which nothing here offers, and which knows"):
        export(saved[0], tmp_path / "out")
    assert main(["export", str(saved[0]), str(tmp_path / "out")]) == 2
    assert f"was trained by the rule '{RULE}'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_it_its_engine_checkpoint_converts_and_goes_on_where_it_is(
    installed: Installed, engine_checkpoints: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    """All that conversion needs to know of the state is in the checkpoint."""
    folder, results = engine_checkpoints
    number = ENGINES.index(2)
    convert(folder / str(number), tmp_path / "converted")
    tensors = checkpoints.logical_tensors(tmp_path / "converted")
    assert {key.rpartition("/")[2] for key in tensors if "/blocks.1.weight/" in key} == {"momentum_buffer", "second_moment"}
    found = installed.pools[2].run(checkpoints.resume, configuration(2), str(tmp_path / "converted"))[0]
    assert found["losses"] == results[0][number]["uninterrupted"]["losses"]
