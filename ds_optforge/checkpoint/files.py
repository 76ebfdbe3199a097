"""The files of a portable checkpoint: safetensors by torch.distributed.checkpoint, a manifest with checksums, one rename.

    DIR/checkpoint.json                     the manifest: plain JSON, the last file written
    DIR/shard-<rank>-model-<n>-of-<N>.safetensors

Everything is written into ``DIR.incomplete``, which becomes DIR when all of it is on the disk. Nothing here runs code from
a file: safetensors and JSON hold data only.
"""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from ds_optforge import reading
from ds_optforge.checkpoint.chunks import Chunk, Request, files_of
from ds_optforge.checkpoint.manifest import digest_of, incomplete, read_manifest, sha256_of, sync_folder
from ds_optforge.errors import CheckpointError


def write(folder: Path, chunks: Sequence[Chunk], manifest: Mapping[str, Any]) -> None:
    """Write a checkpoint. Collective over the default process group; a process without a group writes alone.

    Args:
        folder: the folder to make, on a file system that all ranks share; it must not exist.
        chunks: this rank's chunks; the same chunk may come from several ranks.
        manifest: plain data that `Checkpoint.manifest` gives back; only rank 0's is written.

    Raises:
        CheckpointError: on all ranks, when any rank failed; what was written is removed.
    """
    from ds_optforge.checkpoint import dcp

    with _reporting(folder), own_group() as group, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.write(folder, chunks, manifest, group)


def write_in_background(folder: Path, chunks: Sequence[Chunk], manifest: Mapping[str, Any]) -> Future[None]:
    """Write as `write` does, but return when the chunks have been copied to host memory.

    The future holds the result, or the CheckpointError, once the checkpoint is complete.
    """
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


def write_weights(folder: Path, chunks: Sequence[Chunk], beside: Mapping[str, bytes]) -> None:
    """Write whole tensors as a Hugging Face model's weights, in this process alone.

    There is one model.safetensors, or model-00001-of-0000N.safetensors and so on with their index, as transformers names them.

    Args:
        folder: the folder to make; it must not exist.
        chunks: whole tensors, by the names of the model.
        beside: the contents of other files, by name.

    Raises:
        CheckpointError: the folder exists, or could not be written.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} is there already; allowed: a new folder")
    temporary = incomplete(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    with _reporting(folder):
        temporary.mkdir(parents=True)
        for name, content in beside.items():
            (temporary / name).write_bytes(content)
        _write_safetensors(temporary, chunks)
        temporary.rename(folder)
        sync_folder(folder.parent)


def _write_safetensors(folder: Path, chunks: Sequence[Chunk]) -> None:
    numbers = files_of([chunks])
    count = max(numbers.values(), default=0)
    name_of = {n: f"model-{n:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors" for n in range(1, count + 1)}
    for number, name in name_of.items():
        held = [chunk for chunk in chunks if numbers[chunk.name] == number]
        tensors = {chunk.name: chunk.values if isinstance(chunk.values, Tensor) else chunk.values() for chunk in held}
        save_file(tensors, folder / name, metadata={"format": "pt"})  # which transformers asks for
    if count > 1:
        index = {
            "metadata": {"total_size": sum(chunk.nbytes for chunk in chunks)},
            "weight_map": {chunk.name: name_of[numbers[chunk.name]] for chunk in chunks},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def own_group() -> Iterator[dist.ProcessGroup | None]:
    """Yield a gloo group of all ranks, for CPU tensors and apart from the collectives of training; None without ranks.

    Making and leaving it are collective.
    """
    if not dist.is_initialized():
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=_timeout())
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def _timeout() -> timedelta | None:
    """The timeout that the default process group was given; torch has no public way to ask."""
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
        failures = error.failures if isinstance(error, CheckpointException) else {}
        others = any(isinstance(cause, BlockingIOError) for cause, _ in failures.values())  # not ours to remove
        if not others and (not dist.is_initialized() or dist.get_rank() == 0):
            shutil.rmtree(incomplete(folder), ignore_errors=True)
        reasons = [f"rank {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in sorted(failures.items())]
        raise CheckpointError(f"{folder}: not written. " + ("; ".join(reasons) or str(error))) from error


def _outside(folder: Path, name: str) -> str:
    """Why a name of the manifest is not that of a file in its folder; "" where it is."""
    try:
        return "" if reading.inside(folder, name).parent == folder else f"lies in another folder than {folder}"
    except ValueError as error:
        return str(error)


class Checkpoint:
    """A complete portable checkpoint, open for reading.

    Raises:
        CheckpointError: the folder is no checkpoint, or its manifest is damaged or of an unknown version.
    """

    def __init__(self, folder: Path) -> None:
        from ds_optforge.checkpoint import dcp

        self.folder = folder
        self.manifest = read_manifest(folder)
        self._reader = dcp.Reader(str(folder))

    def damage(self, share: int = 0, shares: int = 1) -> list[str]:
        """Compare the files with the sizes and checksums of the manifest; return a line per problem.

        Args:
            share, shares: check every ``shares``-th file only, from number ``share`` on, so that ranks share the work.
        """
        problems = []
        if share == 0:
            strange = {path.name for path in self.folder.glob("*.safetensors")} - self.manifest["files"].keys()
            problems += [f"{self.folder / name}: is no part of the checkpoint" for name in sorted(strange)]
        for name, expected in list(self.manifest["files"].items())[share::shares]:
            path = self.folder / name
            if outside := _outside(self.folder, name):
                problems.append(f"{path}: {outside}; allowed: a file of the folder itself")
            elif not path.is_file():
                problems.append(f"{path}: missing")
            elif (found := path.stat().st_size) != expected["bytes"]:
                problems.append(f"{path}: got {found} bytes; written: {expected['bytes']}")
            elif sha256_of(path) != expected["sha256"]:
                problems.append(f"{path}: its checksum is not that of what was written")
        return problems

    @property
    def identity(self) -> str:
        """A digest of the manifest, equal for equal checkpoints."""
        return digest_of(self.manifest)

    @cached_property
    def tensors(self) -> dict[str, tuple[int, torch.dtype]]:
        """Number of elements and dtype of each logical tensor, by name.

        Raises:
            CheckpointError: files of which the headers cannot be read, or say something else than `write` does.
        """
        stored = self._reader.headers.state_dict_metadata
        return {name: (entry.size.numel(), entry.properties.dtype) for name, entry in stored.items()}  # type: ignore[union-attr]

    def read(self, requests: Sequence[Request]) -> None:
        """Read every request's range into its values, in this process alone.

        Raises:
            CheckpointError: a name or a range that is not one of `tensors`.
        """
        for request in requests:
            numel, _ = self.tensors.get(request.name, (0, None))
            if not 0 <= request.start <= numel - request.values.numel():
                raise CheckpointError(
                    f"{self.folder}: '{request.name}' has {numel} elements; needed: {request.values.numel()} from "
                    f"{request.start} on"
                )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no process group takes part
            self._reader.fill(requests)

    def whole(self, name: str) -> Tensor:
        """Read one whole logical tensor, flat."""
        numel, dtype = self.tensors[name]
        values = torch.empty(numel, dtype=dtype)
        self.read([Request(name, 0, values)])
        return values
