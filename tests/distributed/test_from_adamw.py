"""From a run with AdamW: its engine checkpoint is converted, and OptForge goes on with weights, moments and position."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_optforge import CheckpointError
from ds_optforge.checkpoint.convert import convert
from tests.distributed import cases, checkpoints
from tests.distributed.checkpoints import ADAMW, HALF
from tests.distributed.conftest import Pools
from tests.distributed.test_checkpoint import ENGINES
from tests.distributed.test_convert import ODD, buffers_of
from tests.oracles import relative_error

BASE: dict[str, Any] = {"train_batch_size": 8, "gradient_clipping": 0.0, "zero_force_ds_cpu_optimizer": False}
SAME = {"name": "adamw", **ADAMW, "betas": list(ADAMW["betas"])}
MUON = {"name": "muon", "lr": 0.005, "adamw": {key: SAME[key] for key in ("lr", "betas", "eps", "weight_decay")}}
MOMENTS = ("exp_avg", "exp_avg_sq")
ROUNDING = 2e-6  # of float32, over five steps


def of_adamw(stage: int, **extra: Any) -> dict[str, Any]:
    return {**BASE, "zero_optimization": {"stage": stage}, **extra}


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_and_both_moments_are_converted(engine: str, pools: Pools, tmp_path: Path) -> None:
    """Of every parameter, from whatever wrapper DeepSpeed puts around AdamW, with odd shapes, tied and frozen weights."""
    config = {**BASE, **ENGINES[engine]}
    sharded = config["zero_optimization"]["stage"] > 0
    options = ODD
    how = "groups" if sharded else "all"
    saved = pools[2].run(checkpoints.run_adamw, config, str(tmp_path / "theirs"), how, **options)[0]["saved"]
    convert(tmp_path / "theirs", tmp_path / "ours")
    tensors = checkpoints.logical_tensors(tmp_path / "ours")
    low = next((dtype for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)) if key in config), torch.float32)
    for name, weight in saved.items():
        assert torch.equal(tensors[f"model/{name}"].view(weight.shape).to(low).float(), weight), name
        frozen = name == "blocks.0.weight"
        assert buffers_of(name, tensors) == (set() if frozen else set(MOMENTS)), name
    manifest = checkpoints.Checkpoint(tmp_path / "ours").manifest
    assert {group["step"] for group in manifest["groups"].values()} == {HALF}


@pytest.mark.parametrize("how", ["all", "named", "section"])
def test_masters_of_bf16_without_zero_are_converted(how: str, pools: Pools, tmp_path: Path) -> None:
    """A float32 copy of each parameter, or (FusedAdam) of the whole group in one tensor."""
    config = {**of_adamw(0), "bf16": {"enabled": True}}
    if how == "section":
        config["optimizer"] = {"type": "AdamW", "params": ADAMW}
    theirs = pools[2].run(checkpoints.run_adamw, config, str(tmp_path / "theirs"), how, tied=True)[0]
    convert(tmp_path / "theirs", tmp_path / "ours")
    tensors = checkpoints.logical_tensors(tmp_path / "ours")
    for name, weight in theirs["saved"].items():
        found = tensors[f"model/{name}"].view(weight.shape)
        assert found.dtype == torch.float32
        assert torch.equal(found.bfloat16().float(), weight), name
        assert not torch.equal(found, weight), name
        assert buffers_of(name, tensors) == set(MOMENTS), name
    ours = cases.engine_config(0, SAME, bf16={"enabled": True})
    found = pools[2].run(checkpoints.go_on_from_adamw, ours, str(tmp_path / "ours"), tied=True)[0]
    assert found["losses"] == pytest.approx(theirs["losses"], rel=1e-2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_all_adamw_run_goes_on_as_adamw_would_have(stage: int, pools: Pools, tmp_path: Path) -> None:
    how = "groups" if stage else "named"
    theirs = pools[2].run(checkpoints.run_adamw, of_adamw(stage), str(tmp_path / "theirs"), how)[0]
    convert(tmp_path / "theirs", tmp_path / "ours")
    ours = pools[2].run(checkpoints.go_on_from_adamw, cases.engine_config(stage, SAME), str(tmp_path / "ours"))[0]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=ROUNDING)
    assert_close(ours["last"], theirs["last"])


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], names: set[str] | None = None) -> None:
    for name in names or expected.keys():
        assert relative_error(found[name], expected[name]) < ROUNDING, name


@pytest.mark.parametrize(("saved", "resumed"), [(2, 2), (3, 3), (3, 2)])
def test_muon_takes_over_from_adamw(saved: int, resumed: int, pools: Pools, tmp_path: Path) -> None:
    """Matrices begin with their first moment as momentum; everything else steps as AdamW would have stepped it."""
    theirs = pools[2].run(checkpoints.run_adamw, of_adamw(saved), str(tmp_path / "theirs"))[0]
    convert(tmp_path / "theirs", tmp_path / "ours")
    config, copy = cases.engine_config(resumed, MUON), tmp_path / "copy"
    ours = pools[2].run(checkpoints.go_on_from_adamw, config, str(tmp_path / "ours"), str(copy))[0]
    converted, loaded = checkpoints.logical_tensors(tmp_path / "ours"), checkpoints.logical_tensors(copy)
    groups = checkpoints.Checkpoint(copy).manifest["groups"]
    assert {group["step"] for group in groups.values()} == {HALF}
    assert {"matrix.muon", "embedding.adamw"} < groups.keys()
    for group in groups.values():
        taken = {"momentum_buffer": "exp_avg"} if group["rule"] == "muon" else {key: key for key in MOMENTS}
        for name in group["members"]:
            assert buffers_of(name, loaded) == set(taken)
            assert torch.equal(loaded[f"model/{name}"], converted[f"model/{name}"])
            for own, source in taken.items():
                assert torch.equal(loaded[f"optimizer/{name}/{own}"], converted[f"optimizer/{name}/{source}"]), name
    assert_close(ours["after"], theirs["after"], {n for g in groups.values() if g["rule"] == "adamw" for n in g["members"]})
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], rel=ROUNDING)
    assert all(abs(mine - his) < 0.2 for mine, his in zip(ours["losses"], theirs["losses"], strict=True))


# ---------------------------------------------------------------------------------------- DeepSpeed's optimizers and schedulers

THEIRS: dict[str, dict[str, Any]] = {
    "torch_adam": {"type": "AdamW", "params": {**ADAMW, "torch_adam": True}},
    "Adam": {"type": "Adam", "params": {**ADAMW, "torch_adam": True}},
    "FusedAdam": {"type": "AdamW", "params": ADAMW},
    "CPUAdam": {"type": "AdamW", "params": ADAMW},
}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 3e-3, "warmup_num_steps": 20}}
OURS = {"type": "OptForgeSchedule", "params": {"name": "cosine", "warmup_num_steps": 20, "total_num_steps": 40}}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "optimizer",
    ["torch_adam", "Adam", "FusedAdam", pytest.param("CPUAdam", marks=pytest.mark.slow)],  # the last compiles it
)
def test_deepspeeds_own_adams_and_their_place_on_the_schedule(optimizer: str, stage: int, pools: Pools, tmp_path: Path) -> None:
    """The sixth step of a linear warm-up over twenty has the rate 6 / 20."""
    config = {**of_adamw(stage), "optimizer": THEIRS[optimizer], "scheduler": WARMUP}
    if optimizer == "CPUAdam":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    theirs = pools[2].run(checkpoints.run_adamw, config, str(tmp_path / "theirs"), "section", timeout_s=300.0)[0]
    convert(tmp_path / "theirs", tmp_path / "ours")
    ours = cases.engine_config(stage, SAME, scheduler=OURS)
    found = pools[2].run(checkpoints.go_on_from_adamw, ours, str(tmp_path / "ours"))[0]
    assert found["rates"] == pytest.approx([3e-3 * (HALF + 1) / 20] * 4)
    assert found["losses"][0] == pytest.approx(theirs["losses"][0], rel=ROUNDING)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_call_says_what_to_do_with_such_a_checkpoint(stage: int, pools: Pools, tmp_path: Path) -> None:
    """Of the scheduler's state and, where that is left out, of the optimizer's; the second way out works."""
    config = {**of_adamw(stage), "optimizer": THEIRS["torch_adam"], "scheduler": WARMUP}
    pools[2].run(checkpoints.run_adamw, config, str(tmp_path), "section")
    ours = cases.engine_config(stage, MUON, scheduler=OURS)
    messages = [
        pools[2].run(checkpoints.refused_by_the_engine, ours, str(tmp_path), **options)[0]
        for options in (
            {},
            {"load_lr_scheduler_states": False},
            {"load_optimizer_states": False, "load_lr_scheduler_states": False},
        )
    ]
    assert "the checkpoint holds ['last_batch_iteration'], the state of another scheduler" in messages[0]
    if stage == 2:  # DeepSpeed itself compares the number of groups there
        assert "parameter-alignment layout does not match" in messages.pop(1)
    else:
        assert "the checkpoint holds 1 parameter groups of another optimizer" in messages[1]
    for message in messages[:-1]:
        assert "'ds-optforge convert FOLDER --out OUT', then ds_optforge.load_checkpoint(engine, OUT)" in message
        assert "load_optimizer_states=False, load_lr_scheduler_states=False" in message
    assert messages[-1] == ""


def test_torchs_scheduler_goes_on_for_other_groups(pools: Pools, tmp_path: Path) -> None:
    """As the Trainer's: two groups before, four after, each with a rate of its own."""
    pools[2].run(checkpoints.run_adamw, of_adamw(2), str(tmp_path / "theirs"), "ramp")
    convert(tmp_path / "theirs", tmp_path / "ours")
    rates = pools[2].run(checkpoints.rates_from_adamw, cases.engine_config(2, MUON), str(tmp_path / "ours"))[0]
    for step, found in enumerate(rates, HALF):
        assert sorted(found) == pytest.approx([rate * (step + 1) / 20 for rate in (0.003, 0.003, 0.003, 0.005)])


