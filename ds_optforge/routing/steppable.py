"""Refuses parameters that no rule can step as they are: by dtype, by storage, and those that FSDP holds in shards."""

import sys

import torch
from torch import Tensor

from ds_optforge.errors import ConfigError

_STEPPED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_SHARDED = (
    "{name}: got {what}, whose values are one rank's shard; allowed: ordinary parameters, on one process, under DDP, or under "
    "DeepSpeed's ZeRO (which shards parameters too: zero_optimization.stage 3 in place of FSDP)"
)


def refuse_unsteppable(parameter: Tensor, name: str) -> None:
    """Refuse a trainable parameter that no rule can step.

    Args:
        parameter: of the model.
        name: its qualified name, or another that tells users which one it is.

    Raises:
        ConfigError: a shard of FSDP1 or FSDP2, a complex or exotic dtype, or elements that share memory.
    """
    if _is_dtensor(parameter):
        raise ConfigError(_SHARDED.format(name=name, what="a DTensor (FSDP2's fully_shard, tensor parallelism of torch)"))
    if getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False):
        raise ConfigError(_SHARDED.format(name=name, what="a parameter that FSDP1 has flattened (FullyShardedDataParallel)"))
    if parameter.dtype not in _STEPPED:
        raise ConfigError(
            f"{name}: got dtype {_plain(parameter.dtype)}; allowed: {', '.join(map(_plain, _STEPPED))} (complex numbers can "
            "be held as real ones: torch.view_as_real)"
        )
    if any(size > 1 and stride == 0 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
        raise ConfigError(
            f"{name}: got strides {parameter.stride()} for shape {tuple(parameter.shape)}, in which elements share memory; "
            "allowed: memory of its own for each element (expanded.clone())"
        )


def _is_dtensor(parameter: Tensor) -> bool:
    """Whether ``parameter`` is a DTensor, without importing what takes long to import where nobody has made one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(parameter, module.DTensor)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
