"""Files of a portable checkpoint, in one process: what is written is read, whole or in part; what is damaged is named."""

import json
from pathlib import Path

import pytest
import torch

from ds_optforge import CheckpointError
from ds_optforge.checkpoint import chunks
from ds_optforge.checkpoint.chunks import Chunk, Request, files_of, flat_chunk
from ds_optforge.checkpoint.files import Checkpoint, write
from ds_optforge.checkpoint.manifest import write_manifest
from tests.bombs import EMPTY

VALUES = torch.arange(100, dtype=torch.float32)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    write(
        tmp_path / "saved",
        [flat_chunk("a", 100, 0, VALUES), flat_chunk("b", 10, 0, VALUES[:10].bfloat16())],
        {**EMPTY, "note": "x"},
    )
    return tmp_path / "saved"


def test_any_range_can_be_read_into_any_dtype(saved: Path) -> None:
    checkpoint = Checkpoint(saved)
    assert checkpoint.manifest["note"] == "x"
    assert checkpoint.tensors == {"a": (100, torch.float32), "b": (10, torch.bfloat16)}
    part, cast = torch.empty(7), torch.empty(10)
    checkpoint.read([Request("a", 90, part), Request("b", 0, cast)])
    assert torch.equal(part, VALUES[90:97])
    assert torch.equal(cast, VALUES[:10])


def test_nothing_in_it_is_a_pickle(saved: Path) -> None:
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors"}


def test_a_gap_or_an_overlap_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not written"):
        write(tmp_path / "bad", [flat_chunk("a", 100, 0, VALUES[:50]), flat_chunk("a", 100, 40, VALUES[40:])], {})
    assert not list(tmp_path.iterdir())


def test_a_value_that_cannot_be_made_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    def fails() -> torch.Tensor:
        raise OSError("no such luck")

    with pytest.raises(CheckpointError, match=r"bad: not written.*no such luck"):
        write(tmp_path / "bad", [Chunk("a", (3,), (0,), (3,), torch.float32, fails)], {})
    assert not list(tmp_path.iterdir())


def test_two_jobs_that_write_one_checkpoint_are_one_checkpoint_and_one_error(tmp_path: Path) -> None:
    """The second begins while the first is writing, and takes nothing from it. What a killed job left is no job."""
    (tmp_path / "saved.incomplete").mkdir()
    (tmp_path / "saved.incomplete" / "writer.lock").touch()
    (tmp_path / "saved.incomplete" / "shard-00001-model-00001-of-00001.safetensors").touch()

    def while_the_first_writes() -> torch.Tensor:
        with pytest.raises(CheckpointError, match=r"saved: not written.*saved\.incomplete: another job is writing it now"):
            write(tmp_path / "saved", [flat_chunk("a", 3, 0, VALUES[:3])], EMPTY)
        return VALUES

    write(tmp_path / "saved", [Chunk("a", (100,), (0,), (100,), torch.float32, while_the_first_writes)], EMPTY)
    assert Checkpoint(tmp_path / "saved").damage() == []
    assert torch.equal(Checkpoint(tmp_path / "saved").whole("a"), VALUES)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_files_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the largest rank's part, except where one tensor alone is larger."""
    monkeypatch.setattr(chunks, "_FILE_BYTES", 400)
    ranks = [[flat_chunk("a", 100, 0, VALUES[:50]), flat_chunk("c", 4, 0, VALUES[:4])], [flat_chunk("b", 75, 0, VALUES[:75])]]
    assert files_of(ranks) == {"a": 1, "c": 1, "b": 2}
    assert files_of([[flat_chunk("a", 100, 0, VALUES), flat_chunk("b", 1, 0, VALUES[:1])]]) == {"a": 1, "b": 2}


def test_every_bit_of_the_manifest_is_checked(saved: Path) -> None:
    path = saved / "checkpoint.json"
    manifest = json.loads(path.read_text())
    for key in ("note", "files", "version"):
        path.write_text(json.dumps({**manifest, key: "other"}))
        with pytest.raises(CheckpointError, match=r"checkpoint\.json: damaged"):
            Checkpoint(saved)
    path.write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: damaged"):
        Checkpoint(saved)


def test_a_later_version_is_refused(saved: Path) -> None:
    write_manifest(saved / "checkpoint.json", {"version": 2, "files": {}})
    with pytest.raises(CheckpointError, match="got version 2; this ds_optforge reads version 1"):
        Checkpoint(saved)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no checkpoint\.json; allowed: a folder that save_checkpoint"):
        Checkpoint(tmp_path)
    (tmp_path / "run.incomplete").mkdir()
    with pytest.raises(CheckpointError, match=r"run\.incomplete is what a save left"):
        Checkpoint(tmp_path / "run")
