"""The files of a pipeline's ``engine.save_checkpoint``: a file per layer, and files of the optimizer per stage.

layer_NN-model_states.pt                        the state dict of layer NN, under the names that the layer gives
mp_rank_SS_model_states.pt                      everything else of stage SS (its optimizer too, without ZeRO)
zero_pp_rank_RR_mp_rank_SS_optim_states.pt      the optimizer of data rank RR in stage SS
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ds_optforge.errors import CheckpointError
from ds_optforge.zero.pipeline import TIED

_LAYER, _STAGE = re.compile(r"layer_(\d+)-model_states\.pt"), re.compile(r"mp_rank_(\d+)_")

Files = Mapping[Path, Any]  # contents, by path


def stages(models: Files, shards: Files, layers: Files) -> list[tuple[list[Any], list[Any]]]:
    """Sort the files of a pipeline by stages.

    Args:
        models: files of stages.
        shards: files of the optimizer; none without ZeRO.
        layers: files of layers.

    Returns:
        (model states, state dicts of the optimizer by data rank) of each stage. The model states hold the weights, frozen
        parameters and buffers of all stages, by the names that a PipelineModule gives to them.

    Raises:
        CheckpointError: a missing file, or one of tensor parallelism.
    """
    by_stage = [model for _, model in sorted((_stage(path), model) for path, model in models.items())]
    folder, count = next(iter(models)).parent, by_stage[0]["mp_world_size"]
    if len(by_stage) != count:
        raise CheckpointError(f"{folder}: has {len(by_stage)} of {count} files mp_rank_*_model_states.pt")
    found = []
    for number, model in enumerate(by_stage):
        own = [shard["optimizer_state_dict"] for path, shard in shards.items() if _stage(path) == number]
        if len(own) not in ((model["dp_world_size"],) if shards else (0,)):
            name = f"*_mp_rank_{number:02d}_optim_states.pt"
            raise CheckpointError(f"{folder}: has {len(own)} of {model['dp_world_size']} files {name}")
        found.append((model, own or [model["optimizer"]]))
    module = _module(layers, _shapes(found))
    buffers = [name for model in by_stage for name in model["buffer_names"]]
    return [([{**model, "module": module, "buffer_names": buffers}], own) for model, own in found]


def base_state(shard: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state dict of the optimizer under DeepSpeed's wrapper, from what the wrapper saved."""
    base: Mapping[str, Any] = shard.get("base_optimizer_state", shard.get("optimizer_state_dict", shard))
    return base


def _stage(path: Path) -> int:
    found = _STAGE.search(path.name)
    if found is None:
        raise CheckpointError(f"{path}: is no file of a pipeline")
    return int(found[1])


def _shapes(found: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]) -> dict[str, list[int]]:
    """The shapes of parameters that are known from the optimizers and the frozen ones, by name."""
    shapes: dict[str, list[int]] = {}
    for model, shards in found:
        shapes |= {name: list(shape) for name, shape in (model["frozen_param_shapes"] or {}).items()}
        for stepped in base_state(shards[0]).get("optforge", ()):
            shapes |= dict(zip(stepped["placement"]["names"], stepped["shapes"], strict=True))
    return shapes


def _module(layers: Files, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The state dict of the whole model. A layer that is tied goes by the key of its TiedLayerSpec, which its file lacks."""
    module: dict[str, Any] = {}
    for path, layer in layers.items():
        number = _LAYER.fullmatch(path.name)
        if number is None:
            raise CheckpointError(f"{path}: is of a tensor-parallel pipeline; allowed: pipelines without tensor parallelism")
        prefix = f"{int(number[1])}."
        if not any(prefix + name in shapes for name in layer):
            prefix = _tied_prefix(path, layer, shapes) or prefix
        for name, value in layer.items():
            known = module.setdefault(prefix + name, value)
            if known is not value and not torch.equal(known, value):
                raise CheckpointError(f"{path}: holds other values of '{prefix + name}' than the file of an earlier layer")
    if missing := [name for name in shapes if name not in module]:
        raise CheckpointError(f"{next(iter(layers)).parent}: no layer_*-model_states.pt holds '{missing[0]}'")
    return module


def _tied_prefix(path: Path, layer: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> str:
    """What the names of a tied layer begin with, found by its parameters' names and shapes; "" for a layer that is not tied."""
    trained = {name: list(shape) for name, shape in shapes.items() if name.startswith(TIED)}
    keys = sorted({name.split(".")[1] for name in trained})
    fitting = []
    for key in keys:
        begin = f"{TIED}{key}."
        own = {name.removeprefix(begin): shape for name, shape in trained.items() if name.startswith(begin)}
        if all(name in layer and list(layer[name].shape) == shape for name, shape in own.items()):
            fitting.append(begin)
    if len(fitting) > 1:
        raise CheckpointError(f"{path}: may be any of {fitting}, which have the same names and shapes; allowed: one tied layer")
    return fitting[0] if fitting else ""
