"""Reads the place of each parameter in DeepSpeed's ZeRO.

Everything is read from the model's parameters, which DeepSpeed annotates when the engine is built. What differs between its
versions is told apart by what is there, not by version numbers; a missing attribute is a `LayoutError` that names it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optforge.zero.partition import Cut
from ds_optforge.zero.versions import versions, waits_for_gathers


class LayoutError(RuntimeError):
    """A place of a parameter inside ZeRO's slices that cannot be read, or that differs between ranks."""


@dataclass(frozen=True, slots=True, eq=False)
class Binding:
    """Places of the parameters behind one call of ``step()``.

    Attributes:
        indices: numbers of these parameters in the group, in the order in which they lie in the slices.
        cuts: one per entry of ``indices``.
        world_size: number of ranks in ``process_group``.
        rank: this rank within ``process_group``.
        process_group: the ranks over which these parameters are cut; None when every rank holds all of them.
        tensor_parallel: whether these ranks are the tensor ranks as well as the data ranks.
        partitioned: whether ZeRO cuts them, and decides about gradients that are not finite.
        device: of the model's weights, on which matrices are orthogonalized.
        keeps_gradients: whether DeepSpeed refills the slices' ``.grad`` only where a gradient arrives (CPU offload).
        gradient_buffer: (buffer, start, numel) of a range that DeepSpeed refills in the same way (ZeRO-3). It is the buffer
            itself, not a view: its storage changes when engine states are offloaded.
        problem: description of a fault in this rank's slice, or "". `require_agreement` reports it, since healthy ranks
            would wait for this one.
    """

    indices: tuple[int, ...]
    cuts: tuple[Cut, ...]
    world_size: int
    rank: int
    process_group: dist.ProcessGroup | None
    device: torch.device
    tensor_parallel: bool = False
    partitioned: bool = True
    keeps_gradients: bool = False
    gradient_buffer: tuple[Tensor, int, int] | None = None
    problem: str = ""

    def discard_left_overs(self, slices: Sequence[Tensor]) -> None:
        """Clear non-finite gradients that a step left behind which DeepSpeed skipped because of an overflow.

        (DeepSpeed looks for an overflow in the gradients that arrived, so no other non-finite values get here.)

        Args:
            slices: the tensors being stepped; the values of their ``.grad`` may be changed.
        """
        if self.keeps_gradients:
            for tensor in slices:
                if tensor.grad is not None:
                    tensor.grad.nan_to_num_(0.0, 0.0, 0.0)

    def clear_spent_gradients(self, slices: Sequence[Tensor]) -> None:
        """Zero the gradients that DeepSpeed keeps, after the step has used them.

        Otherwise a parameter that gets no gradient (an idle expert, a skipped layer) would be stepped again with the
        gradient of an earlier step: ZeRO-3 and CPU offload hand that to every optimizer, ZeRO-1/2 do not.

        Args:
            slices: the tensors that were stepped.
        """
        if self.keeps_gradients:
            for tensor in slices:
                if tensor.grad is not None:
                    tensor.grad.zero_()
        if self.gradient_buffer is not None:
            buffer, start, numel = self.gradient_buffer
            buffer.narrow(0, start, numel).zero_()


def expert_group_name(parameter: Tensor) -> str:
    """Return the name of the expert-parallel group of a DeepSpeed MoE expert's parameter; "" for every other parameter.

    Experts need parameter groups of their own, with this name: they are partitioned over another process group.

    Raises:
        LayoutError: an expert's parameter without that name.
    """
    return "" if getattr(parameter, "allreduce", True) else str(require_attribute(parameter, "group_name"))


def bind(parameters: Sequence[Tensor], names: Sequence[str], slices: Sequence[Tensor]) -> Binding:
    """Find the places of a group's parameters in the tensors that DeepSpeed wants stepped.

    Args:
        parameters: the model's parameters of the group, as given to the optimizer.
        names: of these parameters, for messages.
        slices: ``group["params"]`` at the time of the step: one flat slice (ZeRO), or one tensor per parameter.

    Raises:
        LayoutError: an attribute of DeepSpeed that is missing or contradicts itself, or a ZeRO feature that hides the
            slices (partial or NVMe offload).
    """
    first = parameters[0]
    if hasattr(first, "ds_id"):
        return _bind_zero3(parameters, slices)
    if hasattr(first, "_hp_mapping"):
        return _bind_flat_partition(parameters, names, slices)
    return _bind_replicated(parameters, names, slices)


