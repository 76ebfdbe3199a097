"""Places of fragments in the buffers of one rank's buckets. Pure Python on integers: no tensors, no process groups."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from types import MappingProxyType

from ds_optforge.zero.partition import Fragment, Matrix, PartitionLayout, Per, Range
from ds_optforge.zero.plan import ExchangePlan, Team, split_evenly


@dataclass(frozen=True, slots=True)
class Kept:
    """The float32 statistics that a rule keeps, which travel with the fragments.

    Attributes:
        per: for each statistic, "row" for one value per output row, "matrix" for one value per matrix.
        words: elements of the wire dtype that one float32 value takes.
    """

    per: tuple[Per, ...] = ()
    words: int = 1


NO_STATISTICS = Kept()

# Kernels that copy many tensors at a time read and write four elements at once where all of them begin at a multiple of that,
# in bytes 16 at most: 8 elements of a wire of 16 bits.
_ALIGNMENT = 8


def travelling_numel(numel: int, values: int, kept: Kept = NO_STATISTICS) -> int:
    """Return the elements that a fragment of ``numel``, with ``values`` of statistics and its flag, takes in a buffer."""
    return -(-(numel + kept.words * values + 1) // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, slots=True)
class Values:
    """Values ``within`` one statistic of a matrix, which lie in a buffer from ``position`` on."""

    within: Range
    position: int


@dataclass(frozen=True, slots=True)
class BufferPlace:
    """Place of one fragment in a send or receive buffer: of its elements, of the statistics kept with it, and of its flag.

    Attributes:
        matrix: number of its matrix in the layout.
        within: elements of its matrix.
        position: place of the first of them in the buffer.
        statistics: one entry per statistic of the rule.
        flag: place of the flag, which tells whether any of the fragment's gradient is not zero.
    """

    matrix: int
    within: Range
    position: int
    statistics: tuple[Values, ...]
    flag: int


@dataclass(frozen=True, slots=True)
class RankBucket:
    """The share of one rank in one bucket: its buffers, and the matrices that it owns.

    The send buffer has one block per destination rank, with the fragments of the matrices that it owns in matrix order; behind
    each fragment come its statistics, its flag, and what is unused until the next one begins aligned. The receive buffer has
    one block per source rank, built alike. A bucket that does not travel has its fragments by shape, then all statistics, then
    all flags.

    Attributes:
        fragments: this rank's fragments, with increasing slice offsets; where several members of a team get some of one, each
            of these is one.
        sent: place of each of them in the send buffer.
        owned: numbers of the matrices that this rank orthogonalizes, in order.
        shapes: (rows, cols) of each of them; for a fragment that is stepped alone, of the rows that it touches, and for a
            matrix with a team, of the rows that this rank owns.
        folds: number of blocks of columns in which the elements of each of them arrive, one behind the other.
        received: places of their fragments in the receive buffer.
        sends: elements per destination rank; empty if nothing travels (send and receive buffer are then the same).
        receives: elements per source rank; empty if nothing travels.
        kept: the rule's statistics.
        matrices: numbers of all of the bucket's matrices; if it travels, the same on all ranks.
        teams: of those owned matrices that have one, in the order in which all members take them.
    """

    fragments: tuple[Fragment, ...]
    sent: tuple[BufferPlace, ...]
    owned: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    folds: tuple[int, ...]
    received: tuple[BufferPlace, ...]
    sends: tuple[int, ...]
    receives: tuple[int, ...]
    kept: Kept
    matrices: tuple[int, ...]
    teams: tuple[Team, ...] = ()

    @property
    def travels(self) -> bool:
        """Whether the bucket is an exchange between ranks."""
        return bool(self.sends)

    @property
    def send_numel(self) -> int:
        """Elements of the send buffer."""
        return sum(self.sends) if self.travels else self._numel(self.sent)

    @property
    def receive_numel(self) -> int:
        """Elements of the receive buffer."""
        return sum(self.receives) if self.travels else self._numel(self.received)

    def _numel(self, places: Sequence[BufferPlace]) -> int:
        values = sum(values.within.numel for place in places for values in place.statistics)
        return sum(place.within.numel + 1 for place in places) + self.kept.words * values


def exchange_buckets(plan: ExchangePlan, rank: int, kept: Kept = NO_STATISTICS) -> list[RankBucket]:
    """Return the share of ``rank`` in every exchange of the plan, in the order of the collectives.

    Args:
        plan: of the group.
        rank: within the group's process group.
        kept: the rule's statistics.
    """
    return [_exchange_bucket(plan, exchange, rank, kept) for exchange in plan.exchanges]


def local_buckets(plan: ExchangePlan, rank: int, numel: int, kept: Kept = NO_STATISTICS) -> list[RankBucket]:
    """Return buckets of the matrices that lie whole on ``rank``, those of one shape in as few as possible.

    Args:
        plan: of the group.
        rank: within the group's process group.
        numel: most elements of a bucket; a larger matrix is one of its own.
        kept: the rule's statistics.
    """
    layout = plan.layout
    local = [m for m in range(len(layout.matrices)) if layout.holders(m) == range(rank, rank + 1)]
    local.sort(key=lambda index: (layout.matrices[index].rows, layout.matrices[index].cols))
    buckets = split_evenly(local, layout.matrices, numel)
    return [_local_bucket(layout, sorted(matrices), rank, kept) for matrices in buckets]


def _exchange_bucket(plan: ExchangePlan, exchange: Sequence[int], rank: int, kept: Kept) -> RankBucket:
    layout = plan.layout
    teams = {team.matrix: team for team in plan.teams_of(exchange)}
    own_teams = tuple(team for team in teams.values() if rank in team.ranks)
    blocks = {team.matrix: team.block(rank, layout.matrices[team.matrix].cols) for team in own_teams}
    owned = tuple(m for m in exchange if m in blocks or (plan.owners[m] == rank and m not in teams))
    leaving = [item for matrix in exchange for item in _to_owners(plan, matrix, rank, teams.get(matrix))]
    arriving = [
        (source, fragment)
        for matrix in owned
        for source in layout.holders(matrix)
        for owner, fragment in _to_owners(plan, matrix, source, teams.get(matrix))
        if owner == rank
    ]
    sends, sent = _blocks(layout, leaving, kept)
    receives, places = _blocks(layout, arriving, kept)
    received = tuple(_within_block(place, blocks[place.matrix]) if place.matrix in blocks else place for place in places)
    shapes, folds = _shapes(layout, owned, blocks), tuple(layout.matrices[matrix].folds for matrix in owned)
    held = tuple(fragment for _, fragment in leaving)
    return RankBucket(held, sent, owned, shapes, folds, received, sends, receives, kept, tuple(exchange), own_teams)


def _to_owners(plan: ExchangePlan, matrix: int, rank: int, team: Team | None) -> Iterator[tuple[int, Fragment]]:
    """Yield (owner, fragment) for what ``rank`` holds of a straddling matrix: several where it has a team."""
    fragment = plan.layout.fragment(matrix, rank)
    if fragment is None:
        return
    if team is None:
        yield plan.owners[matrix], fragment
        return
    for member in team.ranks:
        within = fragment.within.common(team.block(member, plan.layout.matrices[matrix].cols))
        if within is not None:
            yield member, Fragment(matrix, within, fragment.slice_start + within.start - fragment.within.start)


def _within_block(place: BufferPlace, block: Range) -> BufferPlace:
    """Return the fragment's place with elements counted from those of the ``block`` that a member of a team owns."""
    return replace(place, within=Range(place.within.start - block.start, place.within.numel))


