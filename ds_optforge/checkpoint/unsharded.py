"""What Adam saved under DeepSpeed without ZeRO, where neither the files nor DeepSpeed name the optimizer's parameters."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ds_optforge.checkpoint.chunks import Chunk, flat_chunk
from ds_optforge.checkpoint.engine_files import EngineCheckpoint, Found
from ds_optforge.checkpoint.logical import buffer_name, weight_name
from ds_optforge.checkpoint.torch_files import address
from ds_optforge.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's state, beside the step


def read_unsharded(checkpoint: EngineCheckpoint, found: Found) -> None:
    """Add weights, moments and groups to ``found``.

    Raises:
        CheckpointError: the parameters of the optimizer cannot be told apart.
    """
    module, optimizer = checkpoint.model["module"], checkpoint.optimizer(0)
    for number, (group, names) in enumerate(zip(optimizer["param_groups"], _names(checkpoint), strict=True)):
        shapes = {name: module[name].shape for name in names}
        # Frozen parameters have no state; DeepSpeed makes zeros of the missing gradients of all others.
        states = {name: state for name, state in _states(checkpoint, group, shapes).items() if MOMENTS[0] in state}
        steps = sorted({int(state.get("step", group.get("step", 0))) for state in states.values()})
        if len(steps) > 1:
            raise CheckpointError(
                f"{checkpoint.folder}: parameters of group {number} have taken {steps} steps; allowed: all as many"
            )
        for name, state in states.items():
            found.chunks += _chunks(name, state)
        found.shapes |= {name: list(shapes[name]) for name in states}
        if states:
            found.add_members(f"deepspeed{number}", "adamw", steps[0], states)


def _states(
    checkpoint: EngineCheckpoint, group: Mapping[str, Any], shapes: Mapping[str, torch.Size]
) -> dict[str, dict[str, Any]]:
    """The state of each parameter of a group with its weight as "weight", out of one state for all of them or one for each.

    FP16_Optimizer steps the parameters of a group as one tensor.
    """
    masters, model = checkpoint.slices(0), checkpoint.model["module"]
    weights = [masters[index] for index in group["params"]] if masters else [model[name] for name in shapes]
    saved = checkpoint.optimizer(0)["state"]
    states = [
        {**saved.get(index, {}), "weight": weight.detach()} for index, weight in zip(group["params"], weights, strict=True)
    ]
    numels = [shape.numel() for shape in shapes.values()]
    if len(states) == 1 and weights[0].numel() == sum(numels):
        whole, ends = states[0], accumulate(numels, initial=0)
        return {name: _part(whole, start, numel) for name, start, numel in zip(shapes, ends, numels, strict=False)}
    for (name, shape), state in zip(shapes.items(), states, strict=True):
        if odd := [key for key in ("weight", *MOMENTS) if key in state and state[key].numel() != shape.numel()]:
            raise CheckpointError(
                f"{checkpoint.folder}: holds {state[odd[0]].numel()} elements as {odd[0]} of '{name}'; allowed: {shape.numel()}"
            )
    return dict(zip(shapes, states, strict=True))


def _part(whole: Mapping[str, Any], start: int, numel: int) -> dict[str, Any]:
    flat = {key: whole[key].reshape(-1).narrow(0, start, numel) for key in ("weight", *MOMENTS) if key in whole}
    return {**whole, **flat}


def _chunks(name: str, state: Mapping[str, Any]) -> Iterator[Chunk]:
    for key, logical in {"weight": weight_name(name), **{moment: buffer_name(name, moment) for moment in MOMENTS}}.items():
        yield flat_chunk(logical, state[key].numel(), 0, state[key].reshape(-1))


def _names(checkpoint: EngineCheckpoint) -> Sequence[Sequence[str]]:
    """The names of each group's parameters, which the optimizer knows if it was given them; else there must be one group."""
    groups, module = checkpoint.optimizer(0)["param_groups"], checkpoint.model["module"]
    indices, masters = [index for group in groups for index in group["params"]], checkpoint.slices(0)
    if masters and len(masters) != len(indices):
        raise CheckpointError(
            f"{checkpoint.folder}: holds {len(masters)} float32 weights for {len(indices)} parameters; allowed: an optimizer "
            "without frozen parameters, or ZeRO stage 1, 2 or 3"
        )
    if all("param_names" in group for group in groups):
        if unknown := [name for group in groups for name in group["param_names"] if name not in module]:
            raise CheckpointError(
                f"{checkpoint.folder}: its optimizer has '{unknown[0]}'; allowed: the names of the model's weights"
            )
        return [group["param_names"] for group in groups]
    buffers = set(checkpoint.model["buffer_names"])
    weights = {n: v for n, v in module.items() if n not in buffers and isinstance(v, Tensor) and v.numel()}
    first_names = {address(weight): name for name, weight in reversed(weights.items())}  # of tied weights
    names = [name for name, weight in weights.items() if first_names[address(weight)] == name]
    if len(groups) == 1 and _in_order(checkpoint, indices, [weights[name].shape for name in names]):
        return [names]
    raise CheckpointError(
        f"{checkpoint.folder}: its optimizer does not name its {len(indices)} parameters in {len(groups)} groups, which cannot "
        f"be told apart on ZeRO stage 0; allowed: one group of all {len(names)} parameters in the model's order, an optimizer "
        "that was made of model.named_parameters() (torch 2.6 or later), or ZeRO stage 1, 2 or 3"
    )


def _in_order(checkpoint: EngineCheckpoint, indices: Sequence[int], shapes: Sequence[torch.Size]) -> bool:
    """Whether the optimizer's tensors may be all of the model's weights in their order: one for each, or one for all."""
    masters, states = checkpoint.slices(0), checkpoint.optimizer(0)["state"]
    if len(indices) == 1 and masters:
        return masters[0].numel() == sum(shape.numel() for shape in shapes)
    found = [states[index][MOMENTS[0]].shape if index in states else None for index in indices]
    return len(found) == len(shapes) and all(f in (None, shape) for f, shape in zip(found, shapes, strict=True))
