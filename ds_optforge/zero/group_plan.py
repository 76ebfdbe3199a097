"""Plans one call of ``step()``: from a group's parameters and tensors to this rank's buckets, agreed on by all ranks.

A group's first step and a checkpoint make the same call, `plan_group`.
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
    """The facts about a parameter that a plan needs."""

    @property
    def name(self) -> str:
        """Qualified name of the parameter."""

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""

    @property
    def matrices(self) -> Sequence[tuple[int, int, int]]:
        """(start in the flattened parameter, rows, cols) of each matrix; empty for an elementwise rule."""

    @property
    def transposed(self) -> bool:
        """Whether the matrices are stored (in, out)."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Requirements of a rule and a sharding mode on a plan.

    Attributes:
        bucket_numel: elements of one bucket per rank: see `make_plan`.
        cost: FLOPs of a (rows, cols) matrix; None for an elementwise rule, which has no buckets.
        kept: the rule's statistics.
        gathers: whether straddling matrices ever travel to owners.
        alone: whether fragments of straddling matrices are ever stepped alone.
    """

    bucket_numel: int
    cost: Callable[[int, int], int] | None = None
    kept: Kept = NO_STATISTICS
    gathers: bool = True
    alone: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class GroupPlan:
    """The plan of one call of ``step()``, with this rank's buckets.

    Attributes:
        binding: the places of the parameters in the tensors.
        placement: this rank's view of the layout.
        plan: owners and exchanges, the same on all ranks.
        travelling: buckets of straddling matrices.
        local: buckets of matrices that lie whole on this rank.
        alone: buckets of this rank's fragments of straddling matrices, as matrices of their own.
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
    """Yield the matrices of ``routes`` in order; a parameter of an elementwise rule counts as a matrix of a single row."""
    for index, route in enumerate(routes):
        if not route.matrices:
            yield Matrix(index, 0, 1, route.numel)
        for start, rows, cols in route.matrices:
            yield Matrix(index, start, rows, cols, route.transposed)