def _local_bucket(layout: PartitionLayout, matrices: Sequence[int], rank: int, kept: Kept) -> RankBucket:
    """Make a bucket whose buffer holds matrices of one shape side by side, so that they form a batch without a copy."""
    held = [fragment for matrix in matrices if (fragment := layout.fragment(matrix, rank)) is not None]
    shapes = _shapes(layout, matrices)
    order = sorted(range(len(held)), key=lambda index: (shapes[index], index))
    places = _side_by_side(layout, [held[index] for index in order], kept)
    places = tuple(place for _, place in sorted(zip(order, places, strict=True), key=lambda pair: pair[0]))
    whole = (1,) * len(shapes)
    return RankBucket(tuple(held), places, tuple(matrices), shapes, whole, places, (), (), kept, tuple(matrices))


def lone_buckets(plan: ExchangePlan, rank: int, numel: int, kept: Kept = NO_STATISTICS) -> list[RankBucket]:
    """Return buckets of the fragments of straddling matrices on ``rank``, each as a matrix of the rows that it touches.

    Args:
        plan: of the group.
        rank: within the group's process group.
        numel: most elements of a bucket; a larger fragment is one of its own.
        kept: the rule's statistics.
    """
    layout = plan.layout
    straddling = [m for m in range(len(layout.matrices)) if len(layout.holders(m)) > 1]
    held = [fragment for matrix in straddling if (fragment := layout.fragment(matrix, rank)) is not None]
    found: list[list[Fragment]] = []
    room = 0
    for fragment in held:
        if not found or fragment.numel > room:
            found.append([])
            room = numel
        found[-1].append(fragment)
        room -= fragment.numel
    return [_lone_bucket(layout, fragments, rank, kept) for fragments in found]


