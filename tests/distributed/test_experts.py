"""AutoEP: DeepSpeed replaces a model's experts and shares them out over ranks; each of them is a matrix to the optimizer."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ds_optforge import CheckpointError
from ds_optforge.checkpoint.convert import convert
from tests.compatibility import OFFLOAD
from tests.distributed import cases, experts, tensor_parallel
from tests.distributed.conftest import Pools
from tests.distributed.pool import Pool
from tests.oracles import EXACT

STEPS = 5
TOLERANCE = 1e-5  # as in test_parity.py; torch.optim.AdamW comes to 4e-6 here
MUON = {**cases.MUON, **EXACT}
NORMUON = {**MUON, "name": "normuon"}
HYPERBALL = {"name": "muon_hyperball", "lr": 0.02, "adamw": MUON["adamw"], **EXACT}
MUOWN = {**MUON, "name": "muown", "eps": 1e-5}
# What an owner keeps; eps as in `RuleSettings.steady`.
SOAP = {**MUON, "name": "soap_muon", "eps": 100.0}
RULES = {"muon": MUON, "normuon": NORMUON, "muon_hyperball": HYPERBALL, "muown": MUOWN, "soap_muon": SOAP, "adamw": None}
TENSOR = {
    "autotp_size": 2,
    "partition_config": {
        "use_default_specs": False,
        "layer_specs": [
            {"patterns": [r".*\.(gate_proj|up_proj)\.weight$"], "partition_type": "column"},
            {"patterns": [r".*\.down_proj\.weight$"], "partition_type": "row"},
        ],
    },
}


@cache
def expected(name: str) -> dict[str, Tensor]:
    """In plain PyTorch, with the model as transformers has it."""
    return experts.one_process(RULES[name], STEPS)


def error(pool: Pool, name: str, *arguments: Any, **extra: Any) -> float:
    """The largest relative error of a parameter on any rank."""
    found = pool.run(experts.autoep, *arguments, **extra)
    return max(tensor_parallel.difference(of_rank, expected(name)) for of_rank in found)


@pytest.mark.compatibility("autoep", verdict="exact")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_experts_on_two_ranks_train_as_all_on_one(stage: int, pools: Pools, record_errors: Callable[..., None]) -> None:
    muon = error(pools[2], "muon", 2, stage, MUON, STEPS)
    adamw = error(pools[2], "adamw", 2, stage, None, STEPS)
    record_errors("autoep", stage, muon=muon, adamw=adamw)
    assert adamw < TOLERANCE
    assert muon < TOLERANCE


@pytest.mark.compatibility("autoep", verdict="exact")
@pytest.mark.parametrize(("expert_ranks", "stage"), [(1, 2), (2, 0), (2, 2), (2, 3), (4, 1), (4, 3)])
def test_on_four_ranks_an_expert_may_lie_on_several(expert_ranks: int, stage: int, pools: Pools) -> None:
    assert error(pools[4], "normuon", expert_ranks, stage, NORMUON, STEPS) < TOLERANCE


@pytest.mark.parametrize(("expert_ranks", "stage"), [(2, 2), (2, 3)])
@pytest.mark.parametrize("name", ["muon_hyperball", "muown", "soap_muon"])
def test_norms_and_factors_of_an_expert(name: str, expert_ranks: int, stage: int, pools: Pools) -> None:
    assert error(pools[4], name, expert_ranks, stage, RULES[name], STEPS) < TOLERANCE


@pytest.mark.compatibility("autoep", stages=(OFFLOAD,), verdict="exact")
def test_experts_with_the_optimizer_on_the_cpu(pools: Pools) -> None:
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert error(pools[2], "muon", 2, 2, MUON, STEPS, **offload) < TOLERANCE


@pytest.mark.compatibility("autoep", stages=(2,), verdict="exact")
@pytest.mark.parametrize("door", ["register", "listed", "function"])
def test_every_door_names_the_experts_that_deepspeed_made(door: str, pools: Pools) -> None:
    assert error(pools[2], "muon", 2, 2, MUON, STEPS, door) < TOLERANCE


def test_an_expert_is_a_matrix_of_its_own_and_a_router_of_usual_size_is_left_to_adamw(pools: Pools) -> None:
    found = pools[2].run(experts.routes, experts.autoep_config(2, 2, MUON), MUON)[0]
    layer, inner, width = "model.layers.1.mlp", experts.INNER, experts.SIZES["hidden_size"]
    for name, rows, cols in (("w1", inner, width), ("w2", width, inner), ("w3", inner, width)):
        assert found[f"{layer}.experts.{name}"] == ("muon", ((0, rows, cols), (rows * cols, rows, cols)))
    assert found[f"{layer}.router.gate.weight"] == ("adamw", ())
    assert found[f"{layer}.shared_experts.down_proj.weight"] == ("muon", ((0, width, inner),))


@pytest.mark.compatibility("autoep_tensor", verdict="exact")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_experts_beside_tensor_parallelism(stage: int, pools: Pools, record_errors: Callable[..., None]) -> None:
    muon = error(pools[4], "muon", 2, stage, MUON, STEPS, tensor_parallel=TENSOR)
    adamw = error(pools[4], "adamw", 2, stage, None, STEPS, tensor_parallel=TENSOR)
    record_errors("autoep_tensor", stage, muon=muon, adamw=adamw)
    assert adamw < TOLERANCE
    assert muon < TOLERANCE


@pytest.mark.compatibility("autoep_tensor", stages=(3,), verdict="exact")
def test_an_expert_parallel_group_across_tensor_ranks(pools: Pools) -> None:
    assert error(pools[4], "normuon", 4, 3, NORMUON, STEPS, tensor_parallel=TENSOR) < TOLERANCE


@pytest.mark.compatibility("autoep_object", stages=(0, 1, 2, 3), verdict="refused")
def test_an_optimizer_object_is_refused_before_there_is_an_engine(pools: Pools) -> None:
    for found in pools[2].run(experts.refused, experts.autoep_config(2, 2, MUON), MUON, "object"):
        assert found.startswith("expert_parallel.enabled: got true with an optimizer object")
        assert 'an "optimizer" section in the configuration, or a function' in found


@pytest.mark.parametrize("stage", [0, 3])
def test_deepspeed_initialize_with_an_optimizer_object_ends_in_the_first_step(stage: int, pools: Pools) -> None:
    """On ZeRO-1 and ZeRO-2 DeepSpeed itself ends it, when the engine is built."""
    for found in pools[2].run(experts.refused, experts.autoep_config(2, stage, MUON), MUON, "raw_object"):
        assert "mlp.experts.gate_up_proj: is not in the model any more" in found
        assert "or a function" in found


@pytest.mark.compatibility("autoep_engine_checkpoints", verdict="exact")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_engine_checkpoints_resume_to_the_bit_and_convert_refuses_them(stage: int, pools: Pools, tmp_path: Path) -> None:
    config = experts.autoep_config(2, stage, NORMUON)
    assert pools[2].run(experts.save_and_resume, config, NORMUON, str(tmp_path)) == [(True, "")] * 2
    with pytest.raises(CheckpointError, match=r"_model_states\.pt: holds (an expert|one of 2 ranks' experts)"):
        convert(tmp_path / "engine", tmp_path / "converted")
    assert {path.name for path in tmp_path.iterdir()} == {"engine", "portable"}


@pytest.mark.compatibility("autoep_checkpoints", stages=(0, 1, 2, 3), verdict="exact")
@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ((2, 1, 2), (4, 1, 3)),
        ((2, 1, 3), (4, 1, 2)),
        ((2, 2, 2), (4, 4, 3)),
        ((4, 4, 3), (2, 2, 2)),
        ((4, 2, 0), (2, 1, 3)),
        ((2, 1, 1), (4, 2, 0)),
    ],
    ids=lambda place: "{} ranks, autoep_size {}, stage {}".format(*place),
)
def test_portable_checkpoints_resume_on_other_ranks_stages_and_shares_of_experts(
    saved: tuple[int, int, int], resumed: tuple[int, int, int], pools: Pools, tmp_path: Path
) -> None:
    """NorMuon, whose row statistics of a bank are shared out with its experts."""
    ranks, share, stage = saved
    found = pools[ranks].run(experts.save_and_resume, experts.autoep_config(share, stage, NORMUON), NORMUON, str(tmp_path))
    assert found == [(True, "")] * ranks
    whole = pools[ranks].run(experts.autoep, share, stage, NORMUON, 4)[0]
    ranks, share, stage = resumed
    for after in pools[ranks].run(
        experts.resume_portable, experts.autoep_config(share, stage, NORMUON), NORMUON, str(tmp_path)
    ):
        assert tensor_parallel.difference(after, whole) < TOLERANCE


@pytest.mark.compatibility("autoep_tensor_checkpoints", stages=(0, 1, 2, 3), verdict="refused")
@pytest.mark.parametrize("stage", [0, 3])
def test_a_portable_checkpoint_of_experts_beside_tensor_parallelism_is_refused(
    stage: int, pools: Pools, tmp_path: Path
) -> None:
    """The engine's own resumes to the bit."""
    config = experts.autoep_config(2, stage, NORMUON, tensor_parallel=TENSOR)
    for same, message in pools[4].run(experts.save_and_resume, config, NORMUON, str(tmp_path)):
        assert message.startswith(
            "got experts that are shared out over ranks (ep_size > 1) beside other parallelism; allowed: "
        )
        assert same
    assert {path.name for path in tmp_path.iterdir()} == {"engine"}
