"""What ranks do for tests of the forecast: train in bfloat16, and count what the last step computes, sends and holds."""

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import ds_optforge
from ds_optforge.forecast.wire import planned_bytes


class Net(nn.Module):
    """Matrices of several shapes, in a chain, with an embedding before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.up = nn.Linear(32, 48, bias=False)
        self.down = nn.Linear(48, 32, bias=False)
        self.up2 = nn.Linear(32, 64, bias=False)
        self.down2 = nn.Linear(64, 32, bias=False)
        self.lm_head = nn.Linear(32, 33, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.lm_head(self.down2(self.up2(self.down(self.up(x))))).float().square().mean()


class Sent(TorchDispatchMode):
    """Bytes that this rank sends to others, by collective; reductions are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if name.startswith("c10d::"):
            self.bytes[name] = self.bytes.get(name, 0) + _sent(name, args)
        return func(*args, **(kwargs or {}))


def _sent(name: str, args: Any) -> int:
    world, rank = dist.get_world_size(), dist.get_rank()
    if name == "c10d::allgather_":
        return (world - 1) * sum(_size(tensor) for tensor in tree_leaves(args[1]))
    if name == "c10d::_allgather_base_":
        return (world - 1) * _size(args[1])
    if name == "c10d::alltoall_base_":
        given, splits = args[1], args[4]
        own = splits[rank] if splits else given.numel() // world
        return (given.numel() - own) * given.element_size()
    if name == "c10d::send":
        return sum(_size(tensor) for tensor in args[0])
    return 0


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def count(stage: int, optimizer: Mapping[str, Any], **zero: Any) -> dict[str, Any]:
    """Train three steps on every rank; return the counts of the last one."""
    torch.manual_seed(0)
    model = Net()
    ds_optforge.register(model)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": dict(optimizer),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
    }
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    for step in range(3):
        sent, flops, passes = Sent(), FlopCounterMode(display=False), FlopCounterMode(display=False)
        with passes:
            engine.backward(engine(torch.arange(4) + step))
        gradients = _gradients(engine)
        if step < 2:
            engine.step()
            continue
        with sent, flops:
            engine.step()
    counted = {"sent": sent.bytes, "flops": flops.get_total_flops(), "flops_of_passes": passes.get_total_flops()}
    result = {**counted, "gradients": gradients, **_held(engine, model)}
    if isinstance(base := engine.optimizer.optimizer, ds_optforge.OptForge):
        result["planned"] = planned_bytes(base, config, dist.get_world_size(), "cpu")
    engine.destroy()
    return result


def _gradients(engine: Any) -> int:
    """Bytes of the gradients that wait for the step."""
    averaged = getattr(engine.optimizer, "averaged_gradients", {})
    found = [tensor for tensors in averaged.values() for tensor in tensors or () if tensor is not None]
    return sum(map(_size, found))


def _held(engine: Any, model: nn.Module) -> dict[str, int]:
    wrapper = engine.optimizer
    slices = getattr(wrapper, "fp32_partitioned_groups_flat", None) or wrapper.single_partition_of_fp32_groups
    weights = [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]
    state = {
        tensor.data_ptr(): tensor
        for values in wrapper.optimizer.state.values()
        for tensor in values.values()
        if isinstance(tensor, Tensor) and tensor.numel() > 1
    }
    return {
        "parameters": sum(map(_size, weights)) + sum(map(_size, slices)),
        "state": sum(map(_size, state.values())),
        "momentum": sum(_size(tensor) for tensor in state.values() if tensor.dtype == torch.bfloat16),
    }
