"""``ds-optforge convert``: engine checkpoints of every kind, without ranks, model or pickle; and other Muons' checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ds_optforge import CheckpointError
from ds_optforge.checkpoint.convert import convert
from ds_optforge.checkpoint.export import export
from ds_optforge.rules import rule_names
from ds_optforge.testing.params import formats_of
from tests import models
from tests.distributed import cases, checkpoints
from tests.distributed.conftest import Pools
from tests.distributed.test_checkpoint import ENGINES
from tests.distributed.test_portable import SAVED, WIDE, configuration, params_of, schedule

ODD = {"frozen": True, "tied": True, "unused": True, "shapes": True}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_converted_checkpoint_is_what_would_have_been_saved(engine: str, pools: Pools, tmp_path: Path) -> None:
    """Bit for bit, from whatever wrapper DeepSpeed puts around the optimizer."""
    config = cases.engine_config(2, cases.MUON, **schedule("muon"), **ENGINES[engine])
    pools[2].run(checkpoints.save_both, config, str(tmp_path), **ODD)
    assert_equal(tmp_path)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", rule_names())
def test_every_state_format_converts(name: str, stage: int, pools: Pools, tmp_path: Path) -> None:
    config = cases.engine_config(stage, params_of(name, formats_of(name)[-1]))
    pools[2].run(checkpoints.save_both, config, str(tmp_path), **WIDE)
    assert_equal(tmp_path)


def assert_equal(folder: Path) -> None:
    convert(folder / "engine", folder / "converted")
    converted, saved = (checkpoints.logical_tensors(folder / name) for name in ("converted", "portable"))
    assert converted.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(converted[name], tensor), name
    manifests = [checkpoints.Checkpoint(folder / name).manifest for name in ("converted", "portable")]
    for key in ("shapes", "groups", "block_cuts", "loss_scale", "scheduler", "client_state"):
        assert manifests[0][key] == manifests[1][key], key
    assert manifests[0]["counters"].items() <= manifests[1]["counters"].items()


def test_what_a_manifest_cannot_hold_of_the_client_state_is_left_out_with_a_warning(
    pools: Pools, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As Lightning's checkpoints have it: a tensor in the state of its callbacks."""
    odd = {"epoch": 3, "callbacks": {"keep": {"kth_value": torch.tensor(1.0)}}}
    pools[2].run(checkpoints.save_engine, cases.engine_config(2, cases.MUON), str(tmp_path / "engine"), odd)
    convert(tmp_path / "engine", tmp_path / "converted")
    assert checkpoints.Checkpoint(tmp_path / "converted").manifest["client_state"] == {"epoch": 3}
    (warning,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert "'callbacks' of the client_state cannot be saved: Object of type Tensor" in warning


def test_an_average_is_converted(pools: Pools, tmp_path: Path) -> None:
    config = cases.engine_config(3, {**cases.MUON, "average": {"kind": "tail", "start": 3}})
    pools[2].run(checkpoints.save_both, config, str(tmp_path), **ODD)
    assert_equal(tmp_path)
    assert "optimizer/up.weight/weight_average" in checkpoints.logical_tensors(tmp_path / "converted")


def test_a_run_goes_on_from_a_converted_checkpoint(pools: Pools, tmp_path: Path) -> None:
    config = configuration(SAVED, params_of("normuon"), **schedule("normuon"))
    expected = pools[2].run(checkpoints.run_and_save, config, str(tmp_path / "engine"), "engine")[0]
    convert(tmp_path / "engine", tmp_path / "portable")
    result = pools[2].run(checkpoints.resume, config, str(tmp_path / "portable"))[0]
    assert result["losses"] == expected["losses"]
    with pytest.raises(CheckpointError, match="portable: is a portable checkpoint already, which load_checkpoint"):
        convert(tmp_path / "portable", tmp_path / "again")


# ---------------------------------------------------------------------------------------- DeepSpeed's Muon

INCUMBENT = {
    "optimizer": {
        "type": "Muon",
        "params": {
            "lr": 0.02,
            "momentum": 0.95,
            "weight_decay": 0.0,
            "muon_lr": 0.02,
            "adam_lr": 3e-3,
            "ns_method": "standard",
        },
    }
}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("offload", [False, pytest.param(True, marks=pytest.mark.slow)])  # compiles DeepSpeed's CPU Adam
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_flat_chunk_deepspeeds_muon_goes_on_here(stage: int, offload: bool, bf16: bool, pools: Pools, tmp_path: Path) -> None:
    """Weights, momenta and Adam's moments arrive as they were, and train on, on another stage."""
    zero: dict[str, Any] = {"stage": stage, "reduce_scatter": False}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_batch_size": 8,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
        **INCUMBENT,
    }
    theirs = pools[2].run(checkpoints.run_incumbent, config, str(tmp_path / "theirs"), timeout_s=300.0)[0]
    convert(tmp_path / "theirs", tmp_path / "ours")
    tensors = checkpoints.logical_tensors(tmp_path / "ours")
    for name, weight in theirs["parameters"].items():
        found = tensors[f"model/{name}"].view(weight.shape)
        assert torch.equal(found.bfloat16().float() if bf16 else found, weight), name
        assert buffers_of(name, tensors) in ({"momentum_buffer"}, {"exp_avg", "exp_avg_sq"}), name
    for name, momentum in theirs["momenta"].items():
        error = (tensors[f"optimizer/{name}/momentum_buffer"].view(momentum.shape) - momentum).norm() / momentum.norm()
        assert error <= (2e-2 if bf16 else 1e-5), name  # gradients are rounded to bfloat16; else summed in another order
    resumed = pools[2].run(checkpoints.resume, cases.engine_config(2, cases.MUON), str(tmp_path / "ours"), strict=False)
    assert resumed[0]["losses"][-1] < theirs["losses"][0]


