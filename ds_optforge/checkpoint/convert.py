"""``ds-optforge convert``: a portable checkpoint from one that ``engine.save_checkpoint`` wrote, without ranks or a model.

It reads checkpoints of OptForge, whose state says where everything lies (`OptForge.state_dict`), of Adam and DeepSpeed's
built-in Muon under DeepSpeed, and of torch.optim.Muon (`incumbents`). A tensor is in memory only while it is written.
"""

import logging
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ds_optforge.checkpoint import files, incumbents
from ds_optforge.checkpoint.chunks import Chunk, flat_chunk
from ds_optforge.checkpoint.engine_files import EngineCheckpoint, Found, address, open_checkpoint
from ds_optforge.checkpoint.logical import absmax_of, add_members, block_cuts, chunks_of, owned_chunks, weight_name
from ds_optforge.checkpoint.manifest import plain
from ds_optforge.checkpoint.positions import POSITION
from ds_optforge.errors import CheckpointError
from ds_optforge.step.groups import GROUP
from ds_optforge.zero.engine import COUNTERS
from ds_optforge.zero.partition import Per
from ds_optforge.zero.placement import Placement

logger = logging.getLogger("ds_optforge")


def convert(source: Path, out: Path) -> None:
    """Write a portable checkpoint from an engine checkpoint or from a file of plain PyTorch.

    Args:
        source: the folder that ``engine.save_checkpoint`` wrote, or the file that torch.save wrote (`incumbents.from_torch`).
        out: the folder to make; it must not exist.

    Raises:
        CheckpointError: the source cannot be read, or is incomplete, or ``out`` exists or cannot be written.
    """
    chunks, manifest = read(source)
    with progress(chunks, "convert") as counted:
        files.write(out, counted, manifest)


def read(source: Path) -> tuple[list[Chunk], dict[str, Any]]:
    """Read what `convert` writes, a tensor at a time.

    Args:
        source: as in `convert`.

    Returns:
        A chunk for each logical tensor, whose values are a function that assembles them; and the manifest.

    Raises:
        CheckpointError: the source cannot be read, or is incomplete.
    """
    if source.is_file():
        found, manifest = incumbents.from_torch(source)
    else:
        stages, found, foreign = open_checkpoint(source), Found(), {}
        for checkpoint in stages:
            if "optforge" in checkpoint.optimizer(0):
                _read_optforge(checkpoint, found)
            elif len(stages) > 1:
                raise CheckpointError(f"{checkpoint.folder}: is a pipeline's of another optimizer; allowed: OptForge's")
            else:
                foreign = {incumbents.FOREIGN: incumbents.read_deepspeed(checkpoint, found)}
        _read_untrained(stages[0], found)
        manifest = _manifest(stages) | foreign
        if foreign and manifest["scheduler"]:  # the rest is the rates of other groups, and may be no plain data
            manifest["scheduler"] = {key: manifest["scheduler"][key] for key in POSITION if key in manifest["scheduler"]}
    manifest |= {"shapes": found.shapes, "groups": found.groups, "block_cuts": found.block_cuts}
    whole = list(_whole(found.chunks, source))
    _refuse_other_copies(whole, found.copies, source)
    return whole, manifest


def _manifest(stages: Sequence[EngineCheckpoint]) -> dict[str, Any]:
    checkpoint, model = stages[0], stages[0].model
    scheduler = model.get("lr_scheduler")
    if scheduler is not None and "last_epoch" not in scheduler:  # DeepSpeed's own count from -1, under another name
        taken = model["global_steps"] - model["skipped_steps"]
        scheduler = {**scheduler, "last_epoch": scheduler.get("last_batch_iteration", taken - 1) + 1}
    return {
        "counters": {key: model[key] for key in COUNTERS},
        "loss_scale": checkpoint.loss_scale,
        "scheduler": scheduler,
        "client_state": _plain_entries(checkpoint.client_state, checkpoint.folder),
        "written_by": {"converted_from": "engine.save_checkpoint", "world_size": sum(len(stage.shards) for stage in stages)},
    }


