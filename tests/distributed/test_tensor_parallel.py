"""Tensor parallelism: matrices that are cut once more than ZeRO cuts them are orthogonalized whole."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_optforge import CheckpointError
from ds_optforge.checkpoint.convert import convert
from tests.distributed import checkpoints, tensor_parallel
from tests.distributed.conftest import Pools
from tests.distributed.pool import RankFailure
from tests.oracles import EXACT

MUON = {"name": "muon", "lr": 0.02, "weight_decay": 0.1, "adamw": {"lr": 3e-3, "eps": 1e-5}, **EXACT}
NORMUON = {**MUON, "name": "normuon"}
# Numbers of whole rows and matrices, and statistics that all ranks get.
HYPERBALL = {"name": "muon_hyperball", "lr": 0.02, "adamw": MUON["adamw"], **EXACT}
MUOWN = {**MUON, "name": "muown", "eps": 1e-5}
# What an owner keeps; eps as in `RuleSettings.steady`.
SOAP = {**MUON, "name": "soap_muon", "eps": 100.0}
RULES = {"muon": MUON, "normuon": NORMUON, "muon_hyperball": HYPERBALL, "muown": MUOWN, "soap_muon": SOAP, "control": None}
STEPS = 5
TOLERANCE = 1e-5  # sums in another order; torch.optim.AdamW differs by 4e-7, Muon by 4e-6 after 5 steps


@cache
def one_process(name: str) -> dict[str, Tensor]:
    return tensor_parallel.one_process(RULES[name], STEPS)


class TestAutoTP:
    @pytest.mark.promise("tensor-parallel")
    @pytest.mark.compatibility("autotp", verdict="exact")
    @pytest.mark.parametrize("stage", [0, 1, 2, 3])
    def test_trains_as_one_process_does(self, stage: int, pools: Pools, record_errors: Callable[..., None]) -> None:
        """The control is torch.optim.AdamW, which needs no whole matrices."""
        errors = {}
        for name, params in {"normuon": NORMUON, "control": None}.items():
            ranks = pools[2].run(tensor_parallel.autotp, 2, stage, params, STEPS)
            errors[name] = max(tensor_parallel.difference(found, one_process(name)) for found in ranks)
        record_errors("autotp", stage, muon=errors["normuon"], adamw=errors["control"])
        assert max(errors.values()) < TOLERANCE

    @pytest.mark.promise("tensor-parallel")
    @pytest.mark.parametrize("stage", [0, 2, 3])
    def test_each_matrix_is_orthogonalized_by_one_of_the_tensor_ranks(self, stage: int, pools: Pools) -> None:
        """Five quintic steps of 4 n^2 m + 2 n^3 FLOPs, for n x m with n the shorter side, of whole matrices of two layers."""
        of_a_layer = [(32, 32), (16, 32), (16, 32), (32, 32), (32, 48), (32, 48), (32, 48)]  # q, k, v, o; gate, up, down
        params = {**MUON, "orthogonalization": {"dtype": "float32", "method": "standard"}}
        found = pools[2].run(tensor_parallel.flops_of_a_step, 2, stage, params)
        assert sum(found) == 2 * sum(5 * (4 * n * n * m + 2 * n**3) for n, m in of_a_layer)
        assert min(found) > 0.3 * sum(found)

    @pytest.mark.parametrize("door", ["register", "object"])
    def test_through_every_door(self, door: str, pools: Pools) -> None:
        for found in pools[2].run(tensor_parallel.autotp, 2, 2, MUON, STEPS, door):
            assert tensor_parallel.difference(found, one_process("muon")) < TOLERANCE

    @pytest.mark.compatibility("autotp", stages=("offload",), verdict="exact")
    def test_with_offload(self, pools: Pools) -> None:
        offload = {"offload_optimizer": {"device": "cpu"}}
        for found in pools[2].run(tensor_parallel.autotp, 2, 3, NORMUON, STEPS, zero_optimization=offload):
            assert tensor_parallel.difference(found, one_process("normuon")) < TOLERANCE

    @pytest.mark.parametrize(("tensor_ranks", "stage"), [(2, 0), (2, 2), (2, 3), (4, 2)])
    def test_beside_data_parallelism(self, tensor_ranks: int, stage: int, pools: Pools) -> None:
        for found in pools[4].run(tensor_parallel.autotp, tensor_ranks, stage, MUON, STEPS):
            assert tensor_parallel.difference(found, one_process("muon")) < TOLERANCE

    @pytest.mark.parametrize(("ranks", "stage"), [(2, 0), (4, 2), (4, 3)])
    @pytest.mark.parametrize("name", ["muon_hyperball", "muown", "soap_muon"])
    def test_norms_and_factors_of_whole_rows_and_matrices(self, name: str, ranks: int, stage: int, pools: Pools) -> None:
        for found in pools[ranks].run(tensor_parallel.autotp, 2, stage, RULES[name], STEPS):
            assert tensor_parallel.difference(found, one_process(name)) < TOLERANCE

    @pytest.mark.parametrize("split", [None, [36, 36]], ids=["whole", "split"])
    @pytest.mark.parametrize("stage", [2, 3])
    def test_a_fused_weight_that_is_cut_part_by_part(self, stage: int, split: list[int] | None, pools: Pools) -> None:
        """As one matrix, whose rows its owner has in another order; or as the two matrices that it is."""
        overrides = [{"match": "gate_up_proj", "split": split}] if split else []
        params = {**NORMUON, "overrides": overrides}
        expected = tensor_parallel.fused_in_one_process(params, STEPS)
        for found in pools[2].run(tensor_parallel.fused, stage, params, STEPS):
            assert tensor_parallel.difference(found, expected) < TOLERANCE


class TestLayersWithAnMpu:
    @pytest.mark.promise("tensor-parallel")
    @pytest.mark.compatibility("megatron", verdict="exact")
    @pytest.mark.parametrize("stage", [0, 1, 2, 3])
    def test_train_as_one_process_does(self, stage: int, pools: Pools, record_errors: Callable[..., None]) -> None:
        """One weight is cut by rows, one by columns, and one not at all."""
        errors = []
        for params in (NORMUON, None):
            expected = tensor_parallel.megatron_in_one_process(params, STEPS)
            ranks = pools[2].run(tensor_parallel.megatron, 2, stage, params, STEPS)
            errors.append(max(tensor_parallel.difference(found, expected) for found in ranks))
        record_errors("megatron", stage, muon=errors[0], adamw=errors[1])
        assert max(errors) < TOLERANCE

    def test_beside_data_parallelism(self, pools: Pools) -> None:
        expected = tensor_parallel.megatron_in_one_process(NORMUON, STEPS)
        for found in pools[4].run(tensor_parallel.megatron, 2, 2, NORMUON, STEPS):
            assert tensor_parallel.difference(found, expected) < TOLERANCE


class TestPortableCheckpoints:
    @pytest.mark.promise("tensor-parallel-checkpoint")
    @pytest.mark.compatibility("tensor_checkpoints", stages=(0, 1, 2, 3), verdict="exact")
    @pytest.mark.parametrize(
        ("ranks", "saved", "loaded"),
        [(2, (2, 2), (1, 3)), (2, (1, 3), (2, 2)), (2, (2, 3), (2, 0)), (4, (4, 2), (2, 3)), (4, (2, 0), (4, 1))],
    )
    def test_go_on_with_other_tensor_ranks(
        self, ranks: int, saved: tuple[int, int], loaded: tuple[int, int], tmp_path: Path, pools: Pools
    ) -> None:
        """``saved`` and ``loaded``: (tensor ranks, ZeRO stage)."""
        folder = str(tmp_path / "checkpoint")
        expected = pools[ranks].run(tensor_parallel.save_portable, *saved, NORMUON, folder)[0]
        for found in pools[ranks].run(tensor_parallel.load_portable, *loaded, NORMUON, folder):
            assert tensor_parallel.difference(found, expected) < TOLERANCE

    @pytest.mark.parametrize(("saved", "loaded"), [((2, 3), (1, 2)), ((1, 2), (4, 0)), ((4, 1), (2, 3))])
    def test_what_owners_keep_moves_bit_for_bit(
        self, saved: tuple[int, int], loaded: tuple[int, int], tmp_path: Path, pools: Pools
    ) -> None:
        """Of matrices that tensor ranks cut, and of those that each has whole."""
        pools[4].run(tensor_parallel.save_portable, *saved, SOAP, str(tmp_path / "saved"))
        pools[4].run(tensor_parallel.save_again, *loaded, SOAP, str(tmp_path / "saved"), str(tmp_path / "again"))
        found, expected = (checkpoints.logical_tensors(tmp_path / name) for name in ("again", "saved"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert sum(".0" in name for name in expected) >= 6

    @pytest.mark.parametrize(("ranks", "stage"), [(2, 0), (2, 2), (4, 3)])
    def test_of_a_weight_that_is_cut_part_by_part(self, ranks: int, stage: int, tmp_path: Path, pools: Pools) -> None:
        """A rank writes a chunk of each part; and on ZeRO-3, of a weight cut by columns, rows and what is left of another."""
        expected = pools[ranks].run(tensor_parallel.fused, stage, NORMUON, 2, str(tmp_path / "saved"))[0]
        tensors = checkpoints.logical_tensors(tmp_path / "saved")
        for name, value in expected.items():
            assert torch.equal(tensors[f"model/{name}"].view_as(value), value), name

    @pytest.mark.parametrize("stage", [0, 3])
    def test_statistics_of_its_rows_are_in_the_order_of_the_rows(self, stage: int, tmp_path: Path, pools: Pools) -> None:
        """Their owner has the rows of one tensor rank after those of the other."""
        saved, again = tmp_path / "saved", tmp_path / "again"
        pools[2].run(tensor_parallel.fused, stage, NORMUON, 2, str(saved))
        found = checkpoints.logical_tensors(saved)
        rows = found["optimizer/gate_up_proj.weight/row_second_moment"]
        expected = tensor_parallel.fused_rows_in_one_process(NORMUON, 2).view_as(rows)
        assert (rows - expected).norm() / expected.norm() < TOLERANCE
        pools[2].run(tensor_parallel.fused_again, stage, NORMUON, str(saved), str(again))
        assert all(torch.equal(value, found[name]) for name, value in checkpoints.logical_tensors(again).items())

    def test_what_owners_keep_of_a_weight_that_is_cut_part_by_part_is_refused(self, tmp_path: Path, pools: Pools) -> None:
        """Its owner has the rows in another order with other tensor ranks."""
        for message in pools[2].run(tensor_parallel.fused_refused, 2, SOAP, str(tmp_path / "saved")):
            assert "state of the matrices of a fused weight that tensor parallelism cuts" in message


def test_engine_checkpoints_resume_and_are_not_converted(tmp_path: Path, pools: Pools) -> None:
    results: list[Any] = pools[2].run(tensor_parallel.save_and_load, 2, 2, NORMUON, str(tmp_path / "engine"))
    for uninterrupted, resumed in results:
        assert tensor_parallel.difference(resumed, uninterrupted) == 0.0
    with pytest.raises(CheckpointError, match=r"mp_rank_01_model_states\.pt: holds shards of tensor parallelism"):
        convert(tmp_path / "engine", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("stage", [0, 2])
def test_telemetry_counts_what_tensor_ranks_share_once(stage: int, pools: Pools) -> None:
    params = {**NORMUON, "telemetry": {"every": 1}}
    expected = pools[2].run(tensor_parallel.records, 1, stage, params)[0]
    found = pools[2].run(tensor_parallel.records, 2, stage, params)[0]
    for group, numbers in expected.items():
        # Each tensor rank keeps state of what it shares; the factors of Newton-Schulz amplify sums in another order.
        compared = {name: value for name, value in numbers.items() if name != "state_bytes"}
        assert {name: found[group][name] for name in compared} == pytest.approx(compared, rel=1e-4), group


def test_a_gradient_that_is_not_finite_on_one_tensor_rank_stops_all_of_them(pools: Pools) -> None:
    """Without ZeRO, where DeepSpeed does not look."""
    with pytest.raises(RankFailure) as failure:
        pools[2].run(tensor_parallel.train_with_nan, 0, MUON)
    assert "q_proj.weight: its gradient is not finite" in failure.value.messages[0]
    assert "a parameter of another tensor rank: its gradient is not finite" in failure.value.messages[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            {"match": "q_proj", "heads": 8},
            "q_proj.weight: got blocks of .* into 2 ranges of rows",
        ),
        ({"match": "up_proj", "split": [16, 32]}, "up_proj.weight: got blocks of .* allowed: no split and no heads"),
    ],
)
def test_blocks_of_rows_that_shards_cut_are_refused(override: dict[str, Any], message: str, pools: Pools) -> None:
    with pytest.raises(RankFailure) as failure:
        pools[2].run(tensor_parallel.autotp, 2, 2, {**MUON, "overrides": [override]}, 1)
    assert all(re.search(message, found) for found in failure.value.messages.values())


def test_fragments_alone_are_orthogonalized_where_that_is_asked_for(pools: Pools) -> None:
    """mode shard_local: every rank its fragment of its shard, which is another update than that of whole matrices."""
    params = {**MUON, "sharding": {"mode": "shard_local"}}
    found = pools[2].run(tensor_parallel.autotp, 2, 2, params, STEPS)[0]
    assert 0.1 < tensor_parallel.difference(found, one_process("muon")) < 1
