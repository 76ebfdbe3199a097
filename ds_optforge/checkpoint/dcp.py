"""Planners, writer and reader of torch.distributed.checkpoint (DCP), as `ds_optforge.checkpoint.files` uses them.

Importing torch.distributed.checkpoint takes long, so that module imports this one when it first writes or reads.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.storage import WriteResult

from ds_optforge.checkpoint.chunks import Chunk, Request, files_of
from ds_optforge.checkpoint.manifest import MANIFEST, WriterLock, incomplete, sha256_of, sync_folder, write_manifest
from ds_optforge.errors import CheckpointError
from ds_optforge.reading import json_value

_OFFSETS = "DCP_SHARDING_INFO"  # DCP's entry in the header of a file: where each of its chunks begins in its tensor


def write(folder: Path, chunks: Sequence[Chunk], manifest: Mapping[str, Any], group: dist.ProcessGroup | None) -> None:
    """Write a checkpoint together with the ranks of ``group``.

    Raises:
        CheckpointException: from DCP, when any rank fails; it names the ranks.
        OSError: the file system fails.
    """
    planner, writer = _SavePlanner(chunks), _Writer(folder, manifest)
    save(_values(chunks), storage_writer=writer, planner=planner, process_group=group)


def start_writing(
    folder: Path, chunks: Sequence[Chunk], manifest: Mapping[str, Any], group: dist.ProcessGroup | None
) -> Future[Any]:
    """Start to write a checkpoint as `write` does; return when the chunks have been copied to host memory."""
    planner, writer = _SavePlanner(chunks), _Writer(folder, manifest)
    saving = async_save(_values(chunks), storage_writer=writer, planner=planner, process_group=group)
    assert isinstance(saving, Future)
    return saving


def _values(chunks: Sequence[Chunk]) -> dict[str, Any]:
    return {_key(chunk.name, chunk.offsets): chunk.values for chunk in chunks}


def _key(name: str, offsets: Sequence[int]) -> str:
    """Of a chunk: a rank can have several of one tensor, where tensor parallelism cuts it into parts or within rows."""
    return f"{name} {tuple(offsets)}"


class _SavePlanner(DefaultSavePlanner):
    """Lists one rank's chunks. The base class writes a chunk of several ranks once, and refuses gaps and overlaps."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks = chunks

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(chunk) for chunk in self._chunks])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        values = self.state_dict[_key(index.fqn, index.offset)]
        tensor: Tensor = values() if callable(values) else values
        return tensor


def _write_item(chunk: Chunk) -> WriteItem:
    offsets = torch.Size(chunk.offsets)
    return WriteItem(
        MetadataIndex(chunk.name, offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            ChunkStorageMetadata(offsets, torch.Size(chunk.shape)), TensorProperties(chunk.dtype), torch.Size(chunk.size)
        ),
    )


@dataclass(frozen=True, slots=True)
class _File:
    """A file that a rank has written."""

    name: str
    nbytes: int
    sha256: str


class _Writer(HuggingFaceStorageWriter):
    """Adds to the base class: files of bounded size, checksums, a manifest, and one rename that makes the checkpoint appear."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self._folder, self._temporary, self._manifest = folder, incomplete(folder), manifest
        super().__init__(str(self._temporary), save_distributed=True)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the temporary folder and share out the files; runs on the coordinator alone, before any rank writes.

        Raises:
            FileExistsError: the checkpoint exists.
            BlockingIOError: another job is writing it.
        """
        if self._folder.exists():
            raise FileExistsError(f"{self._folder} is there already; a checkpoint is never overwritten")
        self._lock = WriterLock(self._temporary)  # prepare_local_plan has made the folder
        self.fqn_to_index_mapping = _share_out(plans)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: Any) -> Any:
        """Write this rank's files; report each with its size and checksum."""
        results = [
            result
            for number, items in enumerate(_one_of_each(plan.items))
            for result in super(_Writer, self).write_data(_in_files(plan, items, number), planner).value()
        ]
        first = {result.storage_data.relative_path: result for result in results}
        records = []
        for name, result in first.items():
            path = self._temporary / name
            record = _File(name, path.stat().st_size, sha256_of(path))
            records.append(WriteResult(result.index, record.nbytes, record))
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result(records)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest and rename the folder; runs on the coordinator, when all ranks have written.

        Raises:
            FileNotFoundError: rank 0 does not see a file that another rank wrote.
        """
        files = {record.name: record for of_rank in results for record in (result.storage_data for result in of_rank)}
        for record in files.values():
            path = self._temporary / record.name
            if not path.is_file() or path.stat().st_size != record.nbytes:
                raise FileNotFoundError(
                    f"{path}: written by another rank, but not seen by rank 0; the folder must be one that all hosts share"
                )
        listed = {r.name: {"bytes": r.nbytes, "sha256": r.sha256} for r in files.values()}
        write_manifest(self._temporary / MANIFEST, {**self._manifest, "files": dict(sorted(listed.items()))})
        sync_folder(self._temporary)
        self._temporary.rename(self._folder)
        self._lock.release(self._folder)
        sync_folder(self._folder.parent)


def _one_of_each(items: Iterable[WriteItem]) -> list[list[WriteItem]]:
    """Divide them so that no tensor occurs twice in a list: a file holds one chunk of a tensor."""
    lists: list[list[WriteItem]] = []
    seen: Counter[str] = Counter()
    for item in items:
        number = seen[item.index.fqn]
        if number == len(lists):
            lists.append([])
        lists[number].append(item)
        seen[item.index.fqn] += 1
    return lists


def _in_files(plan: SavePlan, items: list[WriteItem], number: int) -> SavePlan:
    """The plan of these items alone, in files of their own: ``number`` times as many files are before them."""
    numbers: dict[str, int] = plan.storage_data["fqn_to_index_mapping"]
    before = number * max(numbers.values())
    mapping = {name: before + file for name, file in numbers.items()}
    return replace(plan, items=items, storage_data={**plan.storage_data, "fqn_to_index_mapping": mapping})


def _share_out(plans: Sequence[SavePlan]) -> dict[str, int]:
    """Number the file of each tensor (`files_of`) from DCP's plans."""
    as_chunks = []
    for plan in plans:
        data = [(item.index.fqn, item.tensor_data) for item in plan.items]
        as_chunks.append([Chunk(n, (), (), tuple(d.chunk.sizes), d.properties.dtype, torch.empty(0)) for n, d in data if d])
    return files_of(as_chunks)


