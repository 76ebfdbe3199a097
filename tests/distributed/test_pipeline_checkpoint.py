"""Checkpoints of pipelines: they resume bit for bit, and on other numbers of stages and ranks, with or without a pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ds_optforge import CheckpointError
from ds_optforge.checkpoint.convert import convert
from ds_optforge.checkpoint.export import export
from tests.distributed import pipelines
from tests.distributed.conftest import Pools
from tests.distributed.test_convert import assert_equal
from tests.distributed.test_pipeline import RULES, TOLERANCE

BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
SCHEDULE = {
    "scheduler": {"type": "OptForgeSchedule", "params": {"name": "cosine", "total_num_steps": 8, "warmup_num_steps": 2}}
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {  # kind of model, configuration
    "stage 0": ("plain", pipelines.configuration(0, RULES["normuon"], **SCHEDULE)),
    "stage 1": ("plain", pipelines.configuration(1, RULES["normuon"], **SCHEDULE)),
    "stage 0, tied": ("tied", pipelines.configuration(0, RULES["muon"], **SCHEDULE)),
    "stage 1, tied": ("tied", pipelines.configuration(1, RULES["muon"], **SCHEDULE)),
    "stage 1, 8-bit": ("plain", pipelines.configuration(1, {**RULES["normuon"], "state_dtype": "8bit"})),
    "stage 1, 8-bit, tied": ("tied", pipelines.configuration(1, {"name": "adamw_8bit", "lr": 3e-3})),
    "BF16_Optimizer, stage 0": ("plain", pipelines.configuration(0, RULES["muon"], bf16={"enabled": True})),
    "BF16_Optimizer": ("tied", pipelines.configuration(1, RULES["muon"], **BF16)),
    "bf16": ("plain", pipelines.configuration(1, RULES["muon"], bf16={"enabled": True})),
}


@pytest.mark.promise("pipeline-checkpoint")
@pytest.mark.parametrize("run", RUNS)
def test_a_pipeline_resumes_bit_for_bit(run: str, pools: Pools, tmp_path: Path) -> None:
    """From what DeepSpeed saved, and from a portable checkpoint.

    (DeepSpeed 0.19.8 cannot load a BF16_Optimizer that it saved on stage 0, with any optimizer.)
    """
    kind, config = RUNS[run]
    expected = pools[4].run(pipelines.save, config, 2, kind, str(tmp_path))
    for how in ("portable",) if run == "BF16_Optimizer, stage 0" else ("portable", "engine"):
        for result, before in zip(
            pools[4].run(pipelines.resume, config, 2, kind, str(tmp_path / how), how), expected, strict=True
        ):
            assert result["losses"] == before["losses"]
            for name, value in before["parameters"].items():
                assert torch.equal(result["parameters"][name], value), name


@pytest.mark.promise("pipeline-checkpoint")
@pytest.mark.compatibility("pipeline_checkpoints", stages=(0, 1), verdict="exact")
@pytest.mark.parametrize("run", RUNS)
def test_a_converted_checkpoint_is_what_would_have_been_saved(run: str, pools: Pools, tmp_path: Path) -> None:
    """Bit for bit, and it can be exported."""
    kind, config = RUNS[run]
    pools[4].run(pipelines.save, config, 2, kind, str(tmp_path))
    assert_equal(tmp_path)
    export(tmp_path / "converted", tmp_path / "exported")


MISSING = {  # by file of "stage 1": what the message says
    "mp_rank_01_model_states.pt": "has 1 of 2 files mp_rank_*_model_states.pt",
    "zero_pp_rank_1_mp_rank_01_optim_states.pt": "has 1 of 2 files *_mp_rank_01_optim_states.pt",
    "layer_03-model_states.pt": "no layer_*-model_states.pt holds '3.lin.weight'",
}


def test_a_pipeline_checkpoint_without_one_of_its_files_is_refused(pools: Pools, tmp_path: Path) -> None:
    """By name, with nothing written."""
    kind, config = RUNS["stage 1"]
    pools[4].run(pipelines.save, config, 2, kind, str(tmp_path))
    for name, message in MISSING.items():
        path = tmp_path / "engine" / f"global_step{pipelines.HALF}" / name
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(CheckpointError) as error:
            convert(tmp_path / "engine", tmp_path / "converted")
        assert str(error.value) == f"{path.parent}: {message}"
        assert not (tmp_path / "converted").exists()
        path.write_bytes(content)


def test_another_rule_takes_what_it_can_on_all_stages_alike(pools: Pools, tmp_path: Path) -> None:
    """``strict=False`` from Muon to NorMuon: the matrices keep their momentum, also for a stage that has none of them."""
    one, other = (pipelines.configuration(1, RULES[rule], **SCHEDULE) for rule in ("muon", "normuon"))
    pools[3].run(pipelines.save, one, 3, "plain", str(tmp_path))
    options = {"kind": "plain", "folder": str(tmp_path / "portable"), "strict": False}
    expected = pools[1].run(pipelines.resume, other, 1, **options)[0]["losses"]
    for result in pools[3].run(pipelines.resume, other, 3, **options):
        assert result["losses"] == pytest.approx(expected, rel=TOLERANCE)


def test_a_group_starts_afresh_on_all_stages(pools: Pools, tmp_path: Path) -> None:
    """With this run's rate, also on the last stage, which has none of its matrices and so misses no state of theirs."""
    before, after = ({**RULES["muon"], "nesterov": False, "lr": lr} for lr in (0.02, 0.01))
    after["sharding"] = {**after["sharding"], "rows": 0.5}  # keeps another buffer
    pools[3].run(pipelines.save, pipelines.configuration(1, before), 3, "plain", str(tmp_path))
    options = {"kind": "plain", "folder": str(tmp_path / "portable"), "strict": False}
    for result in pools[3].run(pipelines.resume, pipelines.configuration(1, after), 3, **options):
        assert result["rates"] == [3e-3, 0.01, 3e-3, 3e-3]  # embedding, matrices, scalars, head