def buffers_of(name: str, tensors: Mapping[str, Tensor]) -> set[str]:
    prefix = f"optimizer/{name}/"
    return {key.removeprefix(prefix) for key in tensors if key.startswith(prefix)}


# ---------------------------------------------------------------------------------------- torch.optim.Muon


def torch_run(path: Path, named: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Five steps of torch.optim.Muon beside torch.optim.AdamW, saved."""
    model = models.build(tied=True)
    named_parameters = list(model.named_parameters())
    matrices = [(n, p) for n, p in named_parameters if n.startswith("blocks")]
    rest = [(n, p) for n, p in named_parameters if not n.startswith("blocks")]
    muon = torch.optim.Muon(matrices if named else [p for _, p in matrices], lr=0.02, momentum=0.95)
    adamw = torch.optim.AdamW(rest, lr=3e-3)
    for step in range(checkpoints.HALF):
        model(*models.batch(step)).backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
    torch.save({"model": model.state_dict(), "optimizer": [muon.state_dict(), adamw.state_dict()]}, path)
    return model, muon


def test_a_flat_chunk_torchs_muon_goes_on_here(pools: Pools, tmp_path: Path) -> None:
    model, muon = torch_run(tmp_path / "run.pt")
    convert(tmp_path / "run.pt", tmp_path / "ours")
    tensors = checkpoints.logical_tensors(tmp_path / "ours")
    for name, parameter in model.named_parameters():
        assert torch.equal(tensors[f"model/{name}"].view(parameter.shape), parameter)
        if name.startswith("blocks"):
            momentum = muon.state[parameter]["momentum_buffer"]
            assert torch.equal(tensors[f"optimizer/{name}/momentum_buffer"].view(parameter.shape), momentum)
    resumed = pools[2].run(checkpoints.resume, cases.engine_config(3, cases.MUON), str(tmp_path / "ours"), False, tied=True)
    assert resumed[0]["steps"] == checkpoints.HALF


def test_nameless_parameters_are_refused(tmp_path: Path) -> None:
    torch_run(tmp_path / "run.pt", named=False)
    with pytest.raises(CheckpointError, match=r"run\.pt: the optimizer does not name its 3 parameters"):
        convert(tmp_path / "run.pt", tmp_path / "ours")


# ---------------------------------------------------------------------------------------- export


@pytest.mark.promise("averaged-evaluation")
@pytest.mark.parametrize("source", ["portable", "portable engine"])
@pytest.mark.parametrize(
    ("rule", "around"),
    [
        ("schedule_free_adamw", {}),
        ("muon", {"average": {"kind": "ema", "decay": 0.8}}),
        ("muon", {"ema_nesterov": {"start": 0}}),
    ],
)
def test_weights_are_exported_in_shape_and_averaged(
    rule: str, around: dict[str, Any], source: str, pools: Pools, tmp_path: Path
) -> None:
    """Without being asked: Schedule-Free's average, that around any rule, or without a look-ahead; of either checkpoint."""
    config = configuration(SAVED, {**params_of(rule), **around})
    averages = pools[2].run(checkpoints.save_and_average, config, str(tmp_path / "portable"))[0]
    export(tmp_path / source, tmp_path / "model")
    exported = {name: t for path in (tmp_path / "model").glob("*.safetensors") for name, t in load_file(path).items()}
    assert exported.keys() == averages.keys()
    for name, weight in averages.items():
        assert torch.equal(exported[name], weight), name
    export(tmp_path / source, tmp_path / "half", torch.bfloat16)
    half = [t for path in (tmp_path / "half").glob("*.safetensors") for t in load_file(path).values()]
    assert {tensor.dtype for tensor in half} == {torch.bfloat16}


def test_no_code_in_a_file_is_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "owned",)

    (tmp_path / "engine").mkdir()
    torch.save({"optimizer": Payload()}, tmp_path / "engine" / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states\.pt: cannot be read"):
        convert(tmp_path / "engine", tmp_path / "out")
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "out").exists()


def test_a_missing_rank_is_named(pools: Pools, tmp_path: Path) -> None:
    config = configuration(SAVED, params_of("muon"))
    pools[2].run(checkpoints.run_and_save, config, str(tmp_path / "engine"), "engine")
    next((tmp_path / "engine").glob("*/*zero_pp_rank_1_*optim_states.pt")).unlink()
    with pytest.raises(CheckpointError, match=r"holds \d+ of the \d+ elements of '.*': is a file missing\?"):
        convert(tmp_path / "engine", tmp_path / "out")
