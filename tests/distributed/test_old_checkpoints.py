"""What an older commit saved goes on here: engine and portable checkpoints of tests/data/checkpoints, bit for bit.

`tests/data/make_checkpoints.py` wrote them, and beside them what was in the run at that moment and what came next.
"""

import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import old_checkpoints
from tests.distributed.conftest import Pools
from tests.distributed.old_checkpoints import (
    ARCHIVES,
    CASES,
    RANKS,
    STAGES,
    TOLERANCES,
    TOLERANCES_OF_WEIGHTS,
    Expected,
)
from tests.oracles import relative_error


def unpacked(name: str, stage: int, folder: Path) -> Path:
    """The folder of one run."""
    with tarfile.open(ARCHIVES / f"{name}.tar.xz") as archive:
        members = [member for member in archive if member.name.startswith(f"zero{stage}/")]
        archive.extractall(folder, members, filter="data")
    return folder / f"zero{stage}"


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Bit for bit, dtypes included."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def bits(tensor: Tensor) -> Tensor:
    """So that zeros of both signs differ, and NaN is NaN."""
    return tensor.contiguous().view(torch.uint8)


def assert_facts(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Everything that was saved; a later commit may keep more in a group."""
    assert found["groups"].keys() == expected["groups"].keys()
    for name, group in expected["groups"].items():
        assert group.items() <= found["groups"][name].items(), name
    assert {**found, "groups": None} == {**expected, "groups": None}


def assert_goes_on(results: list[dict[str, Any]], expected: Expected, precision: str) -> None:
    """The other half of the steps, on every rank; `TOLERANCES` says why not bit for bit."""
    for result in results:
        assert result["losses"] == pytest.approx(expected.losses, rel=TOLERANCES[precision])
        for name, parameter in expected.later.items():
            assert relative_error(result["later"][name], parameter) < TOLERANCES_OF_WEIGHTS[precision], name


@pytest.mark.parametrize("how", ["engine", "portable"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_an_old_checkpoint_resumes_bit_for_bit(name: str, stage: int, how: str, pools: Pools, tmp_path: Path) -> None:
    """Weights, every state tensor, hyperparameters and counters; and the same losses follow."""
    run = unpacked(name, stage, tmp_path)
    expected = Expected.read(run)
    results = pools[RANKS].run(old_checkpoints.load, name, stage, how, str(run), str(tmp_path / "again"))
    assert_equal(old_checkpoints.logical_tensors(tmp_path / "again"), expected.logical)
    for rank, result in enumerate(results):
        assert_equal(result["saved"], expected.saved)
        assert result["client_state"]["next"] == old_checkpoints.HALF
        if how == "portable":  # DeepSpeed saves no random states
            assert result["draws"] == expected.draws[rank]
    assert_facts(results[0]["facts"], expected.facts)
    assert_goes_on(results, expected, CASES[name].precision)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_an_old_engine_checkpoint_converts_bit_for_bit(name: str, stage: int, tmp_path: Path) -> None:
    run = unpacked(name, stage, tmp_path)
    old_checkpoints.convert(run / "engine", tmp_path / "converted")
    assert_equal(old_checkpoints.logical_tensors(tmp_path / "converted"), Expected.read(run).logical)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_an_old_portable_checkpoint_moves_to_another_topology(name: str, stage: int, pools: Pools, tmp_path: Path) -> None:
    """To one rank and ZeRO-3: all but 8-bit blocks bit for bit, as their ends lie where a rank's part ends."""
    run = unpacked(name, stage, tmp_path)
    expected = Expected.read(run)
    results = pools[1].run(old_checkpoints.load, name, 3, "portable", str(run), str(tmp_path / "again"))
    assert_equal(not_8bit(old_checkpoints.logical_tensors(tmp_path / "again")), not_8bit(expected.logical))
    assert_equal(results[0]["saved"], expected.saved)
    assert_facts(results[0]["facts"], expected.facts)
    assert_goes_on(results, expected, CASES[name].precision)


def not_8bit(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without codes and scales."""
    return {name: t for name, t in tensors.items() if t.dtype != torch.uint8 and not name.endswith("_absmax")}


def test_the_archives_hold_every_kind_of_state(tmp_path: Path) -> None:
    """8-bit blocks that a cut goes through, row statistics, the descent point of Schedule-Free; what is not trained."""
    names: set[str] = set()
    for name in CASES:
        logical = Expected.read(unpacked(name, 2, tmp_path / name)).logical
        assert any(t.dtype == torch.uint8 for t in logical.values()) == ("8bit" in name)
        for key, scales in logical.items():
            if key.endswith("_absmax"):
                assert len(scales) == 18, key  # 65 x 65 elements have 17 blocks of 256 if none is cut
        names |= {f"{name}: {key}" for key in logical}
    assert {"normuon: optimizer/fused.weight/row_second_moment", "schedule_free_adamw: optimizer/bank/z"} <= names
    assert {"muon: model/gain", "muon: model/shift"} <= names