def _plain_entries(client_state: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Leave out the entries that a manifest cannot hold, with a warning for each: nobody can save the checkpoint again."""
    found: dict[str, Any] = {}
    for key, value in client_state.items():
        try:
            found |= plain({key: value}, f"{folder}: '{key}' of the client_state")
        except CheckpointError as error:
            logger.warning("%s; it is left out", error)
    return found


def _read_optforge(checkpoint: EngineCheckpoint, found: Found) -> None:
    module = checkpoint.model["module"]
    known = set(found.shapes)  # of earlier stages of a pipeline, which may hold the same parameters
    for shard in range(len(checkpoint.shards)):
        optimizer, slices = checkpoint.optimizer(shard), checkpoint.slices(shard)
        if not optimizer["optforge"]:
            raise CheckpointError(f"{checkpoint.folder}: was saved before its run took a step; allowed: after one")
        for stepped in optimizer["optforge"]:
            placement = Placement.from_plain(stepped["placement"])
            names = placement.layout.names
            tensors = [slices[i] for i in stepped["tensors"]] if slices else [module[name] for name in names]
            states = [optimizer["state"][i] for i in stepped["tensors"]]
            found.chunks += chunks_of(placement, tensors, states, stepped["buffers"], _statistics(stepped), known)
            found.chunks += owned_chunks(placement, states, stepped.get("factors", ()), known)
            copies = [name for name in names if name in known]
            found.copies += chunks_of(placement, tensors, states, (), (), set(names).difference(copies))
            if shard == 0:
                _describe(stepped, placement, states[0], optimizer["param_groups"], found, known)


def _statistics(stepped: Mapping[str, Any]) -> list[tuple[str, Per]]:
    """(name, per) of a rule's statistics. Until version 0.1 a rule had one at most, per row."""
    if "statistics" not in stepped:
        return [(stepped["row_buffer"], "row")] if stepped["row_buffer"] else []
    return [(name, per) for name, per in stepped["statistics"]]


def _describe(
    stepped: Mapping[str, Any],
    placement: Placement,
    state: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    found: Found,
    known: Container[str],
) -> None:
    """Enter what one call of ``step()`` updates (``stepped``) into the groups, shapes and block cuts of the manifest."""
    group = next(group for group in groups if group[GROUP] == stepped["group"])
    names = [name for name in placement.layout.names if name not in known]
    add_members(found.groups, stepped["group"], stepped["rule"], group, state, names)
    for index, name in enumerate(placement.layout.names):
        if name in known:
            continue
        found.shapes[name] = stepped["shapes"][index]
        if any(absmax_of(buffer) in state for buffer in stepped["buffers"]) and (cuts := block_cuts(placement, index)):
            found.block_cuts[name] = cuts


def _read_untrained(checkpoint: EngineCheckpoint, found: Found) -> None:
    """Add frozen parameters and buffers: whole in the model's state dict, or partitioned (ZeRO-3)."""
    model = checkpoint.model
    module = model["module"]
    frozen = model.get("frozen_param_shapes") or {}
    partitioned = "fp32_flat_groups" in checkpoint.shards[0]
    if partitioned:
        for rank, of_rank in enumerate(checkpoint.models):
            for name, fragment in (of_rank.get("frozen_param_fragments") or {}).items():
                numel = torch.Size(frozen[name]).numel()
                start = min(rank * fragment.numel(), numel)
                unpadded = fragment.view(-1).narrow(0, 0, min(fragment.numel(), numel - start))
                if unpadded.numel():
                    found.chunks.append(flat_chunk(weight_name(name), numel, start, unpadded))
        found.shapes |= {name: list(shape) for name, shape in frozen.items()}
    known = {address(module[name]) for name in found.shapes if name in module}
    for name, value in module.items():
        is_buffer = name in model["buffer_names"]
        if name in found.shapes or not isinstance(value, Tensor) or (partitioned and not is_buffer):
            continue
        if is_buffer or not value.numel() or address(value) not in known:  # else another name of a tied weight
            known.add(address(value))
            found.shapes[name] = list(value.shape)
            if value.numel():
                found.chunks.append(flat_chunk(weight_name(name), value.numel(), 0, value.reshape(-1)))


def _whole(chunks: Iterable[Chunk], source: Path) -> Iterator[Chunk]:
    """One chunk per tensor, assembled when it is written. Raises CheckpointError for a tensor that is incomplete."""
    found: dict[str, dict[int, Chunk]] = {}
    for chunk in chunks:
        found.setdefault(chunk.name, {})[chunk.offsets[0]] = chunk
    for name, by_start in found.items():
        first = next(iter(by_start.values()))
        numel = sum(chunk.shape[0] for chunk in by_start.values())
        if numel != first.size[0]:
            raise CheckpointError(f"{source}: holds {numel} of the {first.size[0]} elements of '{name}': is a file missing?")
        yield Chunk(name, first.size, (0,), first.size, first.dtype, _Assembled(tuple(by_start.values())))


def _refuse_other_copies(whole: Sequence[Chunk], copies: Sequence[Chunk], source: Path) -> None:
    """Raise CheckpointError where a later stage of a pipeline holds other values of a parameter than the first that has it."""
    by_name = {chunk.name: chunk for chunk in whole}
    for copy in copies:
        first = by_name[copy.name].values
        assert isinstance(first, _Assembled)
        if not torch.equal(first().narrow(0, copy.offsets[0], copy.shape[0]), _tensor(copy)):
            raise CheckpointError(
                f"{source}: stages of the pipeline hold different values of '{copy.name.removeprefix(weight_name(''))}', which "
                "its TiedLayerSpec does not tie; allowed: tied_weight_attr with every parameter of the layer"
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Assembled:
    """Assembles a tensor from its chunks, each a range of the flat tensor."""

    chunks: tuple[Chunk, ...]

    def __call__(self) -> Tensor:
        if len(self.chunks) == 1:
            return _tensor(self.chunks[0])
        values = torch.empty(self.chunks[0].size, dtype=self.chunks[0].dtype)
        for chunk in self.chunks:
            values.narrow(0, chunk.offsets[0], chunk.shape[0]).copy_(_tensor(chunk))
        return values


def _tensor(chunk: Chunk) -> Tensor:
    assert isinstance(chunk.values, Tensor)
    return chunk.values


@dataclass(frozen=True, slots=True, eq=False)
class _Counted:
    """Advances a progress bar when a tensor is made."""

    make: Any
    bar: Any
    nbytes: int

    def __call__(self) -> Tensor:
        tensor: Tensor = self.make()
        self.bar.update(self.nbytes)
        return tensor


@contextmanager
def progress(chunks: Iterable[Chunk], what: str) -> Iterator[list[Chunk]]:
    """Yield the chunks with a progress bar that advances as they are written."""
    chunks = list(chunks)
    total = sum(chunk.nbytes for chunk in chunks)
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, mininterval=0.5) as bar:
        yield [replace(chunk, values=_Counted(chunk.values, bar, chunk.nbytes)) for chunk in chunks]
