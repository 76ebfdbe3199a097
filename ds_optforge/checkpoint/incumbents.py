"""Checkpoints of other optimizers, for `ds_optforge.checkpoint.convert`: Adam and Muon under DeepSpeed, and torch.optim.Muon.

Their moving averages are the same as ours, so training resumes with them. The groups get names of their own (``deepspeed0``,
``torch0``), and the manifest says whose they are (`FOREIGN`), so that `load_checkpoint` compares parameters and not groups.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_optforge.checkpoint.chunks import flat_chunk
from ds_optforge.checkpoint.engine_files import EngineCheckpoint, Found
from ds_optforge.checkpoint.logical import buffer_name, chunks_of, weight_name
from ds_optforge.checkpoint.torch_files import address, load
from ds_optforge.checkpoint.unsharded import MOMENTS, read_unsharded
from ds_optforge.errors import CheckpointError
from ds_optforge.zero.partition import Cut, Matrix, PartitionLayout, cuts_of_parameters
from ds_optforge.zero.placement import Placement

FOREIGN = "optimizer"  # the manifest's entry that names another optimizer than OptForge; ours have none

_MOMENTUM = "momentum_buffer"
_TORCH_FILE = '{"model": model.state_dict(), "optimizer": a state dict, or a list of them}'


def read_deepspeed(checkpoint: EngineCheckpoint, found: Found) -> str:
    """Add weights, state and groups that Adam or DeepSpeed's built-in Muon saved under DeepSpeed to ``found``.

    Returns:
        The name of the optimizer, for the manifest.

    Raises:
        CheckpointError: another optimizer saved the checkpoint, or Muon on ZeRO stage 0, or the files have an unknown layout.
    """
    if not isinstance(checkpoint.optimizer(0), Mapping):
        raise CheckpointError(f"{checkpoint.folder}: was saved with zero_optimization.elastic_checkpoint; allowed: without it")
    muon = any(group.get("use_muon") for group in checkpoint.optimizer(0)["param_groups"])
    if not muon:
        _refuse_other_than_adam(checkpoint)
    shapes_of = checkpoint.model["param_shapes"]
    if shapes_of is not None:
        for number in range(len(shapes_of)):
            _read_slices(_Slice(checkpoint, number), found)
    elif muon:
        raise CheckpointError(f"{checkpoint.folder}: was saved by DeepSpeed's Muon on ZeRO stage 0; allowed: 1, 2, 3")
    else:
        read_unsharded(checkpoint, found)
    return "DeepSpeed's Muon" if muon else "Adam"


def _refuse_other_than_adam(checkpoint: EngineCheckpoint) -> None:
    """Raise CheckpointError where the state is not that of Adam or AdamW, by torch or by DeepSpeed, after a step."""
    optimizer, folder = checkpoint.optimizer(0), checkpoint.folder
    allowed = "allowed: OptForge, Adam, AdamW, DeepSpeed's Muon, and a file of torch.optim.Muon"
    name = (checkpoint.model["ds_config"].get("optimizer") or {}).get("type")
    if name is not None and name.lower() not in ("adam", "adamw"):
        raise CheckpointError(f"{folder}: was saved by {name}; {allowed}")
    keys = {key for state in optimizer["state"].values() for key in state} - {"step"}
    for option in ("amsgrad", "maximize"):
        if any(group.get(option) for group in optimizer["param_groups"]):
            raise CheckpointError(f"{folder}: was saved by an Adam with {option}; allowed: without it")
    if not keys:
        raise CheckpointError(f"{folder}: was saved before its run took a step; allowed: after one")
    if keys != set(MOMENTS):
        raise CheckpointError(f"{folder}: holds the state {sorted(keys)} of another optimizer; {allowed}")


def _read_slices(whole: "_Slice", found: Found) -> None:
    """Add a parameter group (ZeRO-1/2) or sub-group (ZeRO-3) from the slices of all ranks."""
    found.shapes |= {name: list(shape) for name, shape in whole.shapes.items()}
    step = 0
    for shard in range(len(whole.checkpoint.shards)):
        whole.refuse_other_size(shard)
        tensor, state = whole.tensor(shard), dict(whole.state(shard))
        momentum = state.pop(_MOMENTUM, None)
        if momentum is not None and momentum.numel() != whole.size:
            _read_whole_momenta(whole, shard, momentum, found)
        elif momentum is not None:
            state[_MOMENTUM] = momentum
        step = max(step, int(state.pop("step", 0)))
        buffers = [key for key, value in state.items() if isinstance(value, Tensor) and value.numel() >= tensor.numel()]
        found.chunks += chunks_of(whole.placement(shard), [tensor], [state], buffers, ())
    step = step or int(whole.group.get("step", 0)) or _steps_taken(whole.checkpoint)
    rule = "muon" if whole.group.get("use_muon") else "adamw"
    found.add_members(f"deepspeed{whole.group_number}", rule, step, whole.shapes)


def _steps_taken(checkpoint: EngineCheckpoint) -> int:
    return int(checkpoint.model["global_steps"]) - int(checkpoint.model["skipped_steps"])


@dataclass(frozen=True, slots=True)
class _Slice:
    """The slices of all ranks of one parameter group (ZeRO-1/2) or sub-group (ZeRO-3), as DeepSpeed saved them."""

    checkpoint: EngineCheckpoint
    number: int

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        shapes: Mapping[str, torch.Size] = self.checkpoint.model["param_shapes"][self.number]
        return shapes

    @property
    def partitioned(self) -> bool:
        """True where each parameter is cut (ZeRO-3), False where the whole group is (ZeRO-1/2)."""
        return "fp32_flat_groups" in self.checkpoint.shards[0]

    @property
    def group(self) -> Mapping[str, Any]:
        groups: Sequence[Mapping[str, Any]] = self.checkpoint.optimizer(0)["param_groups"]
        return groups[self.group_number]

    @property
    def group_number(self) -> int:
        """The number of the parameter group, of which ZeRO-3 may have made several sub-groups."""
        groups = self.checkpoint.optimizer(0)["param_groups"]
        return next(index for index, group in enumerate(groups) if self.number in group["params"])

    def tensor(self, shard: int) -> Tensor:
        return self.checkpoint.slices(shard)[self.number]

    def refuse_other_size(self, shard: int) -> None:
        """Raise CheckpointError where ZeRO-3 has cut the parameters over other ranks than all, or keeps them elsewhere."""
        numels = [torch.Size(shape).numel() for shape in self.shapes.values()]
        ranks, found = len(self.checkpoint.shards), self.tensor(shard).numel()
        needed = cuts_of_parameters(numels, ranks)[1] if self.partitioned else 0
        if found < needed:
            raise CheckpointError(
                f"{self.checkpoint.folder}: rank {shard} holds {found} elements of sub-group {self.number}; allowed: {needed}, "
                f"cut over all {ranks} ranks and in memory (no MiCS, no NVMe)"
            )

    def state(self, shard: int) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self.checkpoint.optimizer(shard)["state"].get(self.number, {})
        return state

    @property
    def size(self) -> int:
        """Elements of the slice, padding included."""
        paddings = self.checkpoint.shards[0].get("group_paddings")
        return self.tensor(0).numel() + (int(paddings[self.number]) if paddings and not self.partitioned else 0)

    def placement(self, shard: int) -> Placement:
        numels = [torch.Size(shape).numel() for shape in self.shapes.values()]
        world = len(self.checkpoint.shards)
        if self.partitioned:
            cuts, _ = cuts_of_parameters(numels, world)
        else:
            alignment = self.checkpoint.shards[0].get("param_alignment_paddings")
            paddings = alignment[self.number] if alignment else [0] * len(numels)
            ends = accumulate((n + padding for n, padding in zip(numels, paddings, strict=True)), initial=0)
            cuts = [Cut(base, self.size, 0) for base, _ in zip(ends, numels, strict=False)]
        matrices = [Matrix(index, 0, 1, numel) for index, numel in enumerate(numels)]
        return Placement(PartitionLayout(world, tuple(self.shapes), tuple(cuts), tuple(matrices)), shard, (0,))


def _read_whole_momenta(whole: _Slice, shard: int, momentum: Tensor, found: Found) -> None:
    """Add momenta of ZeRO-1/2: whole, one behind the other, of every parameter that the rank holds a fragment of."""
    placement = whole.placement(shard)
    offset = 0
    for index, name in enumerate(placement.layout.names):
        if placement.held(index) is not None:
            numel = placement.numel(index)
            found.chunks.append(flat_chunk(buffer_name(name, _MOMENTUM), numel, 0, momentum.narrow(0, offset, numel)))
            offset += numel
    if offset != momentum.numel():
        raise CheckpointError(
            f"{whole.checkpoint.folder}: group {whole.number} of rank {shard} holds {momentum.numel()} elements of momentum; "
            f"known: {whole.size} or {offset}"
        )


def from_torch(path: Path) -> tuple[Found, dict[str, Any]]:
    """Read a file of plain PyTorch: ``torch.save({"model": ..., "optimizer": ...})`` with torch.optim.Muon.

    Returns:
        Everything that was read, and the entries of the manifest beside it.

    Raises:
        CheckpointError: the file has another content or another optimizer's momentum, or its parameters have no names.
    """
    saved = load(path)
    if not isinstance(saved, dict) or not {"model", "optimizer"} <= saved.keys():
        raise CheckpointError(f"{path}: got {_kind(saved)}; allowed: torch.save of {_TORCH_FILE}")
    first_names = {address(value): name for name, value in reversed(saved["model"].items())}  # of tied weights
    model = {name: value for name, value in saved["model"].items() if first_names[address(value)] == name}
    optimizers = saved["optimizer"]
    found = Found(shapes={name: list(value.shape) for name, value in model.items()})
    found.chunks += [flat_chunk(weight_name(name), value.numel(), 0, value.reshape(-1)) for name, value in model.items()]
    steps = 0
    for number, optimizer in enumerate(optimizers if isinstance(optimizers, list) else [optimizers]):
        step, members, rule = 0, [], "muon" if "ns_steps" in optimizer["param_groups"][0] else "adamw"
        for name, state in _states(path, model, optimizer):
            members.append(name)
            if _MOMENTUM in state and rule != "muon":
                raise CheckpointError(f"{path}: holds the momentum of another optimizer than torch.optim.Muon for '{name}'")
            step = max(step, int(state.get("step", 0)))
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == model[name].shape and key != "step":
                    found.chunks.append(flat_chunk(buffer_name(name, key), value.numel(), 0, value.reshape(-1)))
        found.add_members(f"torch{number}", rule, step, members)
        steps = max(steps, step)
    for group in found.groups.values():  # torch.optim.Muon counts no steps
        group["step"] = group["step"] or max(steps, 1)
    counters = {"global_steps": steps, "global_samples": 0, "skipped_steps": 0}
    return found, {
        "counters": counters,
        "loss_scale": {},
        "scheduler": None,
        "client_state": {},
        "written_by": {"converted_from": "torch"},
        FOREIGN: "torch.optim.Muon",
    }


def _states(path: Path, model: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(parameter name, its state) of a torch optimizer, which knows the names that it was given."""
    names = [name for group in optimizer["param_groups"] for name in group.get("param_names", ())]
    indices = [index for group in optimizer["param_groups"] for index in group["params"]]
    if not names and len(indices) == len(model):
        names = list(model)
    if len(names) != len(indices) or not set(names) <= model.keys():
        raise CheckpointError(
            f"{path}: the optimizer does not name its {len(indices)} parameters; allowed: an optimizer that was made of "
            "model.named_parameters() (torch 2.6 or later), or of all parameters in the model's order"
        )
    for name, index in zip(names, indices, strict=True):
        yield name, optimizer["state"].get(index, {})


def _kind(value: Any) -> str:
    return f"a dict of {sorted(map(str, value))[:5]}" if isinstance(value, dict) else f"a {type(value).__name__}"
