"""`plan_group`: from a group's parameters and tensors to this rank's buckets, agreed on by all ranks.

The one call that the first step of a group and a checkpoint share.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from torch import Tensor

from ds_optforge.zero.buckets import NO_STATISTICS, Kept, RankBucket, exchange_buckets, local_buckets, lone_buckets
from ds_optforge.zero.exchange import require_agreement
from ds_optforge.zero.layout import Binding, bind
from ds_optforge.zero.partition import Matrix, PartitionLayout
from ds_optforge.zero.placement import Placement
from ds_optforge.zero.plan import ExchangePlan, make_plan


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
        kept: the rule's statistics.
        gathers, alone: whether matrices that lie on several ranks travel to owners, and whether fragments are stepped alone.
    """

    bucket_numel: int
    cost: Callable[[int, int], int] | None = None
    kept: Kept = NO_STATISTICS
    gathers: bool = True
    alone: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class GroupPlan:
    """One call of ``step()``: where everything lies, and what this rank does.

    Attributes:
        travelling, local: buckets of matrices that lie on several ranks, and on this one alone.
        alone: this rank's fragments of the former as matrices of their own.
    """

    binding: Binding
    placement: Placement
    plan: ExchangePlan
    travelling: tuple[RankBucket, ...] = ()
    local: tuple[RankBucket, ...] = ()
    alone: tuple[RankBucket, ...] = ()


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
    cost, rank = wanted.cost, binding.rank
    plan = make_plan(layout, lambda matrix: cost(matrix.rows, matrix.cols) if cost else 0, wanted.bucket_numel)
    require_agreement(plan, agreed, binding)
    if cost is None:
        return GroupPlan(binding, placement, plan)
    return GroupPlan(
        binding,
        placement,
        plan,
        tuple(exchange_buckets(plan, rank, wanted.kept)) if wanted.gathers else (),
        tuple(local_buckets(plan, rank, wanted.kept)),
        tuple(lone_buckets(plan, rank, wanted.kept)) if wanted.alone else (),
    )


def matrices_of(routes: Sequence[Routed]) -> Iterator[Matrix]:
    """The matrices of a matrix rule; for an elementwise rule each parameter as one row."""
    for index, route in enumerate(routes):
        if not route.matrices:
            yield Matrix(index, 0, 1, route.numel)
        for start, rows, cols in route.matrices:
            yield Matrix(index, start, rows, cols, route.transposed)
