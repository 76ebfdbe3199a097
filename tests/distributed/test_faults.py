"""Faults while a checkpoint is written or read, and while ranks step: never a hang, nothing half done, nothing lost.

A NaN on one rank and an overflow of fp16 are in `test_precision` and `test_bad_input`.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import cases, checkpoints
from tests.distributed.conftest import Pools
from tests.distributed.pool import RankFailure
from tests.distributed.test_portable import SAVED, configuration, params_of, schedule

CONFIG = configuration(SAVED, params_of("normuon"), **schedule("normuon"))


@pytest.fixture
def saved(pools: Pools, tmp_path: Path) -> Path:
    pools[2].run(checkpoints.run_and_save, CONFIG, str(tmp_path / "saved"))
    return tmp_path / "saved"


def assert_refused(pools: Pools, folder: Path, *words: str, **options: object) -> None:
    """On both ranks with the same words, and nothing has changed."""
    for message, unchanged in pools[2].run(checkpoints.refused, CONFIG, str(folder), **options):
        for word in words:
            assert word in message
        assert unchanged


@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_during_save_leaves_the_previous_checkpoint(rank: int, saved: Path, pools: Pools, tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as failure:
        pools[2].run(checkpoints.killed_while_saving, CONFIG, str(tmp_path / "next"), rank)
    assert failure.value.types[rank] == "Died"
    assert failure.value.types[1 - rank] == "CheckpointError"
    assert not (tmp_path / "next").exists()
    assert_refused(pools, tmp_path / "next", "next: has no checkpoint.json")
    expected = pools[2].run(checkpoints.resume, CONFIG, str(saved))[0]
    again = pools[2].run(checkpoints.run_and_save, CONFIG, str(tmp_path / "next"))[0]  # over what the killed one left
    assert again["losses"] == expected["losses"]
    assert not (tmp_path / "next.incomplete").exists()


def test_what_a_killed_save_of_more_ranks_left_is_no_part_of_the_next(pools: Pools, tmp_path: Path) -> None:
    """Its files have other names than those of the save that takes its place."""
    left = tmp_path / "next.incomplete" / "shard-00009-model-00001-of-00009.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"half of it")
    pools[2].run(checkpoints.run_and_save, CONFIG, str(tmp_path / "next"))
    assert not (tmp_path / "next" / left.name).exists()
    assert pools[2].run(checkpoints.resume, CONFIG, str(tmp_path / "next"))[0]["steps"] == checkpoints.HALF


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.root
def test_a_full_disk_is_an_error_and_keeps_the_previous_checkpoint(small_disk: Path, pools: Pools) -> None:
    pools[2].run(checkpoints.run_and_save, CONFIG, str(small_disk / "first"))
    (small_disk / "filler").write_bytes(bytes(free_bytes(small_disk) - 40_000))
    with pytest.raises(RankFailure) as failure:
        pools[2].run(checkpoints.run_and_save, CONFIG, str(small_disk / "second"))
    assert failure.value.types == {0: "CheckpointError", 1: "CheckpointError"}
    for message in failure.value.messages.values():
        assert "second: not written" in message
        assert "No space left on device" in message
    assert sorted(path.name for path in small_disk.iterdir()) == ["filler", "first"]
    assert pools[2].run(checkpoints.resume, CONFIG, str(small_disk / "first"))[0]["steps"] == checkpoints.HALF


def test_a_disk_that_is_full_on_one_host_is_an_error_on_all(saved: Path, pools: Pools, tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as failure:
        pools[2].run(checkpoints.save_where_the_disk_is_full, CONFIG, str(tmp_path / "next"))
    assert failure.value.types == {0: "CheckpointError", 1: "CheckpointError"}
    for message in failure.value.messages.values():
        assert "next: not written. rank 1: OSError: [Errno 28] No space left on device" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


@pytest.mark.root
def test_a_read_only_folder_is_an_error(small_disk: Path, pools: Pools) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(RankFailure) as failure:
        pools[2].run(checkpoints.run_and_save, CONFIG, str(small_disk / "saved"))
    assert failure.value.types == {0: "CheckpointError", 1: "CheckpointError"}
    assert "saved: not written" in failure.value.messages[0]
    assert "Read-only file system" in failure.value.messages[0]


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "manifest"])
def test_a_damaged_file_is_refused_by_name(damage: str, saved: Path, pools: Pools) -> None:
    path = saved / "checkpoint.json" if damage == "manifest" else sorted(saved.glob("*.safetensors"))[-1]
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert_refused(pools, saved, str(path))


def test_every_file_of_a_checkpoint_is_checked_by_some_rank(saved: Path, pools: Pools) -> None:
    """The ranks share the files out; here each in its turn has a bit too many."""
    for path in sorted(saved.glob("*.safetensors")):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert_refused(pools, saved, f"{path}: its checksum is not that of what was written")
        path.write_bytes(content)


def test_a_changed_number_in_the_manifest_is_refused_on_all_ranks(saved: Path, pools: Pools) -> None:
    """Which is JSON all the same, of the right form."""
    path = saved / "checkpoint.json"
    manifest = json.loads(path.read_text())
    manifest["counters"]["global_steps"] += 1
    path.write_text(json.dumps(manifest))
    assert_refused(pools, saved, f"{path}: damaged: its checksum is not that of what was written")


def test_a_foreign_file_is_refused_by_name(saved: Path, pools: Pools) -> None:
    """It would be read as a part of the checkpoint."""
    copied = saved / "shard-00009-model-00001-of-00009.safetensors"
    copied.write_bytes(sorted(saved.glob("*.safetensors"))[0].read_bytes())
    assert_refused(pools, saved, f"{copied}: is no part of the checkpoint")


def test_a_checkpoint_holds_its_files_and_nothing_else(saved: Path) -> None:
    """Two ranks' tensors, and the manifest: no lock, and nothing beside it that is not complete."""
    suffixes = sorted(path.suffix for path in saved.iterdir())
    assert suffixes == [".json", ".safetensors", ".safetensors"]
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_a_disk_that_fails_one_rank_is_an_error_on_all(saved: Path, pools: Pools) -> None:
    for message, unchanged in pools[2].run(checkpoints.refused_where_the_disk_fails, CONFIG, str(saved)):
        assert message == f"rank 1: OSError: [Errno 5] Input/output error: '{saved}'"
        assert unchanged


