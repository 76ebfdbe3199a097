"""The ``ds-optforge`` command: what it prints and how it exits."""

import json
from pathlib import Path
from typing import Any

import pytest

from ds_optforge.cli import main
from tests.oracles import table_rows

CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
SHIPPED = sorted(path.name for path in CONFIGS.glob("*.json"))
RULES = {"adamw_zero2.json": "adamw", "muon_zero1.json": "muon", "muon_zero2.json": "muon", "muon_zero3.json": "muon"}
MUON = {"type": "OptForge", "params": {"name": "muon", "lr": 0.02, "adamw": {"lr": 0.001}}}


def write(folder: Path, config: Any) -> str:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


@pytest.mark.parametrize("name", SHIPPED)
def test_check_accepts_the_shipped_configurations(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """checklist 25"""
    status = main(["check", str(CONFIGS / name)])
    output = capsys.readouterr()
    assert output.err == ""
    assert output.out == f"{CONFIGS / name}: valid\n"
    assert status == 0


@pytest.mark.parametrize("model", ["tiny", "gpt2"])
@pytest.mark.parametrize("name", RULES)
def test_explain_prints_the_routing_of_the_shipped_configurations(
    name: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "--config", str(CONFIGS / name), "--model", model]) == 0
    rows = table_rows(capsys.readouterr().out)
    assert rows["blocks.0.mlp.up.weight"][1:3] == ["matrix", RULES[name]]
    assert rows["token_embedding.weight"][1:3] == ["embedding", "adamw"]
    assert rows["lm_head.weight"][1:3] == ["unembedding", "adamw"]
    assert rows["final_norm.weight"][1:3] == ["scalar", "adamw"]


def test_explain_counts_parameters_by_rule(capsys: pytest.CaptureFixture[str]) -> None:
    """checklist 9; a width of 128: 4 layers of 4 projections and 2 in the MLP are Muon's."""
    main(["explain", "--config", str(CONFIGS / "muon_zero2.json"), "--model", "tiny"])
    assert f"muon: {4 * 12 * 128 * 128:,} params" in capsys.readouterr().out


BAD = {
    "not JSON": ("{", "not JSON"),
    "no object": ([1], "got a list; allowed: a JSON object"),
    "no optimizer": ({}, "optimizer: missing"),
    "another optimizer": ({"optimizer": {"type": "AdamW"}}, "optimizer.type: got 'AdamW'; allowed: 'OptForge'"),
    "a bad value": (
        {"optimizer": {"type": "OptForge", "params": {"name": "muon", "lr": "x"}}},
        "optimizer.params.lr: got 'x' (str); allowed: a valid number",
    ),
}


@pytest.mark.parametrize("command", [["check"], ["explain", "--config"]], ids=["check", "explain"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_with_its_problem(
    case: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, said = BAD[case]
    if command[0] == "explain" and case == "no optimizer":
        said = "optimizer.params.name: missing"  # explain also takes the "params" alone
    path = write(tmp_path, config)
    status = main([*command, path])
    output = capsys.readouterr()
    assert status == 2
    assert output.out == ""
    assert output.err.startswith(f"{path}:\n")
    assert said in output.err


@pytest.mark.parametrize("command", [["check"], ["explain", "--config"]], ids=["check", "explain"])
def test_a_file_that_is_not_there(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, str(tmp_path / "none.json")]) == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay"])
def test_check_accepts_the_autos_that_the_hugging_face_trainer_fills(key: str, tmp_path: Path) -> None:
    params = {"name": "adamw", key: "auto"}
    schedule = {"name": "linear", "total_num_steps": "auto", "warmup_num_steps": "auto"}
    config = {
        "optimizer": {"type": "OptForge", "params": params},
        "scheduler": {"type": "OptForgeSchedule", "params": schedule},
    }
    assert main(["check", write(tmp_path, config)]) == 0


def test_check_refuses_an_auto_that_nobody_fills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = {"name": "muon", "lr": "auto", "adamw": {"lr": "auto"}}
    assert main(["check", write(tmp_path, {"optimizer": {"type": "OptForge", "params": params}})]) == 2
    said = capsys.readouterr().err
    assert 'optimizer.params.adamw.lr: got "auto"' in said
    assert "optimizer.params.lr:" not in said


@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle"])
def test_check_refuses_a_scheduler_that_flattens_different_rates(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, {"optimizer": MUON, "scheduler": {"type": kind, "params": {}}})
    assert main(["check", path]) == 2
    said = capsys.readouterr().err
    assert f"scheduler.type: got '{kind}'" in said
    assert "allowed: 'OptForgeSchedule'" in said
    assert "matrix 0.02" in said
    assert "embedding 0.001" in said


@pytest.mark.parametrize("arguments", [[], ["train"], ["explain"], ["explain", "--config", "x", "--model", "huge"], ["check"]])
def test_wrong_usage_exits_with_2_and_shows_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage: ds-optforge" in capsys.readouterr().err
