"""Reads the stages of DeepSpeed's PipelineModule: which part of the model a rank trains, and which ranks train the others."""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_optforge.zero.layout import LayoutError, require_attribute
from ds_optforge.zero.shards import RANKS_OF_STAGE
from ds_optforge.zero.versions import found_deepspeed

PLACEHOLDERS = "optforge_placeholders"  # the attribute of a PipelineModule that holds them
TIED = "tied_modules."  # what names of parameters of a TiedLayerSpec begin with
_COUNT = 16


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """One stage of a pipeline of several.

    Attributes:
        index: number of this rank's stage.
        count: number of stages.
        group: the ranks of one pipeline, a rank per stage.
        placeholders: frozen parameters of one element each. ZeRO-1 adds up the gradients' norm over the stages once per
            parameter group, and drops a group without parameters: a stage that has none for a group puts one of these there.
        tied: parameters that another stage holds too, and steps alike.
    """

    index: int
    count: int
    group: dist.ProcessGroup
    placeholders: tuple[nn.Parameter, ...]
    tied: tuple[nn.Parameter, ...]

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Become None in a copy or a file: a copied parameter is of no pipeline, and process groups cannot be written."""
        return type(None), ()


def is_pipeline(model: nn.Module) -> bool:
    """Whether ``model`` is a PipelineModule of DeepSpeed, which is not imported for the question."""
    if "deepspeed" not in sys.modules:
        return False
    from deepspeed.runtime.pipe.module import PipelineModule

    return isinstance(model, PipelineModule)


def enter_pipeline(model: nn.Module) -> Stage | None:
    """Return this rank's stage; None for a model that is no PipelineModule, or has one stage only.

    It adds the placeholders to ``model``, since the engine looks names of parameters up when it is built.

    Raises:
        LayoutError: an attribute that the model lacks, or a DeepSpeed whose pipelines give wrong gradients.
    """
    if not is_pipeline(model):
        return None
    _refuse_wrong_gradients()
    grid = require_attribute(model, "mpu")()
    count = int(require_attribute(grid, "get_pipe_parallel_world_size")())
    if count == 1:
        return None
    if not hasattr(model, PLACEHOLDERS):
        like = next(model.parameters(), torch.empty(0))
        made = [nn.Parameter(like.new_zeros(1), requires_grad=False) for _ in range(_COUNT)]
        for placeholder in made:
            placeholder.ds_pipe_replicated = True  # type: ignore[attr-defined]  # DeepSpeed leaves it out of norms
        model.register_module(PLACEHOLDERS, nn.ParameterList(made))
    _count_in_norms(model, first=int(require_attribute(grid, "get_slice_parallel_rank")()) == 0)
    if int(require_attribute(grid, "get_slice_parallel_world_size")()) > 1 and not hasattr(grid, RANKS_OF_STAGE):
        setattr(grid, RANKS_OF_STAGE, _own_group(grid, count))
    return Stage(
        int(require_attribute(grid, "get_pipe_parallel_rank")()),
        count,
        require_attribute(grid, "get_pipe_parallel_group")(),
        tuple(getattr(model, PLACEHOLDERS)),
        tuple(weight for weight, _ in _tied_weights(model)),
    )


def _refuse_wrong_gradients() -> None:
    """Refuse a DeepSpeed whose pipelines do not divide gradients by the number of micro-batches once, on any optimizer.

    Before 0.19 they are never divided; then the earlier stages divide what the last stage has divided already, until
    PipelineEngine says in a method of its own that only the last stage does.
    """
    from deepspeed.runtime.pipe.engine import PipelineEngine

    if "_backward_prologue_per_tensor" not in vars(PipelineEngine):
        raise LayoutError(
            f"PipelineModule: got DeepSpeed {found_deepspeed()}, whose pipelines give gradients that are wrong by a factor of "
            "gradient_accumulation_steps, to any optimizer; allowed: DeepSpeed >=0.19.4, or a model without a pipeline"
        )


def _count_in_norms(model: nn.Module, first: bool) -> None:
    """Let DeepSpeed count the gradient of each parameter once in the norm that it clips by.

    Without ZeRO, in float32, it would count those of the first stage alone. Where it counts all it never reads this mark.

    Args:
        model: a PipelineModule.
        first: whether this is the first tensor rank, which counts what all of them have whole.
    """
    for parameter in model.parameters():
        parameter.model_parallel = first and not replicated(parameter)  # type: ignore[attr-defined]


def _own_group(grid: Any, count: int) -> dist.ProcessGroup:
    """Make a group of the data and tensor ranks of each stage, and return this rank's. Collective over all ranks."""
    stages = require_attribute(grid, "topology")().get_axis_list
    groups: list[dist.ProcessGroup] = [dist.new_group(sorted(stages(axis="pipe", idx=index))) for index in range(count)]
    return groups[int(require_attribute(grid, "get_pipe_parallel_rank")())]


def _tied_weights(model: Any) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
    """(parameter, ranks that hold it) for each weight of a TiedLayerSpec that other stages hold too."""
    found = require_attribute(model, "get_tied_weights_and_groups")()
    return [(weight, group) for weight, group in found if dist.get_world_size(group) > 1]


def in_pipeline(parameter: Tensor) -> bool:
    """Whether ``parameter`` is one of a PipelineModule, which marks all of them."""
    return hasattr(parameter, "ds_pipe_replicated")


def replicated(parameter: Tensor) -> bool:
    """Whether an earlier stage of the pipeline holds the same parameter."""
    return bool(getattr(parameter, "ds_pipe_replicated", False))


def last_layer(model: nn.Module) -> nn.Module | None:
    """Return the last layer of a PipelineModule that has parameters, on the rank that holds it.

    None elsewhere, and if that is a tied layer, whose first place decides what it is.
    """
    grid = require_attribute(model, "mpu")()
    if require_attribute(grid, "get_pipe_parallel_rank")() + 1 < require_attribute(grid, "get_pipe_parallel_world_size")():
        return None
    tied = list(require_attribute(model, "tied_modules").values())
    for layer in reversed(require_attribute(model, "forward_funcs")):
        module = layer.args[0] if isinstance(layer, partial) and layer.args else layer  # a tied one may be called by a function
        if isinstance(module, nn.Module) and any(True for _ in module.parameters()):
            return None if any(module is other for other in tied) else module
    return None


def from_all_stages(stage: Stage, value: Any) -> list[Any]:
    """Return the ``value`` of every stage, in order. Collective over the ranks of a pipeline."""
    found: list[Any] = [None] * stage.count
    dist.all_gather_object(found, value, group=stage.group)
    return found


def sum_over_stages(values: Tensor, stage: Stage) -> None:
    """Add up ``values``, of any shape, in place over the stages. Collective over the ranks of a pipeline."""
    dist.all_reduce(values, group=stage.group)
