"""What of DeepSpeed is refused by name, by `initialize` and by `ds-optforge check`, before anything is built.

That other features change nothing is in tests/distributed/test_features.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest

import ds_optforge
from ds_optforge.cli import main
from ds_optforge.config.refused import REFUSALS
from tests import models
from tests.compatibility import OFFLOAD

CPU = {"device": "cpu"}
MUON = {"type": "OptForge", "params": {"name": "muon"}}


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **settings}}


def case(row: str, stages: tuple[int | str, ...], sections: dict[str, Any], path: str, identity: str = "") -> Any:
    """A configuration that is refused at ``path``, for cells of docs/compatibility.md."""
    mark = pytest.mark.compatibility(row, stages=stages, verdict="refused")
    return pytest.param(sections, path, id=identity or path, marks=mark)


HALF_MASTERS = {"fp16": {"fp16_master_weights_and_grads": True}}
ALL, ZERO, CUT = (0, 1, 2, 3), (1, 2, 3), (3,)
HERE = "zero_optimization.offload_optimizer"
REFUSED = [
    case("nvme", (3, OFFLOAD), zero(3, offload_optimizer={"device": "nvme"}), f"{HERE}.device"),
    case("nvme", CUT, zero(3, offload_param={"device": "nvme"}), "zero_optimization.offload_param.device"),
    case("ratio", (OFFLOAD,), zero(3, offload_optimizer={**CPU, "ratio": 0.5}), f"{HERE}.ratio"),
    case("super_offload", (OFFLOAD,), zero(3, offload_optimizer={**CPU, "super_offload": True}), f"{HERE}.super_offload"),
    case("zenflow", ZERO, zero(2, offload_optimizer=CPU, zenflow={"topk_ratio": 0.1}), "zero_optimization.zenflow"),
    case("legacy", (1,), zero(1, legacy_stage1=True), "zero_optimization.legacy_stage1"),
    case("legacy", ZERO, zero(2, elastic_checkpoint=True), "zero_optimization.elastic_checkpoint"),
    case("load_universal", ALL, {"checkpoint": {"load_universal": True}}, "checkpoint.load_universal"),
    case("mics", CUT, zero(3, mics_shard_size=2), "zero_optimization.mics_shard_size"),
    case("zeropp", CUT, zero(3, zero_quantized_weights=True), "zero_optimization.zero_quantized_weights"),
    case("zeropp", CUT, zero(3, zero_quantized_gradients=True), "zero_optimization.zero_quantized_gradients"),
    case(
        "zeropp",
        CUT,
        zero(3, zero_quantized_nontrainable_weights=True),
        "zero_optimization.zero_quantized_nontrainable_weights",
    ),
    case("low_masters", ZERO, {"bf16": {"bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads"),
    case(
        "low_masters",
        ZERO,
        {"fp16": {"fp16_master_weights_and_grads": True}},
        "fp16.fp16_master_weights_and_grads",
        "half masters",
    ),
    case("deepcompile", ALL, {"compile": {"deepcompile": True}}, "compile.deepcompile"),
    case("hybrid_engine", ALL, {"hybrid_engine": {"enabled": True}}, "hybrid_engine.enabled"),
    case("mesh", ALL, {"sequence_parallel_size": 2, "data_parallel_size": 2}, "data_parallel_size"),
    case(
        "autoep_one",
        ALL,
        {"expert_parallel": {"enabled": True, "autoep_size": 1}, "tensor_parallel": {"autotp_size": 2}},
        "expert_parallel.autoep_size",
    ),
    case("scaled", (2, 3), {"prescale_gradients": True, **zero(2)}, "prescale_gradients"),
    case("scaled", (2, 3), {"gradient_predivide_factor": 2.0, **zero(3)}, "gradient_predivide_factor"),
    case(
        "scaled_3",
        CUT,
        {"gradient_predivide_factor": 2.0, **zero(3, reduce_scatter=False)},
        "gradient_predivide_factor",
        "predivide without prescale",
    ),
]


@pytest.mark.parametrize(("sections", "path"), REFUSED)
def test_it_is_named_before_anything_is_built(
    sections: dict[str, Any], path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"train_batch_size": 8, "optimizer": MUON, **sections}
    model = models.build()
    with pytest.raises(ds_optforge.ConfigError, match=f"^{path}: got .*; allowed: "):
        ds_optforge.initialize(model=model, config=config)
    assert not hasattr(model.lm_head.weight, "optforge_name")
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config))
    assert main(["check", str(file)]) == 2
    assert f"{path}: got " in capsys.readouterr().err


def test_every_setting_that_is_refused_has_a_case() -> None:
    assert {refusal.path for refusal in REFUSALS} <= {param.values[1] for param in REFUSED}


def test_a_mesh_is_refused_as_an_argument_too() -> None:
    config = {"train_batch_size": 8, "optimizer": MUON}
    with pytest.raises(ds_optforge.ConfigError, match=r"^mesh_param: got \(1, 2\); allowed: mpu="):
        ds_optforge.initialize(model=models.build(), config=config, mesh_param=(1, 2))


@pytest.mark.parametrize(
    "sections",
    [
        zero(3, zero_quantized_weights=False, zero_hpz_partition_size=2, offload_param=CPU),
        {"compile": {"deepcompile": False}, "hybrid_engine": {"enabled": False}},
        {"prescale_gradients": True, **zero(3, reduce_scatter=False)},
        {"gradient_predivide_factor": 2.0, **zero(1)},
        {"sequence_parallel_size": 2},
        {"expert_parallel": {"enabled": True, "autoep_size": 1}, "tensor_parallel": {"autotp_size": 1}},
        {"expert_parallel": {"enabled": True, "autoep_size": 2}, "tensor_parallel": {"autotp_size": 2}},
    ],
)
def test_its_neighbours_are_not(sections: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"train_batch_size": 8, "optimizer": MUON, **sections}))
    assert main(["check", str(file)]) == 0