# ---------------------------------------------------------------------------------------- refused


def test_groups_without_names_are_refused_on_stage_0(pools: Pools, tmp_path: Path) -> None:
    pools[2].run(checkpoints.run_adamw, of_adamw(0), str(tmp_path / "theirs"), "groups")
    with pytest.raises(CheckpointError, match=r"does not name its \d+ parameters in 2 groups.*allowed: one group of all"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_what_only_one_run_trains_is_named(pools: Pools, tmp_path: Path) -> None:
    pools[2].run(checkpoints.run_adamw, of_adamw(2), str(tmp_path / "theirs"), frozen=True)
    convert(tmp_path / "theirs", tmp_path / "ours")
    for message, unchanged in pools[2].run(checkpoints.refused, cases.engine_config(2, MUON), str(tmp_path / "ours")):
        assert "trained parameters: got [], which this run does not train, and not [blocks.0.weight]" in message
        assert unchanged


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"type": "AdamW", "params": {**ADAMW, "torch_adam": True, "amsgrad": True}}, "an Adam with amsgrad"),
        ({"type": "NAdam", "params": {"lr": 1e-3}}, "was saved by NAdam"),
    ],
)
def test_other_optimizers_are_refused_by_name(optimizer: Any, message: str, pools: Pools, tmp_path: Path) -> None:
    config = {**of_adamw(2), "optimizer": optimizer, "zero_allow_untested_optimizer": True}
    pools[2].run(checkpoints.run_adamw, config, str(tmp_path / "theirs"), "section")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "theirs", tmp_path / "ours")
