"""The files of a portable checkpoint: safetensors by torch.distributed.checkpoint, a manifest with checksums, one rename.

    DIR/checkpoint.json                     the manifest: plain JSON, the last file written
    DIR/shard-<rank>-model-<n>-of-<N>.safetensors

Everything is written into ``DIR.incomplete``, which becomes DIR when all of it is on the disk. Nothing here runs code from
a file: safetensors and JSON hold data only.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optforge.errors import CheckpointError as CheckpointError

MANIFEST = "checkpoint.json"
INCOMPLETE = ".incomplete"  # what a save in progress, or one that was killed, is called
VERSION = 1

_FILE_BYTES = 2**28  # a file is made in memory before it is written: this, or the largest piece of one tensor
_READ_BYTES = 2**22


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A part of a logical tensor, to be written.

    Attributes:
        name, size: the whole tensor's.
        offsets, shape: of the part within it.
        values: the part, or a function that makes it when its file is written.
    """

    name: str
    size: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor | Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def run_of(name: str, size: int, start: int, values: Tensor) -> Chunk:
    """Elements [start, start + len(values)) of a flat logical tensor."""
    return Chunk(name, (size,), (start,), (values.numel(),), values.dtype, values)


def files_of(chunks: Iterable[Sequence[Chunk]]) -> dict[str, int]:
    """The number of the file (from 1) that each tensor goes to, so that no rank's file is much larger than 256 MiB.

    Args:
        chunks: of each rank.
    """
    largest: dict[str, int] = {}
    for of_rank in chunks:
        for chunk in of_rank:
            largest[chunk.name] = max(largest.get(chunk.name, 0), chunk.nbytes)
    number, filled, numbers = 1, 0, {}
    for name, nbytes in largest.items():
        if filled and filled + nbytes > _FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += nbytes
    return numbers


