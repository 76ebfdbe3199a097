"""Bytes to train on, and the choice of those that each rank sees at each step.

The default text is Python's own standard library, and torch's C++ headers are another; every machine has both, and nothing is
downloaded.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HEADERS = "torch headers"  # names a text as the path of one does
VALIDATION_SHARE = 20  # one file in twenty, or one byte in twenty of a single file
_ALLOWED = "a text file, a folder with files in it, or a glob that matches files"


class DataError(ValueError):
    """A data path that cannot be read, holds nothing, or holds too little."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """The training and the validation bytes, each one uint8 tensor of shape (bytes,)."""

    train: Tensor
    validation: Tensor

    def check_length(self, sequence_length: int) -> None:
        """Raise DataError unless both splits hold a sequence of `sequence_length` bytes and the byte that follows it."""
        for name, split in (("training", self.train), ("validation", self.validation)):
            if len(split) < sequence_length + 1:
                raise DataError(
                    f"the {name} text holds {len(split)} bytes; sequence_length {sequence_length} needs at least "
                    f"{sequence_length + 1} (a byte to predict after each)"
                )

    def batch(
        self, step: int, seed: int, global_batch: int, sequence_length: int, rows: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Return the given rows of a step's global batch: tokens and targets, int64, (rows, sequence_length).

        Row i depends on `(seed, step, i)` alone: every rank draws all the starting positions and reads only its own
        rows, so the samples of a step are the same on any number of ranks.

        Args:
            step: optimizer step, from 0.
            global_batch: sequences of all ranks together.
            sequence_length: bytes in a sequence.
            rows: those to return, see `micro_batch_rows`.
        """
        generator = torch.Generator().manual_seed(_mixed(seed, step))
        last_start = len(self.train) - sequence_length - 1
        starts = torch.randint(last_start + 1, (global_batch,), generator=generator)
        return _windows(self.train, starts[rows], sequence_length)

    def validation_windows(self, sequence_length: int, count: int) -> tuple[Tensor, Tensor]:
        """Return `count` evenly spaced windows of the validation text: tokens and targets as in `batch`.

        The windows are the same in every run. There are fewer where `count` of them would overlap.
        """
        last_start = len(self.validation) - sequence_length - 1
        count = min(count, 1 + last_start // sequence_length)
        starts = torch.arange(count) * last_start // max(count - 1, 1)
        return _windows(self.validation, starts, sequence_length)


def micro_batch_rows(accumulation: int, rank: int, world_size: int, micro_batch: int) -> slice:
    """Return the rows of the global batch that `rank` trains on in micro-step `accumulation`."""
    first = (accumulation * world_size + rank) * micro_batch
    return slice(first, first + micro_batch)


def load_corpus(data: str | None = None) -> Corpus:
    """Read a text file, a folder (all regular files below it) or a glob.

    None means the standard library's .py files, and `HEADERS` the C++ headers that torch is installed with.

    Training and validation get 95% and 5%: of the files, or of the bytes of a single file; always the same ones.

    Raises:
        DataError: there is nothing to read, or a file cannot be read; the message names the path.
    """
    if data == HEADERS:
        data = str(Path(torch.__file__).parent / "include" / "torch")
    root, paths = _standard_library() if data is None else _find(data)
    texts = {path.relative_to(root).as_posix(): _read(path) for path in paths}
    texts = {name: text for name, text in texts.items() if text}
    if not texts:
        raise DataError(f"data path {str(data or root)!r}: nothing but empty files ({len(paths)}); allowed: {_ALLOWED}")
    train, validation = _split(texts)
    return Corpus(train=_bytes_tensor(train), validation=_bytes_tensor(validation))


def _find(data: str) -> tuple[Path, list[Path]]:
    """Return a root folder and the regular files that `data` names, sorted. Raises DataError where there are none."""
    path = Path(data)
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        root, found = path, list(path.rglob("*"))
    else:
        matches = [Path(match) for match in glob.glob(data, recursive=True)]
        if not matches:
            raise DataError(f"data path {data!r}: no such file or folder, and no match as a glob; allowed: {_ALLOWED}")
        root, found = Path(os.path.commonpath([match.parent for match in matches])), matches
    paths = sorted(path for path in found if path.is_file())
    if not paths:
        raise DataError(f"data path {data!r}: no regular file in it; allowed: {_ALLOWED}")
    return root, paths


def _standard_library() -> tuple[Path, list[Path]]:
    """Return the standard library's folder and its .py files, sorted, without installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages")]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    return root, sorted(paths)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"data path {str(path)!r}: cannot be read ({error}); allowed: {_ALLOWED}") from error


def _split(texts: dict[str, bytes]) -> tuple[bytes, bytes]:
    """Split {name: text} into training and validation text.

    The side that a file goes to depends on a hash of its name, so that neighbours in a folder are not kept together.
    """
    if len(texts) == 1:
        (text,) = texts.values()
        cut = len(text) - len(text) // VALIDATION_SHARE
        return text[:cut], text[cut:]
    by_hash = sorted(texts, key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest())
    held_out = set(by_hash[: max(1, len(texts) // VALIDATION_SHARE)])
    train = b"".join(text for name, text in texts.items() if name not in held_out)
    return train, b"".join(text for name, text in texts.items() if name in held_out)


def _bytes_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def _windows(text: Tensor, starts: Tensor, sequence_length: int) -> tuple[Tensor, Tensor]:
    """Return the bytes at each start and, as targets, the bytes one further; both int64, (starts, sequence_length)."""
    windows = text[starts[:, None] + torch.arange(sequence_length + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def _mixed(seed: int, step: int) -> int:
    """Hash the pair to 63 bits: seed + step would give neighbouring seeds each other's batches."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:8], "little") >> 1