class Reader(HuggingFaceStorageReader):
    """Reads ranges of tensors in this process alone; reads the headers of the files once."""

    @cached_property
    def headers(self) -> Metadata:
        """Names, shapes, data types and chunks of all tensors.

        Raises:
            CheckpointError: a header that cannot be read, or a tensor that is not whole, or is in a file twice.
        """
        for path in sorted(Path(self.path).glob("*.safetensors")):
            _check_header(path)
        try:
            found = super().read_metadata()
        except (LookupError, TypeError, ValueError) as error:  # a data type that torch lacks, two chunks in one place
            raise CheckpointError(f"{self.path}: the headers cannot be read ({type(error).__name__}: {error})") from None
        for name, stored in found.state_dict_metadata.items():
            _refuse_gaps(Path(self.path), name, stored)
        return found

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the headers, as DCP asks for them."""
        return self.headers

    def fill(self, requests: Sequence[Request]) -> None:
        """Read every request's range into its values. Names and ranges must be those of the checkpoint."""
        load({}, storage_reader=self, planner=_LoadPlanner(requests), no_dist=True)


def _check_header(path: Path) -> None:
    """Read the header of a file as DCP will. Raises CheckpointError where that would fail, or say nonsense."""
    try:
        with safe_open(path, framework="pt") as file:
            offsets = json_value(file.metadata()[_OFFSETS])
            for name in file.keys():  # noqa: SIM118 - it is no dict
                (numel,), (start,) = file.get_slice(name).get_shape(), offsets[name]["saved_offsets"]
                if type(start) is not int or not 0 <= start < 2**63 - numel:
                    raise ValueError(f"'{name}' begins at element {start!r}")
    except (SafetensorError, LookupError, OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header cannot be read ({type(error).__name__}: {error})") from None


def _refuse_gaps(folder: Path, name: str, stored: Any) -> None:
    """Raise CheckpointError for a tensor whose chunks do not follow each other: memory is allocated by its size alone."""
    chunks = sorted((chunk.offsets[0], chunk.sizes[0]) for chunk in stored.chunks)
    ends = [0, *(start + numel for start, numel in chunks)]
    if [start for start, _ in chunks] != ends[:-1] or ends[-1] != stored.size[0]:
        raise CheckpointError(f"{folder}: the files hold some elements of '{name}' twice, or not at all")


class _LoadPlanner(DefaultLoadPlanner):
    """Reads ranges out of whatever chunks the checkpoint has."""

    def __init__(self, requests: Sequence[Request]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._requests = requests

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self._stored = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for index, request in enumerate(self._requests):
            items += _read_items(index, request, self._stored[request.name].chunks)  # type: ignore[union-attr]
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index.index
        assert index is not None
        return self._requests[index].values.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: the values were read into their place."""


def _read_items(index: int, request: Request, chunks: Sequence[ChunkStorageMetadata]) -> Iterator[ReadItem]:
    chunks = sorted(chunks, key=lambda chunk: chunk.offsets[0])
    end = request.start + request.values.numel()
    first = max(bisect_right([chunk.offsets[0] for chunk in chunks], request.start) - 1, 0)
    for chunk in chunks[first:]:
        low, high = max(request.start, chunk.offsets[0]), min(end, chunk.offsets[0] + chunk.sizes[0])
        if low >= end:
            break
        yield ReadItem(
            LoadItemType.TENSOR,
            MetadataIndex(request.name, index=index),
            torch.Size([low - request.start]),
            MetadataIndex(request.name, chunk.offsets),
            torch.Size([low - chunk.offsets[0]]),
            torch.Size([high - low]),
        )
