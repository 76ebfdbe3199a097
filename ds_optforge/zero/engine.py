"""What is read from DeepSpeed's engine and its wrappers, and written to them, beside the layout."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optforge.zero.layout import expert_group_name, require_attribute

COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # of the engine


def make_trusted(optimizer: type, scheduler: type) -> None:
    """Enter an optimizer and a scheduler into DeepSpeed's lists of those that it takes without more being said."""
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.zero import utils as zero_utils

    if optimizer not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
        zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(optimizer)
    if scheduler.__name__ not in lr_schedules.VALID_LR_SCHEDULES:
        lr_schedules.VALID_LR_SCHEDULES.append(scheduler.__name__)


@contextlib.contextmanager
def safe_classes() -> Iterator[None]:
    """Inside, torch.load with ``weights_only`` reads the classes that DeepSpeed saves, and no others beside tensors."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
        yield


def counters(engine: Any) -> dict[str, int]:
    """How far the engine has come."""
    return {key: require_attribute(engine, key) for key in COUNTERS}


def set_counters(engine: Any, values: Mapping[str, int]) -> None:
    """Continue from `counters` of another engine, between steps (perhaps with another gradient accumulation)."""
    for key, value in values.items():
        setattr(engine, key, value)
    engine.micro_steps = 0


def model_parallelism(engine: Any) -> str:
    """The kind of parallelism in which ranks have different tensors under the same name; "" for data parallelism alone."""
    if any(map(expert_parallel, engine.module.parameters())):
        return "experts that are shared out over ranks (ep_size > 1)"
    if getattr(engine, "pipeline_parallelism", False):
        return "pipeline parallelism"
    return "tensor parallelism" if getattr(engine, "mp_world_size", 1) > 1 else ""


def refresh_weights(wrapper: Any) -> None:
    """Copy the tensors that the optimizer steps into the model's weights again: `step()`'s last act, on all ranks together.

    Args:
        wrapper: ``engine.optimizer``.
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
    """(parameter group, tensors) of each call of ``step()`` that a training step makes.

    Args:
        wrapper: ``engine.optimizer``.
        groups: OptForge's ``param_groups``, which ZeRO-3 keeps empty between steps.
    """
    if not hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return [(group, list(group["params"])) for group in groups if group["params"]]
    group_of = require_attribute(wrapper, "sub_group_to_group_id")
    return [(groups[group_of[i]], [flat]) for i, flat in enumerate(wrapper.fp32_partitioned_groups_flat)]


def local_part(parameter: Tensor) -> tuple[Tensor, int, int]:
    """(flat values, where they start, elements of the whole) of what this rank holds of a parameter that is not trained."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach(), 0, parameter.numel()
    numel, partition = int(require_attribute(parameter, "ds_numel")), int(require_attribute(parameter, "partition_numel")())
    start = min(dist.get_rank(require_attribute(parameter, "ds_process_group")) * partition, numel)
    return require_attribute(parameter, "ds_tensor").detach().view(-1).narrow(0, 0, min(partition, numel - start)), start, numel


LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scale(wrapper: Any) -> dict[str, float]:
    """Where dynamic loss scaling stands; empty where there is none."""
    scaler = _dynamic_scaler(wrapper)
    return {key: getattr(scaler, key) for key in LOSS_SCALE if hasattr(scaler, key)}


def set_loss_scale(wrapper: Any, values: Mapping[str, float]) -> None:
    """Go on from `loss_scale` of another run; nothing where either has no dynamic loss scaling."""
    scaler = _dynamic_scaler(wrapper)
    for key, value in values.items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)


def _dynamic_scaler(wrapper: Any) -> Any:
    scaler = getattr(wrapper, "loss_scaler", None) or getattr(wrapper, "loss_scale_config", None)
    return scaler if getattr(scaler, "dynamic", getattr(scaler, "dynamic_loss_scale", False)) else None


def expert_parallel(parameter: Tensor) -> bool:
    """Whether this rank's parameter is one of several ranks' own under the same name."""
    name = expert_group_name(parameter)
    return bool(name) and dist.get_world_size(_expert_data_group(name)) < dist.get_world_size()


def _expert_data_group(name: str) -> dist.ProcessGroup:
    from deepspeed.utils import groups

    group: dist.ProcessGroup = groups._get_expert_data_parallel_group(name)
    return group
