"""Reads how tensor parallelism has cut parameters: DeepSpeed's AutoTP, or layers in the manner of Megatron with an mpu.

Each tensor rank has a shard: some rows, or some columns, of the whole weight.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optforge.zero.layout import Binding, LayoutError, expert_group_name
from ds_optforge.zero.versions import found_deepspeed, versions

# A dict that AutoTP leaves on each parameter of the layers it replaced; older DeepSpeed leaves only tensor_model_parallel.
_AUTOTP = "ds_autotp_universal_checkpoint_meta"
RANKS_OF_STAGE = "optforge_ranks"  # the attribute of a pipeline's grid that holds the group of this stage's ranks
_SEQUENCE = "sequence_parallel"  # a dimension of DeepSpeed's mesh
NAME = "optforge_name"  # the attribute that holds a parameter's qualified name


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's shard of a parameter.

    Attributes:
        whole: shape of the whole parameter.
        dim: the dimension that is cut: 0 or 1.
        count: number of shards.
        parts: rows of each fused weight, every one of which is cut into ``count``; empty if the shard is one range of rows.
        problem: why a matrix cannot be put together from such shards, or "".
    """

    whole: tuple[int, ...]
    dim: int
    count: int
    parts: tuple[int, ...] = ()
    problem: str = ""

    def local(self, matrices: Sequence[tuple[int, int, int]], transposed: bool, name: str) -> list[tuple[int, int, int]]:
        """Return (start in the shard, rows, cols) of each matrix.

        Args:
            matrices: (start, rows, cols) of the matrices in the whole parameter.
            transposed: whether the weight is stored (in, out).
            name: of the parameter, for messages.

        Raises:
            LayoutError: matrices that cannot be put together from the shards.
        """
        blocks = [rows for _, rows, _ in matrices]
        if self.problem or transposed or len(self.whole) != 2:
            found = self.problem or ("a weight stored (in, out)" if transposed else f"a weight of shape {self.whole}")
            raise LayoutError(f"{name}: got {found} under tensor parallelism; allowed: {_ALLOWED}")
        if self.dim == 0 and len(blocks) > 1 and (tuple(blocks) != self.parts or any(rows % self.count for rows in blocks)):
            cut = f"the fused weights {list(self.parts)} apart" if self.parts else f"{self.count} ranges of rows"
            raise LayoutError(
                f"{name}: got blocks of {_shortened(blocks)} rows from split or heads, but tensor parallelism cuts this weight "
                f"into {cut}; allowed: {'a split into the same parts, or no split' if self.parts else 'no split and no heads'}"
            )
        return [(start // self.count, rows, cols) for start, rows, cols in matrices]


_ALLOWED = (
    "a two-dimensional weight that is cut evenly by rows or by columns, or 'adamw' for it "
    '(overrides: [{"match": NAME, "name": "adamw"}])'
)


def _shortened(blocks: Sequence[int]) -> str:
    return str(list(blocks)) if len(blocks) <= 4 else f"[{blocks[0]}, {blocks[1]}, ... {len(blocks)} in all]"


def shard_of(parameter: Tensor) -> Shard | None:
    """Read how a parameter is cut; None for one that every tensor rank has whole.

    Raises:
        LayoutError: a parameter that is cut, but nothing tells how, or among how many ranks.
    """
    found: dict[str, Any] = getattr(parameter, _AUTOTP, None) or {}
    if found.get("replicated") or not getattr(parameter, "tensor_model_parallel", False):
        return None
    shape = local_shape(parameter)
    dim: int = found.get("partition_dim", getattr(parameter, "partition_dim", -1))
    if dim not in range(len(shape)):
        raise LayoutError(
            f"{getattr(parameter, NAME, None) or f'a parameter of shape {tuple(shape)}'}: is cut by tensor parallelism, and "
            f"nothing tells how: got neither {_AUTOTP} (which newer DeepSpeed's AutoTP writes) nor a partition_dim of 0 or 1; "
            f"allowed: one of them. {versions()}"
        )
    count = tensor_ranks()
    if count == 1:
        return None
    if found:
        return _of_autotp(found, dim, count)
    strided = getattr(parameter, "partition_stride", 1) != 1 and dim == 1
    problem = f"a partition_stride of {parameter.partition_stride} of columns" if strided else ""  # type: ignore[attr-defined]
    return Shard((*shape[:dim], shape[dim] * count, *shape[dim + 1 :]), dim, count, problem=problem)


def _of_autotp(found: dict[str, Any], dim: int, count: int) -> Shard:
    whole = tuple(found["logical_shape"] or found["original_shape"])
    sizes, widths = found.get("partition_sizes"), found.get("sub_param_shard_widths")
    problem = ""
    if widths:
        uneven = next((part for part in widths if len(set(part)) > 1), None)
        problem = f"a fused weight with shards of {list(uneven)} rows" if uneven else ""
    elif not sizes and "partition_sizes" not in found:
        problem = (
            f"a layer of AutoTP in DeepSpeed {found_deepspeed()}, which does not tell the sizes of all shards as newer does,"
        )
    elif not sizes:
        problem = "a layer of AutoTP whose shards are not ranges of rows or columns"
    elif len(set(sizes)) > 1:
        problem = f"shards of {list(sizes)} {'columns' if dim else 'rows'}"
    return Shard(whole, dim, count, tuple(sum(part) for part in widths or ()), problem)


def expert_ranks(parameter: Tensor) -> dist.ProcessGroup | None:
    """Return the ranks that share out the experts of ``parameter`` (``ep_size``, ``autoep_size`` above 1), or None.

    Raises:
        LayoutError: see `expert_group_name`.
    """
    name = expert_group_name(parameter)
    if not name:
        return None
    from deepspeed.utils import groups

    ranks: dist.ProcessGroup = groups._get_expert_parallel_group(name)
    return ranks if dist.get_world_size(ranks) > 1 else None


def experts_of(name: str, parameter: Tensor) -> tuple[Shard, int] | None:
    """Read which of a bank's experts this rank has, as a shard and its number; None for what ranks do not share out.

    Args:
        name: qualified name of the parameter.
        parameter: of an engine with expert parallelism, AutoEP's.

    Raises:
        LayoutError: experts that are no banks, or tensor parallelism beside them.
    """
    ranks = expert_ranks(parameter)
    if ranks is None:
        return None
    count, rank = dist.get_world_size(ranks), dist.get_rank(ranks)
    shape = local_shape(parameter)
    if len(shape) < 3 or shard_of(parameter) is not None:
        raise LayoutError(
            f"'{name}': got experts that {count} ranks share out under the same names (ep_size > 1); allowed: AutoEP's banks "
            "of experts, without tensor parallelism beside them"
        )
    return Shard((shape[0] * count, *shape[1:]), 0, count), rank


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the whole parameter's shape, even if ZeRO-3 has emptied or flattened it, or tensor parallelism has cut it."""
    shard = shard_of(parameter)
    return torch.Size(shard.whole) if shard else local_shape(parameter)


def local_numel(parameter: Tensor) -> int:
    """Return the elements of this rank's shard of ``parameter``, or of all of it, even if ZeRO-3 has emptied it."""
    return local_shape(parameter).numel()


def local_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of this rank's shard of ``parameter``, or of all of it, even if ZeRO-3 has emptied it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def tensor_ranks() -> int:
    """Return the number of ranks among which tensor parallelism cuts parameters.

    Raises:
        LayoutError: nothing tells it yet.
    """
    return dist.get_world_size(tensor_group())


def tensor_rank() -> int:
    """Return the number of this rank among the `tensor_ranks`.

    Raises:
        LayoutError: nothing tells it yet.
    """
    return dist.get_rank(tensor_group())


def tensor_group() -> dist.ProcessGroup:
    """Return this rank's group of tensor ranks.

    Raises:
        LayoutError: nothing tells it yet.
    """
    from deepspeed.utils import groups
    from deepspeed.utils.bwc import bwc_tensor_model_parallel_group

    unit = groups if groups.mpu is None else groups.mpu
    try:
        group: dist.ProcessGroup | None = bwc_tensor_model_parallel_group(unit)
    except AssertionError:  # AutoTP has made no groups
        group = None
    if group is None:
        raise LayoutError(
            "parameters are cut by tensor parallelism (tensor_model_parallel), but DeepSpeed knows no mpu yet; allowed: an "
            'optimizer that is made with the engine, by "type": "OptForge" or by a function, with mpu= of deepspeed.initialize'
        )
    return group


def ranks_of_mesh_sequence() -> int:
    """Return the number of ranks that share out a sequence by DeepSpeed's mesh (``mesh_param``); 1 without one."""
    groups = sys.modules.get("deepspeed.utils.groups")
    mesh = getattr(groups, "mesh_device", None)
    names = getattr(mesh, "mesh_dim_names", None) or ()
    return int(mesh.size(names.index(_SEQUENCE))) if mesh is not None and _SEQUENCE in names else 1


def over_tensor_ranks(binding: Binding) -> Binding:
    """Return a binding over the tensor ranks as well as the data ranks, tensor ranks innermost; in a pipeline, of one stage.

    Args:
        binding: over the data ranks.

    Raises:
        LayoutError: ranks that also differ in something else, or that are in another order.
    """
    group = tensor_group()
    count, index = dist.get_world_size(group), dist.get_rank(group)
    if binding.process_group is None:  # every data rank has everything, and a group of its own
        return replace(binding, world_size=count, rank=index, process_group=group, tensor_parallel=True)
    from deepspeed.utils import groups

    ranks = getattr(groups.mpu, RANKS_OF_STAGE, None) or dist.group.WORLD
    size, rank = dist.get_world_size(ranks), binding.rank * count + index
    if binding.world_size * count != size or rank != dist.get_rank(ranks):
        raise LayoutError(
            f"tensor parallelism on {count} ranks: got data rank {binding.rank} of {binding.world_size} and tensor rank "
            f"{index} on rank {dist.get_rank(ranks)} of {size}; allowed: data and tensor parallelism, or these in the stages "
            "of a registered PipelineModule, with the tensor ranks next to each other"
        )
    return replace(binding, world_size=size, rank=rank, process_group=ranks, tensor_parallel=True)