def _lone_bucket(layout: PartitionLayout, held: Sequence[Fragment], rank: int, kept: Kept) -> RankBucket:
    places = _side_by_side(layout, held, kept)
    places_alone = tuple(_within_rows(layout.matrices[place.matrix], place, kept) for place in places)
    matrices = [layout.matrices[fragment.matrix] for fragment in held]
    shapes = tuple((m.rows_touched(f.within).numel, m.width) for m, f in zip(matrices, held, strict=True))
    owned, whole = tuple(fragment.matrix for fragment in held), (1,) * len(held)
    return RankBucket(tuple(held), places_alone, owned, shapes, whole, places_alone, (), (), kept, owned)


def _within_rows(matrix: Matrix, place: BufferPlace, kept: Kept) -> BufferPlace:
    """Return the fragment's place with elements and values counted from the first row that it touches."""
    before = matrix.rows_touched(place.within).start
    statistics = tuple(
        replace(values, within=Range(max(values.within.start - before, 0), values.within.numel))
        if per == "row" and not matrix.transposed
        else values
        for per, values in zip(kept.per, place.statistics, strict=True)
    )
    within = Range(place.within.start % matrix.width, place.within.numel)
    return replace(place, within=within, statistics=statistics)


def _shapes(
    layout: PartitionLayout, matrices: Sequence[int], blocks: Mapping[int, Range] = MappingProxyType({})
) -> tuple[tuple[int, int], ...]:
    """Return (rows, cols) of each of these matrices, or of the block of it that is owned."""
    found = ((blocks.get(m), layout.matrices[m]) for m in matrices)
    return tuple((block.numel // matrix.cols if block else matrix.rows, matrix.cols) for block, matrix in found)


def _blocks(
    layout: PartitionLayout, items: Sequence[tuple[int, Fragment]], kept: Kept
) -> tuple[tuple[int, ...], tuple[BufferPlace, ...]]:
    """Lay (peer, fragment) items out in one block per peer; return the blocks' sizes and each item's place."""
    ranges = [_ranges(layout, fragment, kept) for _, fragment in items]
    sizes = [0] * layout.world_size
    for (peer, fragment), found in zip(items, ranges, strict=True):
        sizes[peer] += travelling_numel(fragment.numel, sum(values.numel for values in found), kept)
    after = list(accumulate(sizes, initial=0))[:-1]
    places = []
    for (peer, f), found in zip(items, ranges, strict=True):
        start, values = after[peer], tuple(values.numel * kept.words for values in found)
        *positions, flag = accumulate(values, initial=start + f.numel)
        placed = tuple(Values(within, position) for within, position in zip(found, positions, strict=True))
        places.append(BufferPlace(f.matrix, f.within, start, placed, flag))
        after[peer] = start + travelling_numel(f.numel, sum(values) // kept.words, kept)
    return tuple(sizes), tuple(places)


def _side_by_side(layout: PartitionLayout, fragments: Sequence[Fragment], kept: Kept) -> tuple[BufferPlace, ...]:
    """Lay fragments out one behind the other, then their statistics, then their flags; return the place of each."""
    ranges = [_ranges(layout, fragment, kept) for fragment in fragments]
    position = 0
    value = sum(fragment.numel for fragment in fragments)
    flag = value + kept.words * sum(values.numel for found in ranges for values in found)
    places = []
    for f, found in zip(fragments, ranges, strict=True):
        values = []
        for within in found:
            values.append(Values(within, value))
            value += within.numel * kept.words
        places.append(BufferPlace(f.matrix, f.within, position, tuple(values), flag))
        position, flag = position + f.numel, flag + 1
    return tuple(places)


def _ranges(layout: PartitionLayout, fragment: Fragment, kept: Kept) -> list[Range]:
    """Return the values of each statistic that are kept with a fragment."""
    return [layout.matrices[fragment.matrix].values_in(per, fragment.within) for per in kept.per]
