"""Checkpoints of other Muons, for `ds_optforge.checkpoint.convert`: DeepSpeed's built-in one, and torch.optim.Muon.

Their momentum is the same moving average as ours, so training resumes with it. The groups get names of their own
(``deepspeed0``, ``torch0``), so `load_checkpoint` takes such a checkpoint with ``strict=False``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_optforge.checkpoint.chunks import flat_chunk
from ds_optforge.checkpoint.engine_files import EngineCheckpoint, Found, address, load
from ds_optforge.checkpoint.logical import buffer_name, chunks_of, weight_name
from ds_optforge.errors import CheckpointError
from ds_optforge.zero.partition import Cut, Matrix, PartitionLayout, cuts_of_parameters
from ds_optforge.zero.placement import Placement

_MOMENTUM = "momentum_buffer"
_TORCH_FILE = '{"model": model.state_dict(), "optimizer": a state dict, or a list of them}'


def read_deepspeed_muon(checkpoint: EngineCheckpoint, found: Found) -> None:
    """Add weights, state and groups that DeepSpeed's built-in Muon saved to ``found``.

    Raises:
        CheckpointError: another optimizer saved the checkpoint, or ZeRO stage 0, or the momenta have an unknown layout.
    """
    groups = checkpoint.optimizer(0)["param_groups"]
    if not any(group.get("use_muon") for group in groups):
        raise CheckpointError(
            f"{checkpoint.folder}: is neither OptForge's nor DeepSpeed's Muon's; allowed: those, and a file of torch.optim.Muon"
        )
    shapes_of = checkpoint.model["param_shapes"]
    if shapes_of is None:
        raise CheckpointError(f"{checkpoint.folder}: was saved by DeepSpeed's Muon on ZeRO stage 0; allowed: 1, 2, 3")
    for number, shapes in enumerate(shapes_of):
        found.shapes |= {name: list(shape) for name, shape in shapes.items()}
        whole = _Slice(checkpoint, number)
        step = 0
        for shard in range(len(checkpoint.shards)):
            tensor, state = whole.tensor(shard), dict(whole.state(shard))
            momentum = state.pop(_MOMENTUM, None)
            if momentum is not None and momentum.numel() != whole.size:
                _read_whole_momenta(whole, shard, momentum, found)
            elif momentum is not None:
                state[_MOMENTUM] = momentum
            step = max(step, int(state.pop("step", 0)))
            buffers = [key for key, value in state.items() if isinstance(value, Tensor) and value.numel() >= tensor.numel()]
            found.chunks += chunks_of(whole.placement(shard), [tensor], [state], buffers, ())
        step = step or int(whole.group.get("step", 0)) or int(checkpoint.model["global_steps"])
        found.groups[f"deepspeed{number}"] = _group("muon" if whole.group.get("use_muon") else "adamw", step, shapes)


def _group(rule: str, step: int, members: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    return {"rule": rule, "step": step, "scalars": {}, "hyperparameters": {}, "members": list(members)}


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
        return next(group for group in groups if self.number in group["params"])

    def tensor(self, shard: int) -> Tensor:
        return self.checkpoint.slices(shard)[self.number]

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
        found.groups[f"torch{number}"] = _group(rule, step, members)
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