def test_a_layer_of_which_not_everything_is_tied_is_refused(pools: Pools, tmp_path: Path) -> None:
    """Its bias is another one on each stage, under one name."""
    config = pipelines.configuration(1, RULES["adamw"])
    message = pools[2].run(pipelines.save_untied, config, str(tmp_path))
    assert message[0] == message[1]
    assert message[0].startswith("'tied_modules.norm.bias' has other values on another stage of the pipeline")
    assert not (tmp_path / "portable").exists()
    with pytest.raises(CheckpointError, match=r"holds? .*values of 'tied_modules\.norm\.bias'"):
        convert(tmp_path / "engine", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.promise("pipeline-checkpoint")
@pytest.mark.compatibility("pipeline_checkpoints", stages=(0, 1), verdict="exact")
@pytest.mark.parametrize(
    ("kind", "saved"),
    [("plain", (4, 2)), ("tied", (3, 3)), ("tied", (2, 1)), ("plain", (2, 0))],
    ids=["2 stages of 2 ranks", "3 stages", "1 stage of 2 ranks", "no pipeline"],
)
def test_a_portable_checkpoint_resumes_on_other_stages_and_ranks(
    kind: str, saved: tuple[int, int], pools: Pools, tmp_path: Path
) -> None:
    """And without a pipeline on ZeRO-2 and 3, for a model that gives the layers the same names."""
    ranks, stages = saved
    one, none = (pipelines.configuration(stage, RULES["normuon" if kind == "plain" else "muon"]) for stage in (1, 0))
    expected = pools[ranks].run(pipelines.save, one, stages, kind, str(tmp_path))[0]["losses"]
    more = [pipelines.configuration(stage, one["optimizer"]["params"]) for stage in (2, 3)]
    for other, resumed in ((2, 2), (3, 3), (4, 2), (1, 1), (2, 0)):
        configs = [one, none, *([] if resumed else more)]
        for result in pools[other].run(pipelines.resume_each, configs, resumed, kind, str(tmp_path / "portable")):
            for found in result:
                assert found["steps"] == 2 * pipelines.HALF
                assert found["losses"] == pytest.approx(expected, rel=TOLERANCE)
