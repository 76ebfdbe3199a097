"""Tensor parallelism: matrices that are cut once more than ZeRO cuts them are orthogonalized whole."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.distributed import tensor_parallel
from tests.distributed.conftest import Pools
from tests.oracles import EXACT

MUON = {"name": "muon", "lr": 0.02, "weight_decay": 0.1, "adamw": {"lr": 3e-3, "eps": 1e-5}, **EXACT}
NORMUON = {**MUON, "name": "normuon"}
STEPS = 5
TOLERANCE = 1e-5  # sums in another order; torch.optim.AdamW differs by 4e-7, Muon by 4e-6 after 5 steps


@cache
def one_process(name: str) -> dict[str, Tensor]:
    return tensor_parallel.one_process({"muon": MUON, "normuon": NORMUON, "control": None}[name], STEPS)


class TestAutoTP:
    @pytest.mark.compatibility("autotp", verdict="exact")
    @pytest.mark.parametrize("stage", [0, 1, 2, 3])
    def test_trains_as_one_process_does(self, stage: int, pools: Pools) -> None:
        for found in pools[2].run(tensor_parallel.autotp, 2, stage, NORMUON, STEPS):
            assert tensor_parallel.difference(found, one_process("normuon")) < TOLERANCE

    @pytest.mark.parametrize("door", ["register", "object"])
    def test_through_every_door(self, door: str, pools: Pools) -> None:
        for found in pools[2].run(tensor_parallel.autotp, 2, 2, MUON, STEPS, door):
            assert tensor_parallel.difference(found, one_process("muon")) < TOLERANCE

    def test_the_control_trains(self, pools: Pools) -> None:
        """With torch.optim.AdamW, which needs no whole matrices: what differs here is not ours."""
        for found in pools[2].run(tensor_parallel.autotp, 2, 2, None, STEPS):
            assert tensor_parallel.difference(found, one_process("control")) < TOLERANCE

    @pytest.mark.parametrize(("tensor_ranks", "stage"), [(2, 0), (2, 2), (2, 3), (4, 2)])
    def test_beside_data_parallelism(self, tensor_ranks: int, stage: int, pools: Pools) -> None:
        for found in pools[4].run(tensor_parallel.autotp, tensor_ranks, stage, MUON, STEPS):
            assert tensor_parallel.difference(found, one_process("muon")) < TOLERANCE


class TestLayersWithAnMpu:
    @pytest.mark.compatibility("megatron", verdict="exact")
    @pytest.mark.parametrize("stage", [0, 1, 2, 3])
    def test_train_as_one_process_does(self, stage: int, pools: Pools) -> None:
        """One weight is cut by rows, one by columns, and one not at all."""
        expected = tensor_parallel.megatron_in_one_process(NORMUON, STEPS)
        for found in pools[2].run(tensor_parallel.megatron, 2, stage, NORMUON, STEPS):
            assert tensor_parallel.difference(found, expected) < TOLERANCE

    def test_beside_data_parallelism(self, pools: Pools) -> None:
        expected = tensor_parallel.megatron_in_one_process(NORMUON, STEPS)
        for found in pools[4].run(tensor_parallel.megatron, 2, 2, NORMUON, STEPS):
            assert tensor_parallel.difference(found, expected) < TOLERANCE


class TestPortableCheckpoints:
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


def test_engine_checkpoints_resume(tmp_path: Path, pools: Pools) -> None:
    results: list[Any] = pools[2].run(tensor_parallel.save_and_load, 2, 2, NORMUON, str(tmp_path))
    for uninterrupted, resumed in results:
        assert tensor_parallel.difference(resumed, uninterrupted) == 0.0
