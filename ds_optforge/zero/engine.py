"""Reads from DeepSpeed's engine and its wrappers, and writes to them; `layout` reads the places of parameters."""

import contextlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optforge.zero.layout import LayoutError, require_attribute
from ds_optforge.zero.shards import expert_ranks, shard_of
from ds_optforge.zero.versions import SUPPORTED_DEEPSPEED, found_deepspeed, require_supported_deepspeed

COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # of the engine


def make_trusted(optimizer: type, scheduler: type) -> None:
    """Enter two classes into DeepSpeed's lists.

    Args:
        optimizer: enters the list of optimizers that ZeRO supports.
        scheduler: enters, by its name, the list of schedulers that a configuration may name.

    Raises:
        ImportError: DeepSpeed's version is not supported.
    """
    require_supported_deepspeed()
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.zero import utils as zero_utils

    if optimizer not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
        zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(optimizer)
    if scheduler.__name__ not in lr_schedules.VALID_LR_SCHEDULES:
        lr_schedules.VALID_LR_SCHEDULES.append(scheduler.__name__)


@contextlib.contextmanager
def safe_classes() -> Iterator[None]:
    """Allow torch.load with ``weights_only`` to read the classes that DeepSpeed saves, and no others beside tensors."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def member(owner: Any, name: str) -> Any:
        """Return a member of an enumeration: Python 3.11.0 to 3.11.3 writes it as ``getattr(ZeroStageEnum, name)``."""
        if owner is not ZeroStageEnum:
            raise pickle.UnpicklingError(f"got an attribute '{name}' of {owner!r}; allowed: a member of ZeroStageEnum")
        return ZeroStageEnum[name]

    classes = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    with torch.serialization.safe_globals([*classes, (member, "builtins.getattr"), (member, "__builtin__.getattr")]):
        yield


def counters(engine: Any) -> dict[str, int]:
    """Return the engine's counters of steps and samples, by the names in `COUNTERS`.

    Raises:
        LayoutError: a counter that the engine lacks.
    """
    return {key: require_attribute(engine, key) for key in COUNTERS}


def set_counters(engine: Any, values: Mapping[str, int]) -> None:
    """Resume at the `counters` of another engine, between steps (perhaps with another gradient accumulation).

    Args:
        engine: DeepSpeed's engine.
        values: what `counters` returned.
    """
    for key, value in values.items():
        setattr(engine, key, value)
    engine.micro_steps = 0


def model_parallelism(engine: Any) -> str:
    """Name the kind of parallelism in which ranks have different tensors under the same name.

    The stages of a pipeline have different names, or the same tensors under the same name.

    Args:
        engine: DeepSpeed's engine.

    Returns:
        A phrase for messages; "" for data parallelism alone, and for tensor parallelism that `shards` can read.
    """
    if any(map(expert_ranks, engine.module.parameters())) and getattr(engine, "mp_world_size", 1) > 1:
        return "experts that are shared out over ranks (ep_size > 1) beside other parallelism"
    if getattr(engine, "pipeline_parallelism", False):  # where mp_world_size counts the stages too
        sharded = require_attribute(require_attribute(engine, "grid"), "get_slice_parallel_world_size")() > 1
        return "tensor parallelism beside a pipeline" if sharded else ""
    unmarked = getattr(engine, "mp_world_size", 1) > 1 and not any(map(shard_of, engine.module.parameters()))
    return "tensor parallelism without a parameter that is marked tensor_model_parallel" if unmarked else ""


def refuse_unwritable_weights(engine: Any) -> None:
    """Refuse an engine on ZeRO-1 or ZeRO-2 that would fail at the end of its first step, with any optimizer. Collective.

    Some DeepSpeed (0.18.9) leaves the flat buffers of weights inside autograd, and gathers the stepped weights into them.
    Whether that fails depends on torch and on the process group, so it is tried on a small buffer.

    Raises:
        LayoutError: such an engine.
    """
    buffers: list[Tensor] = getattr(engine.optimizer, "bit16_groups_flat", [])
    if not any(buffer.requires_grad for buffer in buffers):
        return
    group = require_attribute(engine.optimizer, "dp_process_group")
    device = buffers[0].device
    small = torch.zeros(dist.get_world_size(group), device=device, requires_grad=True).clone()
    try:
        dist.all_gather_into_tensor(small, torch.zeros(1, device=device), group=group)
    except RuntimeError as error:
        raise LayoutError(
            f"zero_optimization.stage: got {engine.zero_optimization_stage()}, with which DeepSpeed {found_deepspeed()} fails "
            f"in its first step on {dist.get_backend(group)} with torch {torch.__version__}, whatever the optimizer, because "
            "it gathers weights into a buffer that requires a gradient; allowed: stage 0 or 3, or another DeepSpeed of "
            f"{SUPPORTED_DEEPSPEED}"
        ) from error


def refresh_weights(wrapper: Any) -> None:
    """Copy the tensors that the optimizer steps into the model's weights, as at the end of ``step()``. Collective.

    Args:
        wrapper: ``engine.optimizer``.

    Raises:
        LayoutError: an attribute that the wrapper lacks.
    """
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):  # ZeRO-3, where full parameters may still be gathered
        require_attribute(wrapper, "checkpoint_event_prologue")()
        for sub_group in range(len(wrapper.fp32_partitioned_groups_flat)):
            require_attribute(wrapper, "_reassign_or_swap_out_partitioned_parameters")(sub_group)
        require_attribute(wrapper, "checkpoint_event_epilogue")()
    elif hasattr(wrapper, "update_lp_params"):  # ZeRO-1, ZeRO-2, BF16_Optimizer
        wrapper.update_lp_params()
    elif hasattr(wrapper, "fp32_groups"):  # stage 0 in fp16 and bf16
        for masters, weights in zip(wrapper.fp32_groups, require_attribute(wrapper, "fp16_groups"), strict=True):
            torch._foreach_copy_([weight.data for weight in weights], [master.data for master in masters])


def stepped_tensors(wrapper: Any, groups: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], list[Tensor]]]:
    """Return (parameter group, tensors) of each call of ``step()`` that a training step makes.

    Args:
        wrapper: ``engine.optimizer``.
        groups: OptForge's ``param_groups``, which ZeRO-3 keeps empty between steps.

    Raises:
        LayoutError: an attribute that the wrapper lacks.
    """
    if not hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return [(group, list(group["params"])) for group in groups if group["params"]]
    group_of = require_attribute(wrapper, "sub_group_to_group_id")
    return [(groups[group_of[i]], [flat]) for i, flat in enumerate(wrapper.fp32_partitioned_groups_flat)]


def local_part(parameter: Tensor) -> tuple[Tensor, int, int]:
    """Return the elements that this rank holds of a parameter that is not trained.

    Returns:
        (flat values, their start in the flattened parameter, elements of the whole parameter); the values are (elements,).

    Raises:
        LayoutError: an attribute of ZeRO-3 that the parameter lacks.
    """
    if not hasattr(parameter, "ds_id"):
        return parameter.detach(), 0, parameter.numel()
    numel, partition = int(require_attribute(parameter, "ds_numel")), int(require_attribute(parameter, "partition_numel")())
    start = min(dist.get_rank(require_attribute(parameter, "ds_process_group")) * partition, numel)
    return require_attribute(parameter, "ds_tensor").detach().view(-1).narrow(0, 0, min(partition, numel - start)), start, numel


LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scale(wrapper: Any) -> dict[str, float]:
    """Return the state of dynamic loss scaling, by the names in `LOSS_SCALE`; empty without it.

    Args:
        wrapper: ``engine.optimizer``.
    """
    scaler = _dynamic_scaler(wrapper)
    return {key: getattr(scaler, key) for key in LOSS_SCALE if hasattr(scaler, key)}


def set_loss_scale(wrapper: Any, values: Mapping[str, float]) -> None:
    """Resume at the `loss_scale` of another run; does nothing if either run has no dynamic loss scaling.

    Args:
        wrapper: ``engine.optimizer``.
        values: what `loss_scale` returned.
    """
    scaler = _dynamic_scaler(wrapper)
    for key, value in values.items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)


def _dynamic_scaler(wrapper: Any) -> Any:
    scaler = getattr(wrapper, "loss_scaler", None) or getattr(wrapper, "loss_scale_config", None)
    return scaler if getattr(scaler, "dynamic", getattr(scaler, "dynamic_loss_scale", False)) else None