def test_ranks_that_find_different_checkpoints_under_one_name_are_refused(saved: Path, pools: Pools, tmp_path: Path) -> None:
    other = tmp_path / "other"
    pools[2].run(checkpoints.draw_and_save, CONFIG, str(other))  # another client_state and random states
    refusals = pools[2].run(checkpoints.refused_of_each_its_own, CONFIG, [str(saved), str(other)])
    for (message, unchanged), folder in zip(refusals, (saved, other), strict=True):
        assert message.startswith(f"{folder}: ranks found different checkpoints")
        assert unchanged


def test_an_existing_folder_is_never_overwritten(saved: Path, pools: Pools) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(RankFailure) as failure:
        pools[2].run(checkpoints.run_and_save, CONFIG, str(saved))
    assert failure.value.types == {0: "CheckpointError", 1: "CheckpointError"}
    assert "is there already" in failure.value.messages[1]
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.parametrize(("odd", "word"), [(1j, "Object of type complex"), ({3: 1}, "got the key 3")])
def test_a_client_state_that_one_rank_cannot_save_stops_all(odd: object, word: str, pools: Pools, tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as failure:
        pools[2].run(checkpoints.save_unsavable, CONFIG, str(tmp_path / "saved"), odd)
    assert failure.value.types == {0: "CheckpointError", 1: "CheckpointError"}
    assert f"client_state cannot be saved: {word}" in failure.value.messages[0]
    assert not list(tmp_path.glob("saved*"))


def test_another_model_is_refused(saved: Path, pools: Pools) -> None:
    assert_refused(pools, saved, "model: the checkpoint holds 'blocks.2.weight', which this model lacks", depth=2)
    assert_refused(pools, saved, "'up.weight' has shape [40, 24] in the checkpoint; allowed: [48, 24]", width=48)


def test_other_groups_are_refused_unless_asked_for(saved: Path, pools: Pools) -> None:
    other = configuration(SAVED, params_of("muon"))
    for message, unchanged in pools[2].run(checkpoints.refused, other, str(saved)):
        assert "got ['embedding.adamw', 'matrix.normuon'" in message
        assert "allowed: this run's, ['embedding.adamw', 'matrix.muon'" in message
        assert unchanged
    resumed = pools[2].run(checkpoints.resume, other, str(saved), strict=False)[0]
    assert resumed["steps"] == checkpoints.HALF


def test_a_rank_that_comes_late_changes_nothing(saved: Path, pools: Pools) -> None:
    expected = pools[2].run(checkpoints.resume, CONFIG, str(saved))[0]
    assert pools[2].run(checkpoints.resume_late, CONFIG, str(saved))[0]["losses"] == expected["losses"]


def test_a_rank_that_is_suspended_changes_nothing(saved: Path, pools: Pools) -> None:
    expected = pools[2].run(checkpoints.resume, CONFIG, str(saved))[0]
    assert pools[2].run(checkpoints.resume_suspended, CONFIG, str(saved))[0]["losses"] == expected["losses"]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_that_never_comes_is_an_error_after_the_timeout(stage: int, pools: Pools) -> None:
    """Of the process group; here 3 s."""
    with pytest.raises(RankFailure) as failure:
        pools[2].run(checkpoints.step_without_rank_1, cases.engine_config(stage, cases.MUON))
    assert failure.value.types == {0: "RuntimeError"}
    assert "imed out" in failure.value.messages[0]


def test_a_save_that_a_rank_never_joins_is_an_error_after_the_timeout(pools: Pools, tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as failure:
        pools[2].run(checkpoints.save_without_rank_1, CONFIG, str(tmp_path / "saved"))
    assert failure.value.types.keys() == {0}
    assert "timeout after 3000ms" in failure.value.messages[0]
    assert not list(tmp_path.iterdir())
