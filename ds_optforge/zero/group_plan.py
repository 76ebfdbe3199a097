"""Plans one call of ``step()``: from a group's parameters and tensors to this rank's buckets, agreed on by all ranks.

A group's first step and a checkpoint make the same call, `plan_group`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from ds_optforge.zero.agreement import require_agreement
from ds_optforge.zero.buckets import Kept, RankBucket, exchange_buckets, local_buckets, lone_buckets
from ds_optforge.zero.exchange import BucketExchange
from ds_optforge.zero.layout import Binding, bind
from ds_optforge.zero.partition import Joined, Matrix, PartitionLayout, Per, chosen_shape
from ds_optforge.zero.placement import Held, Placement, TensorRange
from ds_optforge.zero.plan import ExchangePlan, make_plan
from ds_optforge.zero.shards import Shard, local_numel, over_tensor_ranks, shard_of
from ds_optforge.zero.teams import with_teams


class Routed(Protocol):
    """The facts about a parameter that a plan needs."""

    @property
    def name(self) -> str:
        """Qualified name of the parameter."""

    @property
    def matrices(self) -> Sequence[tuple[int, int, int]]:
        """(start in the flattened parameter, rows, cols) of each matrix; empty for an elementwise rule."""

    @property
    def transposed(self) -> bool:
        """Whether the matrices are stored (in, out)."""

    @property
    def joins(self) -> Joined | None:
        """The matrices that each of them joins; None if it is one itself."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Requirements of a rule and a sharding mode on a plan.

    Attributes:
        bucket_numel: elements of one bucket per rank: see `make_plan`.
        cost: FLOPs on a type of device of a (rows, cols) matrix; None for an elementwise rule, which has no buckets.
        wire: dtype in which fragments and updates travel.
        statistics: by statistic that travels to owners, whether it has a value per output row or per matrix.
        gathers: whether straddling matrices ever travel to owners.
        alone: whether fragments of straddling matrices are ever stepped alone.
        keeps: whether owners keep factors of their matrices.
        team_cost: what a matrix costs a team on a type of device: see `with_teams`; None for a rule that needs one owner.
        rows: how many of so many output rows a step orthogonalizes and sends; None for all of them.
    """

    bucket_numel: int
    cost: Callable[[str, int, int], int] | None = None
    wire: torch.dtype = torch.float32
    statistics: tuple[Per, ...] = ()
    gathers: bool = True
    alone: bool = False
    keeps: bool = False
    team_cost: Callable[[str, int, int, Sequence[int]], tuple[int, int, int]] | None = None
    rows: Callable[[int], int] | None = None

    def cost_of(self, device: str, matrix: Matrix) -> int:
        """Return the FLOPs of what a step orthogonalizes of ``matrix`` on a type of device."""
        shape = chosen_shape(*matrix.part_shape, matrix.transposed, self.rows)
        return matrix.parts * self.cost(device, *shape) if self.cost else 0


@dataclass(frozen=True, slots=True, eq=False)
class PlannedBucket:
    """One bucket of this rank.

    Attributes:
        exchange: its matrices' way to their owners and back.
        fragments: where each of this rank's fragments lies in the tensors.
        kept: by fragment, then by statistic, the values that are kept with it.
    """

    exchange: BucketExchange
    fragments: tuple[TensorRange, ...]
    kept: tuple[tuple[TensorRange, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class GroupPlan:
    """The plan of one call of ``step()``, with this rank's buckets.

    Attributes:
        binding: the places of the parameters in the tensors.
        placement: this rank's view of the layout.
        held: by tensor, the fragments in it.
        travelling: buckets of straddling matrices.
        local: buckets of matrices that lie whole on this rank.
        alone: buckets of this rank's fragments of straddling matrices, as matrices of their own.
    """

    binding: Binding
    placement: Placement
    held: tuple[tuple[Held, ...], ...]
    travelling: tuple[PlannedBucket, ...] = ()
    local: tuple[PlannedBucket, ...] = ()
    alone: tuple[PlannedBucket, ...] = ()


def plan_group(
    parameters: Sequence[Tensor], routes: Sequence[Routed], tensors: Sequence[Tensor], wanted: Wanted, agreed: str
) -> GroupPlan:
    """Find the tensors' layout, make the plan and agree on it. Collective, in the same order of groups on all ranks.

    Args:
        parameters: of the group, as given to the optimizer.
        routes: of these parameters, in the same order.
        tensors: ``group["params"]`` at the time of the step.
        wanted: requirements of the rule and the sharding mode.
        agreed: a text that must be the same on all ranks, with a line for each parameter.

    Raises:
        LayoutError: see `bind`; and on all ranks, if any slice does not hold its weights, or any rank has another plan or
            text.
    """
    binding = bind(parameters, [route.name for route in routes], tensors)
    found = [(routes[index], parameters[index]) for index in binding.indices]
    matrices = tuple(_matrices(found))
    # An elementwise rule needs no other ranks, and takes shards of any size.
    tensor_ranks = max((matrix.shards for matrix in matrices), default=1)
    if tensor_ranks > 1:
        binding = over_tensor_ranks(binding)
    names = tuple(route.name for route, _ in found)
    layout = PartitionLayout(binding.world_size, names, binding.cuts, matrices, tensor_ranks)
    starts = tuple(accumulate((tensor.numel() for tensor in tensors), initial=0))[:-1]
    device = binding.device.type
    plan = _plan(layout, wanted, device)
    require_agreement(plan, agreed, binding)
    placement = Placement(layout, binding.rank, starts, plan.owners if wanted.keeps else ())
    held = tuple(map(tuple, placement.held_fragments()))
    if wanted.cost is None:
        return GroupPlan(binding, placement, held)
    kept = Kept(wanted.statistics, torch.float32.itemsize // wanted.wire.itemsize)
    numel = plan.local_numel(device)
    bucket_of = _Planner(binding, placement, wanted, numel, tensors[0].device)
    return GroupPlan(
        binding,
        placement,
        held,
        tuple(map(bucket_of, exchange_buckets(plan, binding.rank, kept))) if wanted.gathers else (),
        tuple(map(bucket_of, local_buckets(plan, binding.rank, numel, kept))),
        tuple(map(bucket_of, lone_buckets(plan, binding.rank, numel, kept))) if wanted.alone else (),
    )


def _plan(layout: PartitionLayout, wanted: Wanted, device: str) -> ExchangePlan:
    cost_of = partial(wanted.cost_of, device)
    plan = make_plan(layout, cost_of, wanted.bucket_numel, device)
    if wanted.team_cost and wanted.gathers:
        return with_teams(plan, cost_of, partial(wanted.team_cost, device), wanted.wire.itemsize, device)
    return plan


class _Planner:
    """Finds the places of buckets in the tensors."""

    def __init__(self, binding: Binding, placement: Placement, wanted: Wanted, batch_numel: int, near: torch.device) -> None:
        self._near = near
        self._binding, self._placement, self._wire, self._batch_numel = binding, placement, wanted.wire, batch_numel
        self._by_rows = wanted.rows is not None
        self._values = [placement.value_places(per) for per in wanted.statistics]

    def __call__(self, bucket: RankBucket) -> PlannedBucket:
        layout = self._placement.layout
        exchange = BucketExchange(layout, bucket, self._binding, self._wire, self._batch_numel, self._near, self._by_rows)
        fragments = tuple(self._placement.range_of(fragment) for fragment in bucket.fragments)
        kept = tuple(tuple(values[fragment.matrix] for values in self._values) for fragment in bucket.fragments)
        return PlannedBucket(exchange, fragments, kept)


def _matrices(found: Sequence[tuple[Routed, Tensor]]) -> Iterator[Matrix]:
    """Yield the matrices of parameters, in order; one of an elementwise rule counts as a matrix of a single row.

    Raises:
        LayoutError: a matrix that tensor parallelism has cut in a way that is not supported.
    """
    for index, (route, parameter) in enumerate(found):
        shard = shard_of(parameter) if route.matrices else None
        yield from matrices_of(index, route, local_numel(parameter), shard)


def matrices_of(index: int, route: Routed, numel: int, shard: Shard | None = None) -> Iterator[Matrix]:
    """Yield the matrices of one parameter in order; a parameter of an elementwise rule counts as a matrix of a single row.

    Args:
        index: number of the parameter in the layout.
        route: of the parameter.
        numel: elements of the parameter on this rank.
        shard: how tensor parallelism has cut it; None if it has not.

    Raises:
        LayoutError: a cut that is not supported.
    """
    if not route.matrices:
        yield Matrix(index, 0, 1, numel)
    elif shard is None:
        for start, rows, cols in route.matrices:
            yield Matrix(index, start, rows, cols, route.transposed, joins=route.joins)
    else:
        for start, rows, cols in shard.local(route.matrices, route.transposed, route.name):
            yield Matrix(index, start, rows, cols, shards=shard.count, dim=shard.dim)
