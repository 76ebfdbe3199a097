"""Elements that travel in each exchange of a plan, without the buckets of all ranks."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ds_optforge.zero.buckets import NO_STATISTICS, Kept, travelling_numel
from ds_optforge.zero.partition import PartitionLayout, Range
from ds_optforge.zero.plan import ExchangePlan, Team


@dataclass(frozen=True, slots=True)
class ExchangeSizes:
    """Elements of one exchange's buffers, by rank.

    Attributes:
        sends, receives: elements of the rank's send and receive buffer.
        keeps: elements that it would send to itself.
    """

    sends: list[int]
    receives: list[int]
    keeps: list[int]

    def travels(self, rank: int) -> int:
        """Elements that the rank sends to others: fragments to the owners, and updates back."""
        return self.sends[rank] + self.receives[rank] - 2 * self.keeps[rank]


def exchange_sizes(
    plan: ExchangePlan, kept: Kept = NO_STATISTICS, rows: Callable[[int], int] | None = None
) -> list[ExchangeSizes]:
    """Sizes of the buffers that `exchange_buckets` makes on every rank, in O(fragments) time.

    Args:
        plan: of the group.
        kept: the rule's statistics.
        rows: how many of so many output rows are chosen; the sizes are then means of what travels, as if every row were chosen
            as often as another.
    """
    sizes = []
    for exchange in plan.exchanges:
        size = ExchangeSizes(*([0] * plan.layout.world_size for _ in range(3)))
        teams = plan.teams_of(exchange)
        for team in teams:
            _add_team(size, plan.layout, team)
        in_teams = {team.matrix for team in teams}
        for alike in cut_alike(plan.layout, [index for index in exchange if index not in in_teams]):
            matrix, first = plan.layout.matrices[alike[0]], plan.layout.holders(alike[0]).start
            outputs = matrix.outputs // matrix.parts
            chosen = rows(outputs) if rows else outputs
            elements = [
                _numel(within.numel, sum(matrix.values_in(per, within).numel for per in kept.per), kept, chosen / outputs)
                for _, within in fragments(plan.layout, alike[0])
            ]
            for rank, count in enumerate(elements, start=first):
                size.sends[rank] += len(alike) * count
            for owner in (plan.owners[index] for index in alike):
                size.receives[owner] += sum(elements)
                size.keeps[owner] += elements[owner - first]
        sizes.append(size)
    return sizes


def _numel(numel: int, values: int, kept: Kept, share: float) -> int:
    """Return the elements that travel of a fragment; of chosen rows nothing but what they need."""
    if share == 1:
        return travelling_numel(numel, values, kept)
    return round(numel * share) + 1 + kept.words * values


def _add_team(size: ExchangeSizes, layout: PartitionLayout, team: Team) -> None:
    """Add what travels to the members of a team, which has no statistics."""
    cols = layout.matrices[team.matrix].cols
    ends = [cols * rows for rows in accumulate(team.rows)]
    for rank, within in fragments(layout, team.matrix):
        at = within.start
        while at < within.end:
            member = bisect_right(ends, at)
            numel = travelling_numel(min(ends[member], within.end) - at, values=0)
            at = ends[member]
            size.sends[rank] += numel
            size.receives[team.ranks[member]] += numel
            size.keeps[rank] += numel * (rank == team.ranks[member])


def cut_alike(layout: PartitionLayout, indices: Sequence[int]) -> Iterable[list[int]]:
    """Group matrices by shape and cuts: on ZeRO-3, the layers of a model are alike."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index in indices:
        matrix = layout.matrices[index]
        cut = layout.cuts[matrix.parameter]
        key = (cut.base + matrix.start, cut.size, matrix.rows, matrix.cols, matrix.transposed, matrix.joins)
        groups.setdefault(key, []).append(index)
    return groups.values()


def fragments(layout: PartitionLayout, index: int) -> Iterator[tuple[int, Range]]:
    """Yield (rank, elements within the matrix) for each fragment of a matrix."""
    matrix = layout.matrices[index]
    cut = layout.cuts[matrix.parameter]
    begin = cut.base + matrix.start
    at = 0
    for rank in layout.holders(index):
        end = min((rank + 1) * cut.size - begin, matrix.numel)
        yield rank, Range(at, end - at)
        at = end