def incomplete(folder: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return folder.with_name(folder.name + INCOMPLETE)


def write(folder: Path, chunks: Sequence[Chunk], manifest: Mapping[str, Any]) -> None:
    """Write a checkpoint; all ranks of the default process group together, or a process without one alone.

    Args:
        folder: must not be there yet, on a file system that all ranks share.
        chunks: this rank's; the same chunk may be given by several ranks.
        manifest: on rank 0: plain data, to be found again as `Checkpoint.manifest`.

    Raises:
        CheckpointError: on all ranks; what was written is removed.
    """
    from ds_optforge.checkpoint import dcp

    with _reporting(folder), own_group() as group, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.write(folder, chunks, manifest, group)


def write_in_background(folder: Path, chunks: Sequence[Chunk], manifest: Mapping[str, Any]) -> Future[None]:
    """As `write`, but return when the chunks have been copied; the result, or CheckpointError, comes later."""
    from ds_optforge.checkpoint import dcp

    done: Future[None] = Future()
    stack = ExitStack()
    group = stack.enter_context(own_group())
    try:
        saving = dcp.start_writing(folder, chunks, manifest, group)
    except BaseException:
        stack.close()
        raise

    def finish(saved: Future[Any]) -> None:
        try:
            with stack, _reporting(folder):
                saved.result()
        except BaseException as error:  # of another thread: nothing may be lost here
            done.set_exception(error)
        else:
            done.set_result(None)

    saving.add_done_callback(finish)
    return done


def write_weights(folder: Path, chunks: Sequence[Chunk]) -> None:
    """Write whole tensors as a Hugging Face model's weights: model-*.safetensors and their index. Raises CheckpointError."""
    from ds_optforge.checkpoint import dcp

    if folder.exists():
        raise CheckpointError(f"{folder} is there already; allowed: a new folder")
    temporary = incomplete(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    with _reporting(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.write_weights(temporary, chunks)
        temporary.rename(folder)
        sync_folder(folder.parent)


@contextmanager
def own_group() -> Iterator[dist.ProcessGroup | None]:
    """A gloo group of all ranks: for CPU tensors, and apart from the collectives of training."""
    if not dist.is_initialized():
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=_timeout())
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def _timeout() -> timedelta | None:
    """The one that the default process group was given; torch has no public way to ask."""
    world = dist.group.WORLD
    try:
        found: timedelta = world._get_backend(next(iter(world._device_types))).options._timeout  # type: ignore[union-attr]
        return found
    except (AttributeError, RuntimeError, StopIteration):
        return None


@contextmanager
def _reporting(folder: Path) -> Iterator[None]:
    """Turn what goes wrong on any rank into one CheckpointError, and remove what was written."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (CheckpointException, OSError, RuntimeError) as error:
        if not dist.is_initialized() or dist.get_rank() == 0:
            shutil.rmtree(incomplete(folder), ignore_errors=True)
        failures = error.failures if isinstance(error, CheckpointException) else {}
        reasons = [f"rank {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in sorted(failures.items())]
        raise CheckpointError(f"{folder}: not written. " + ("; ".join(reasons) or str(error))) from error


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Put a folder's entries onto the disk, where the file system knows such a thing."""
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write plain data with a checksum of itself."""
    manifest = {"version": VERSION, **json.loads(json.dumps(manifest))}
    with path.open("w") as file:
        json.dump({**manifest, "sha256": _digest(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Elements [start, start + len(values)) of a flat logical tensor, to be read into ``values`` (and cast to its dtype)."""

    name: str
    start: int
    values: Tensor


class Checkpoint:
    """A complete portable checkpoint, open for reading.

    Raises:
        CheckpointError: a folder that is none, or whose manifest is damaged or of an unknown version.
    """

    def __init__(self, folder: Path) -> None:
        from ds_optforge.checkpoint import dcp

        self.folder = folder
        self.manifest = _read_manifest(folder)
        self._reader = dcp.Reader(str(folder))

    def damage(self, share: int = 0, shares: int = 1) -> list[str]:
        """What is wrong with the files, by size and checksum; of every ``shares``-th file only, from number ``share``."""
        problems = []
        if share == 0:
            strange = {path.name for path in self.folder.glob("*.safetensors")} - self.manifest["files"].keys()
            problems += [f"{self.folder / name}: is no part of the checkpoint" for name in sorted(strange)]
        for name, expected in list(self.manifest["files"].items())[share::shares]:
            path = self.folder / name
            if not path.is_file():
                problems.append(f"{path}: missing")
            elif (found := path.stat().st_size) != expected["bytes"]:
                problems.append(f"{path}: got {found} bytes; written: {expected['bytes']}")
            elif sha256_of(path) != expected["sha256"]:
                problems.append(f"{path}: its checksum is not that of what was written")
        return problems

    @property
    def identity(self) -> str:
        """The same for the same checkpoint."""
        return _digest(self.manifest)

    @cached_property
    def tensors(self) -> dict[str, tuple[int, torch.dtype]]:
        """Elements and dtype of each logical tensor, by name."""
        stored = self._reader.headers.state_dict_metadata
        return {name: (entry.size.numel(), entry.properties.dtype) for name, entry in stored.items()}  # type: ignore[union-attr]

    def read(self, requests: Sequence[Request]) -> None:
        """Fill the requests, this process alone. Names and ranges must be those of `tensors`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no process group takes part
            self._reader.fill(requests)

    def whole(self, name: str) -> Tensor:
        """One whole logical tensor, flat."""
        numel, dtype = self.tensors[name]
        values = torch.empty(numel, dtype=dtype)
        self.read([Request(name, 0, values)])
        return values


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        hint = f" ({incomplete(folder)} is what a save left that did not end)" if incomplete(folder).exists() else ""
        raise CheckpointError(
            f"{folder}: has no {MANIFEST}{hint}; allowed: a folder that save_checkpoint or 'ds-optforge convert' wrote"
        )
    try:
        manifest = json.loads(path.read_bytes())
        written = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    if written != _digest(manifest):
        raise CheckpointError(f"{path}: damaged: its checksum is not that of what was written")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{path}: got version {manifest.get('version')}; this ds_optforge reads version {VERSION}")
    found: dict[str, Any] = manifest
    return found
