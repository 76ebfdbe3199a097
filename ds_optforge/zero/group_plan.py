"""`plan_group`: from a group's parameters and tensors to this rank's buckets, agreed on by all ranks.

The one call that the first step of a group and a checkpoint share.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from ds_optforge.zero.buckets import Kept, RankBucket, exchange_buckets, local_buckets, lone_buckets
from ds_optforge.zero.exchange import BucketExchange, require_agreement
from ds_optforge.zero.layout import Binding, bind
from ds_optforge.zero.partition import Matrix, PartitionLayout, Per
from ds_optforge.zero.placement import Held, Placement, TensorRange
from ds_optforge.zero.plan import make_plan


class Routed(Protocol):
    """A parameter's name, size and matrices: (start in the flattened parameter, rows, cols) each, none if it has no use."""

    @property
    def name(self) -> str: ...

    @property
    def numel(self) -> int: ...

    @property
    def matrices(self) -> Sequence[tuple[int, int, int]]: ...

    @property
    def transposed(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a rule and a sharding mode ask of a plan.

    Attributes:
        bucket_numel: see `make_plan`.
        cost: FLOPs of a (rows, cols) matrix; None for an elementwise rule, which has no buckets.
        wire: dtype in which fragments and updates travel.
        statistics: what each of the rule's statistics has a value for.
        gathers, alone: whether matrices that lie on several ranks travel to owners, and whether fragments are stepped alone.
    """

    bucket_numel: int
    cost: Callable[[int, int], int] | None = None
    wire: torch.dtype = torch.float32
    statistics: tuple[Per, ...] = ()
    gathers: bool = True
    alone: bool = False


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
    """One call of ``step()``: where everything lies, and what this rank does.

    Attributes:
        held: the fragments in each tensor.
        value_counts: by statistic, the values that are kept with each tensor.
        travelling, local: buckets of matrices that lie on several ranks, and on this one alone.
        alone: this rank's fragments of the former as matrices of their own.
    """

    binding: Binding
    placement: Placement
    held: tuple[tuple[Held, ...], ...]
    value_counts: tuple[tuple[int, ...], ...] = ()
    travelling: tuple[PlannedBucket, ...] = ()
    local: tuple[PlannedBucket, ...] = ()
    alone: tuple[PlannedBucket, ...] = ()


def plan_group(
    parameters: Sequence[Tensor], routes: Sequence[Routed], tensors: Sequence[Tensor], wanted: Wanted, agreed: str
) -> GroupPlan:
    """Find the tensors' layout, make the plan and agree on it. All ranks of the group take part, in the same order.

    Args:
        parameters, routes: of the group, as given to the optimizer.
        tensors: ``group["params"]`` at the time of the step.
        agreed: a text that must be the same on all ranks, with a line for each parameter.

    Raises:
        LayoutError: on all ranks, if any of them cannot read its layout or has another plan or text.
    """
    binding = bind(parameters, [route.name for route in routes], tensors)
    found = [routes[index] for index in binding.indices]
    names = tuple(route.name for route in found)
    layout = PartitionLayout(binding.world_size, names, binding.cuts, tuple(matrices_of(found)))
    starts = tuple(accumulate((tensor.numel() for tensor in tensors), initial=0))[:-1]
    placement = Placement(layout, binding.rank, starts)
    cost = wanted.cost
    plan = make_plan(layout, lambda matrix: cost(matrix.rows, matrix.cols) if cost else 0, wanted.bucket_numel)
    require_agreement(plan, agreed, binding)
    held = tuple(map(tuple, placement.held_fragments()))
    if cost is None:
        return GroupPlan(binding, placement, held)
    kept = Kept(wanted.statistics, torch.float32.itemsize // wanted.wire.itemsize)
    bucket_of = _Planner(binding, placement, wanted, plan.local_numel)  # batches as large as what does not travel
    return GroupPlan(
        binding,
        placement,
        held,
        tuple(tuple(placement.value_counts(per)) for per in wanted.statistics),
        tuple(map(bucket_of, exchange_buckets(plan, binding.rank, kept))) if wanted.gathers else (),
        tuple(map(bucket_of, local_buckets(plan, binding.rank, kept))),
        tuple(map(bucket_of, lone_buckets(plan, binding.rank, kept))) if wanted.alone else (),
    )


class _Planner:
    """Finds the places of buckets in the tensors."""

    def __init__(self, binding: Binding, placement: Placement, wanted: Wanted, batch_numel: int) -> None:
        self._binding, self._placement, self._wire, self._batch_numel = binding, placement, wanted.wire, batch_numel
        self._values = [placement.value_places(per) for per in wanted.statistics]

    def __call__(self, bucket: RankBucket) -> PlannedBucket:
        exchange = BucketExchange(self._placement.layout, bucket, self._binding, self._wire, self._batch_numel)
        fragments = tuple(self._placement.range_of(fragment) for fragment in bucket.fragments)
        kept = tuple(tuple(values[fragment.matrix] for values in self._values) for fragment in bucket.fragments)
        return PlannedBucket(exchange, fragments, kept)


def matrices_of(routes: Sequence[Routed]) -> Iterator[Matrix]:
    """The matrices of a matrix rule; for an elementwise rule each parameter as one row."""
    for index, route in enumerate(routes):
        if not route.matrices:
            yield Matrix(index, 0, 1, route.numel)
        for start, rows, cols in route.matrices:
            yield Matrix(index, start, rows, cols, route.transposed)