def _bind_replicated(parameters: Sequence[Tensor], names: Sequence[str], slices: Sequence[Tensor]) -> Binding:
    """Bind in plain PyTorch and stage 0: one tensor per parameter (in fp16/bf16 DeepSpeed's fp32 clone), in the same order."""
    if len(parameters) != len(slices) or any(p.shape != s.shape for p, s in zip(parameters, slices, strict=False)):
        raise LayoutError(
            f"{names[0]}: the optimizer steps {len(slices)} tensor(s) in place of {len(parameters)} parameter(s), and the "
            f"parameters carry neither '_hp_mapping' (ZeRO-1, ZeRO-2, BF16_Optimizer) nor 'ds_id' (ZeRO-3). {versions()}"
        )
    cuts, offset = [], 0
    for tensor in slices:
        cuts.append(Cut(base=0, size=tensor.numel(), offset=offset))
        offset += tensor.numel()
    return Binding(tuple(range(len(slices))), tuple(cuts), 1, 0, None, slices[0].device, partitioned=False)


def _bind_flat_partition(parameters: Sequence[Tensor], names: Sequence[str], slices: Sequence[Tensor]) -> Binding:
    """Bind under ZeRO-1, ZeRO-2 and BF16_Optimizer: the weights are views of one flat buffer, cut evenly over the ranks.

    A weight's storage offset is its place in that buffer, even if parameters were reordered or padded. (The addresses that
    DeepSpeed records in `_hp_mapping` ignore the reordering of round_robin_gradients.) Every range of a parameter that this
    rank holds is checked against the weight's values.
    """
    tensor = _only(slices)
    size = tensor.numel()
    group = require_attribute(parameters[0], "_dp_group")
    rank = dist.get_rank(group)
    storage = parameters[0].untyped_storage().data_ptr()
    order = sorted(range(len(parameters)), key=lambda i: parameters[i].storage_offset())
    cuts, problem = [], ""
    for index in order:
        parameter, name = parameters[index], names[index]
        if parameter.untyped_storage().data_ptr() != storage:
            raise LayoutError(f"{name}: its weight is not a view of its group's flat buffer. {versions()}")
        cut = Cut(base=int(parameter.storage_offset()), size=size, offset=0)
        problem = problem or _wrong_values(parameter, name, cut, rank, tensor)
        cuts.append(cut)
    mappings = [mapping for parameter in parameters if (mapping := require_attribute(parameter, "_hp_mapping")) is not None]
    offload = any(require_attribute(mapping, "use_offload") for mapping in mappings)
    world_size, device = dist.get_world_size(group), parameters[0].device
    indices = tuple(order)
    return Binding(indices, tuple(cuts), world_size, rank, group, device, keeps_gradients=offload, problem=problem)


def _wrong_values(parameter: Tensor, name: str, cut: Cut, rank: int, tensor: Tensor) -> str:
    """Compare the elements that this rank holds of a parameter with the weight's values; return the problem, or ""."""
    low, high = max(cut.base, rank * cut.size), min(cut.base + parameter.numel(), (rank + 1) * cut.size)
    if low >= high:
        return ""
    master = tensor.detach().narrow(0, low - rank * cut.size, high - low).to(parameter)
    weight = parameter.detach().view(-1).narrow(0, low - cut.base, high - low)
    if torch.equal(master.nan_to_num(), weight.nan_to_num()):
        return ""
    return (
        f"{name}: ZeRO's slice on rank {rank} does not hold the weight's values. Either the weight was changed after the "
        f"engine was built (ZeRO would undo that), or the layout is unknown. {versions()}"
    )


def _bind_zero3(parameters: Sequence[Tensor], slices: Sequence[Tensor]) -> Binding:
    """Bind under ZeRO-3: each parameter is cut evenly over the ranks, and a slice is a sub-group's partitions in a row."""
    tensor = _only(slices)
    zero = require_attribute(parameters[0], "_z3_optimizer")
    if hasattr(parameters[0], "comm"):
        raise LayoutError("zero_optimization.mics_shard_size: got MiCS, which cuts over some of the ranks; allowed: -1")
    _refuse_hidden_slices(zero)
    flats = require_attribute(zero, "fp32_partitioned_groups_flat")
    sub_group = next((i for i, flat in enumerate(flats) if flat is tensor), None)
    if sub_group is None:
        raise LayoutError(f"the slice being stepped is none of ZeRO-3's fp32_partitioned_groups_flat. {versions()}")
    group = _process_group(zero, sub_group)
    refuse_unfinished_gathers(zero)
    position = {id(parameter): index for index, parameter in enumerate(parameters)}
    indices, cuts, offset = [], [], 0
    for parameter in require_attribute(zero, "fp16_groups")[sub_group]:
        if id(parameter) not in position:
            raise LayoutError(f"sub-group {sub_group} holds a parameter of another group. {versions()}")
        partition = int(require_attribute(parameter, "partition_numel")())
        indices.append(position[id(parameter)])
        cuts.append(Cut(base=0, size=partition, offset=offset))
        offset += partition
    if offset != tensor.numel():
        raise LayoutError(
            f"sub-group {sub_group}: its partitions hold {offset} elements, its slice {tensor.numel()}. {versions()}"
        )
    return Binding(
        tuple(indices),
        tuple(cuts),
        dist.get_world_size(group),
        dist.get_rank(group),
        group,
        parameters[0].device,
        keeps_gradients=bool(require_attribute(zero, "offload_optimizer")),
        gradient_buffer=(
            require_attribute(zero, "grad_partitions_flat_buffer"),
            sum(f.numel() for f in flats[:sub_group]),
            offset,
        ),
    )


