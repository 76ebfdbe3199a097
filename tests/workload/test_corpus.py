"""The byte corpus: which bytes are held out, which samples a step has, and what is refused."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch

from workload import HEADERS, Corpus, DataError, load_corpus, micro_batch_rows

COUNTING = Corpus(train=torch.arange(200, dtype=torch.uint8), validation=torch.arange(100, dtype=torch.uint8))


@pytest.fixture
def forty_files(tmp_path: Path) -> Path:
    """A folder with two files in each of twenty subfolders; file i holds the letters of its number, 50 times."""
    for index in range(40):
        path = tmp_path / "text" / f"part{index // 2:02}" / f"{index:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<{index:02}>" * 50)
    return tmp_path / "text"


def files_in(text: torch.Tensor) -> list[int]:
    """Return the numbers of the files of `forty_files` in `text`, in order."""
    pieces = bytes(text.tolist()).decode().replace("<", " ").replace(">", " ").split()
    return list(dict.fromkeys(int(piece) for piece in pieces))


# ------------------------------------------------------------------------------------------- split


def test_one_file_in_twenty_is_held_out_whole(forty_files: Path):
    corpus = load_corpus(str(forty_files))
    train, held_out = files_in(corpus.train), files_in(corpus.validation)
    assert len(held_out) == 2
    assert sorted(train + held_out) == list(range(40))
    assert len(corpus.train) == 38 * 200
    assert train == sorted(train)


def test_the_split_is_decided_by_relative_names_alone(forty_files: Path, tmp_path: Path):
    held_out = load_corpus(str(forty_files)).validation
    moved = forty_files.rename(tmp_path / "elsewhere")
    assert torch.equal(load_corpus(str(moved)).validation, held_out)


def test_a_glob_reads_what_it_matches(forty_files: Path):
    assert torch.equal(load_corpus(str(forty_files / "**" / "*.txt")).train, load_corpus(str(forty_files)).train)
    some = load_corpus(str(forty_files / "part0*" / "*.txt"))
    assert sorted(files_in(some.train) + files_in(some.validation)) == list(range(20))


def test_a_single_file_is_split_by_position(tmp_path: Path):
    path = tmp_path / "text.bin"
    path.write_bytes(bytes(range(200)))
    corpus = load_corpus(str(path))
    assert corpus.train.tolist() == list(range(190))
    assert corpus.validation.tolist() == list(range(190, 200))


def test_two_files_give_one_to_each_side_and_empty_files_do_not_count(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"a" * 10)
    (tmp_path / "b").write_bytes(b"b" * 10)
    (tmp_path / "empty").touch()
    corpus = load_corpus(str(tmp_path))
    assert {bytes(corpus.train.tolist()), bytes(corpus.validation.tolist())} == {b"a" * 10, b"b" * 10}


def test_the_default_is_the_standard_library_without_installed_packages():
    corpus = load_corpus()
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    text = bytes(corpus.train.numpy().tobytes()) + bytes(corpus.validation.numpy().tobytes())
    assert (stdlib / "argparse.py").read_bytes() in text
    assert (stdlib / "json" / "decoder.py").read_bytes() in text
    assert Path(torch.__file__).read_bytes() not in text
    assert 0.01 < len(corpus.validation) / len(text) < 0.15


def test_the_headers_that_torch_brings_are_a_text():
    corpus = load_corpus(HEADERS)
    assert b"#pragma once" in bytes(corpus.validation.tolist())
    assert b"namespace torch" in bytes(corpus.train.tolist())


# ------------------------------------------------------------------------------------------- batches


def test_targets_are_the_tokens_one_byte_later():
    tokens, targets = COUNTING.batch(step=3, seed=0, global_batch=8, sequence_length=16)
    assert tokens.shape == targets.shape == (8, 16)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, tokens + 1)


def test_a_step_and_a_seed_decide_the_batch():
    def first_bytes(step: int, seed: int) -> list[int]:
        return COUNTING.batch(step, seed, global_batch=32, sequence_length=4)[0][:, 0].tolist()

    assert first_bytes(5, seed=1) == first_bytes(5, seed=1)
    assert first_bytes(5, seed=1) != first_bytes(6, seed=1)
    assert first_bytes(5, seed=1) != first_bytes(5, seed=2)
    assert first_bytes(5, seed=1) != first_bytes(1, seed=5)


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (4, 1), (2, 2), (1, 4), (3, 2)])
def test_the_ranks_together_train_on_the_same_samples_at_any_world_size(world_size: int, accumulation: int):
    micro_batch = 12 // (world_size * accumulation)
    whole, _ = COUNTING.batch(step=7, seed=0, global_batch=12, sequence_length=4)
    shares = [
        COUNTING.batch(7, 0, 12, 4, rows=micro_batch_rows(index, rank, world_size, micro_batch))[0]
        for index in range(accumulation)
        for rank in range(world_size)
    ]
    assert torch.equal(torch.cat(shares), whole)


def test_every_position_can_be_drawn_up_to_the_last_that_has_a_target():
    corpus = Corpus(train=torch.arange(10, dtype=torch.uint8), validation=torch.arange(10, dtype=torch.uint8))
    tokens, targets = corpus.batch(step=0, seed=0, global_batch=500, sequence_length=4)
    assert set(tokens[:, 0].tolist()) == {0, 1, 2, 3, 4, 5}
    assert targets.max() == 9


def test_validation_windows_are_evenly_spaced_from_the_first_byte_to_the_last():
    tokens, targets = COUNTING.validation_windows(sequence_length=9, count=4)
    assert tokens[:, 0].tolist() == [0, 30, 60, 90]
    assert torch.equal(targets, tokens + 1)
    assert targets[-1, -1] == 99


def test_validation_windows_never_overlap():
    tokens, _ = COUNTING.validation_windows(sequence_length=30, count=512)
    assert len(tokens) == 3
    assert (tokens[:, 0].diff() >= 30).all()


def test_a_validation_text_of_one_window_gives_one():
    tokens, targets = COUNTING.validation_windows(sequence_length=99, count=512)
    assert tokens.tolist() == [list(range(99))]
    assert targets[0, -1] == 99


# ------------------------------------------------------------------------------------------- bad input


def test_a_missing_path_is_named_with_what_is_allowed(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere': no such file or folder, and no match as a glob; allowed: a text"):
        load_corpus(str(tmp_path / "nowhere"))


def test_a_folder_without_files_is_an_error(tmp_path: Path):
    (tmp_path / "inner").mkdir()
    with pytest.raises(DataError, match=r"no regular file in it; allowed: a text file, a folder with files"):
        load_corpus(str(tmp_path))


def test_empty_files_are_an_error(tmp_path: Path):
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match=r"nothing but empty files \(1\)"):
        load_corpus(str(tmp_path))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "locked"
    path.write_text("text")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # the super-user, who runs tests in containers, can read any file
    with pytest.raises(DataError, match=r"locked': cannot be read .*Permission denied"):
        load_corpus(str(path))


def test_a_text_too_short_for_the_sequence_is_an_error_with_both_numbers():
    COUNTING.check_length(99)
    with pytest.raises(DataError, match=r"validation text holds 100 bytes; sequence_length 100 needs at least 101"):
        COUNTING.check_length(100)
    with pytest.raises(DataError, match=r"training text holds 200 bytes; sequence_length 200 needs at least 201"):
        COUNTING.check_length(200)