def _process_group(zero: Any, sub_group: int) -> dist.ProcessGroup:
    """Return the ranks over which ZeRO-3 cuts the parameters of a sub-group: its own, or in older DeepSpeed those of all."""
    group: dist.ProcessGroup
    if hasattr(zero, "_get_sub_group_process_group"):
        group = zero._get_sub_group_process_group(sub_group)
    else:
        group = require_attribute(zero, "dp_process_group")
    return group


def refuse_unfinished_gathers(zero: Any) -> None:
    """Refuse parameters that ZeRO-3 keeps whole where DeepSpeed may use them before they have arrived.

    After a step it gathers them all, and older releases wait for the last of them alone. On gloo, whose collectives end in any
    order, a forward pass then reads what is not there yet, with every optimizer, and only sometimes.

    Args:
        zero: ``engine.optimizer``; one of another stage keeps none.

    Raises:
        LayoutError: such parameters.
    """
    kept = len(getattr(zero, "persistent_parameters", ()))
    if kept < 2 or waits_for_gathers():
        return
    groups = {_process_group(zero, index) for index in range(len(require_attribute(zero, "fp16_groups")))}
    if any(dist.get_world_size(group) > 1 and dist.get_backend(group) == dist.Backend.GLOO for group in groups):
        raise LayoutError(
            f"zero_optimization.stage3_param_persistence_threshold: got a value by which ZeRO-3 keeps {kept} parameters whole, "
            "which this DeepSpeed gathers on gloo without waiting for all of them; allowed: 0, or DeepSpeed >=0.19.8. "
            f"{versions()}"
        )


def _refuse_hidden_slices(zero: Any) -> None:
    if getattr(zero, "swap_optimizer", False):
        raise LayoutError("zero_optimization.offload_optimizer.device: got 'nvme'; allowed: 'cpu' or 'none'")
    if getattr(zero, "offload_optimizer", False) and getattr(zero, "partial_offload", 1.0) < 1.0:
        ratio = zero.partial_offload
        raise LayoutError(
            f"zero_optimization.offload_optimizer.ratio: got {ratio}; allowed: 1.0 (DeepSpeed steps the rest itself)"
        )
    if getattr(zero, "zenflow", False):
        raise LayoutError("zero_optimization.zenflow: got a section; allowed: none (it replaces the optimizer's step)")
    if getattr(zero, "postscale_gradients", False) and getattr(zero, "gradient_predivide_factor", 1.0) != 1.0:
        raise LayoutError(
            f"gradient_predivide_factor: got {zero.gradient_predivide_factor}, by which DeepSpeed would scale every gradient; "
            "allowed: 1.0, or with prescale_gradients: true"
        )
    quantized = {
        "zero_quantized_gradients": getattr(zero, "all2all_process_group", None) is not None,
        "zero_quantized_nontrainable_weights": bool(getattr(zero, "zero_quantized_nontrainable_weights", False)),
        "zero_quantized_weights": bool(getattr(getattr(zero, "parameter_offload", None), "zero_quantized_weights", False)),
    }
    for setting in (name for name, on in quantized.items() if on):
        raise LayoutError(f"zero_optimization.{setting}: got true; allowed: false")


def _only(slices: Sequence[Tensor]) -> Tensor:
    if len(slices) != 1:
        raise LayoutError(f"ZeRO asked for a step of {len(slices)} slices of one group; known: one. {versions()}")
    if slices[0].dtype != torch.float32:
        raise LayoutError(
            f"the slice that ZeRO wants stepped: got {slices[0].dtype}; allowed: torch.float32, so that no update is lost in "
            "the rounding of weights (bf16.bf16_master_weights_and_grads, fp16.fp16_master_weights_and_grads: false)"
        )
    return slices[0]


def require_attribute(owner: Any, attribute: str) -> Any:
    """Return an attribute of one of DeepSpeed's objects.

    Args:
        owner: the object.
        attribute: name of the attribute.

    Raises:
        LayoutError: the object lacks it; the message names the supported versions of DeepSpeed and the one found.
    """
    try:
        return getattr(owner, attribute)
    except AttributeError:
        raise LayoutError(f"{type(owner).__name__} has no attribute {attribute!r}. {versions()}") from None
