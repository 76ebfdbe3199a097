"""Where fragments lie in the buffers of one rank's buckets. Pure Python on integers: no tensors, no process groups."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from ds_optforge.zero.partition import Fragment, Matrix, PartitionLayout, Per, Range
from ds_optforge.zero.plan import ExchangePlan, split_evenly


@dataclass(frozen=True, slots=True)
class Kept:
    """The float32 statistics that a rule keeps, which travel with the fragments.

    Attributes:
        per: what each of them has a value for.
        words: elements of the wire dtype per value.
    """

    per: tuple[Per, ...] = ()
    words: int = 1


NO_STATISTICS = Kept()


@dataclass(frozen=True, slots=True)
class Values:
    """Values ``within`` one statistic of a matrix, at ``position`` of a buffer and following."""

    within: Range
    position: int


@dataclass(frozen=True, slots=True)
class BufferPlace:
    """Where one fragment lies in a send or receive buffer: its elements, the statistics that are kept with it, and its flag.

    Attributes:
        within: elements of its matrix, at ``position`` of the buffer and following.
        statistics: one entry per statistic of the rule.
        flag: position of the flag.
    """

    matrix: int
    within: Range
    position: int
    statistics: tuple[Values, ...]
    flag: int


@dataclass(frozen=True, slots=True)
class RankBucket:
    """What one rank does in one bucket.

    The send buffer is a block per destination rank: the fragments that it owns, in matrix order (of what does not travel, by
    shape), then their statistics, then their flags. The receive buffer is a block per source rank, built alike.

    Attributes:
        fragments: this rank's fragments, with increasing slice offsets.
        sent: where each of them lies in the send buffer.
        owned: matrices that this rank orthogonalizes, in order.
        shapes: (rows, cols) of each of them; of a shard, the rows that it touches.
        received: where their fragments lie in the receive buffer.
        sends: elements per destination rank; empty when nothing travels (then send and receive buffer are the same).
        receives: elements per source rank; empty likewise.
        kept: the rule's statistics.
        matrices: all of the bucket's, of whichever rank: of one that travels, the same on all ranks.
    """

    fragments: tuple[Fragment, ...]
    sent: tuple[BufferPlace, ...]
    owned: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    received: tuple[BufferPlace, ...]
    sends: tuple[int, ...]
    receives: tuple[int, ...]
    kept: Kept
    matrices: tuple[int, ...]

    @property
    def travels(self) -> bool:
        return bool(self.sends)

    @property
    def send_numel(self) -> int:
        return self._numel(self.sent)

    @property
    def receive_numel(self) -> int:
        return self._numel(self.received)

    def _numel(self, places: Sequence[BufferPlace]) -> int:
        values = sum(values.within.numel for place in places for values in place.statistics)
        return sum(place.within.numel + 1 for place in places) + self.kept.words * values


def exchange_buckets(plan: ExchangePlan, rank: int, kept: Kept = NO_STATISTICS) -> list[RankBucket]:
    """This rank's part in every exchange, in the order of the collectives."""
    return [_exchange_bucket(plan, exchange, rank, kept) for exchange in plan.exchanges]


def local_buckets(plan: ExchangePlan, rank: int, kept: Kept = NO_STATISTICS) -> list[RankBucket]:
    """The matrices that lie whole on this rank, at most ``local_numel`` elements in a bucket."""
    layout = plan.layout
    local = [m for m in range(len(layout.matrices)) if layout.holders(m) == range(rank, rank + 1)]
    return [_local_bucket(layout, matrices, rank, kept) for matrices in split_evenly(local, layout.matrices, plan.local_numel)]


def _exchange_bucket(plan: ExchangePlan, exchange: Sequence[int], rank: int, kept: Kept) -> RankBucket:
    layout, owners = plan.layout, plan.owners
    held = [fragment for matrix in exchange if (fragment := layout.fragment(matrix, rank)) is not None]
    owned = tuple(matrix for matrix in exchange if owners[matrix] == rank)
    arriving = [
        (source, fragment)
        for matrix in owned
        for source in layout.holders(matrix)
        if (fragment := layout.fragment(matrix, source)) is not None
    ]
    sends, sent = _blocks(layout, [(owners[fragment.matrix], fragment) for fragment in held], kept)
    receives, received = _blocks(layout, arriving, kept)
    return RankBucket(tuple(held), sent, owned, _shapes(layout, owned), received, sends, receives, kept, tuple(exchange))


def _local_bucket(layout: PartitionLayout, matrices: Sequence[int], rank: int, kept: Kept) -> RankBucket:
    """Its buffer holds matrices of one shape side by side, so that they are a batch as they lie."""
    held = [fragment for matrix in matrices if (fragment := layout.fragment(matrix, rank)) is not None]
    shapes = _shapes(layout, matrices)
    order = sorted(range(len(held)), key=lambda index: (shapes[index], index))
    _, blocks = _blocks(layout, [(rank, held[index]) for index in order], kept)
    places = tuple(place for _, place in sorted(zip(order, blocks, strict=True), key=lambda pair: pair[0]))
    return RankBucket(tuple(held), places, tuple(matrices), shapes, places, (), (), kept, tuple(matrices))


def lone_buckets(plan: ExchangePlan, rank: int, kept: Kept = NO_STATISTICS) -> list[RankBucket]:
    """This rank's fragments of matrices that lie on several ranks, each as a matrix of its own: the rows that it touches."""
    layout = plan.layout
    straddling = [m for m in range(len(layout.matrices)) if len(layout.holders(m)) > 1]
    held = [fragment for matrix in straddling if (fragment := layout.fragment(matrix, rank)) is not None]
    found: list[list[Fragment]] = []
    room = 0
    for fragment in held:
        if not found or fragment.numel > room:
            found.append([])
            room = plan.local_numel
        found[-1].append(fragment)
        room -= fragment.numel
    return [_lone_bucket(layout, fragments, rank, kept) for fragments in found]


def _lone_bucket(layout: PartitionLayout, held: Sequence[Fragment], rank: int, kept: Kept) -> RankBucket:
    _, places = _blocks(layout, [(rank, fragment) for fragment in held], kept)
    places_alone = tuple(_within_rows(layout.matrices[place.matrix], place, kept) for place in places)
    matrices = [layout.matrices[fragment.matrix] for fragment in held]
    shapes = tuple((m.rows_touched(f.within).numel, m.cols) for m, f in zip(matrices, held, strict=True))
    owned = tuple(fragment.matrix for fragment in held)
    return RankBucket(tuple(held), places_alone, owned, shapes, places_alone, (), (), kept, owned)


def _within_rows(matrix: Matrix, place: BufferPlace, kept: Kept) -> BufferPlace:
    """The fragment's place as a part of the rows that it touches."""
    before = matrix.rows_touched(place.within).start
    statistics = tuple(
        replace(values, within=Range(values.within.start - before, values.within.numel))
        if per == "row" and not matrix.transposed
        else values
        for per, values in zip(kept.per, place.statistics, strict=True)
    )
    within = Range(place.within.start - before * matrix.cols, place.within.numel)
    return replace(place, within=within, statistics=statistics)


def _shapes(layout: PartitionLayout, matrices: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((layout.matrices[m].rows, layout.matrices[m].cols) for m in matrices)


def _blocks(
    layout: PartitionLayout, items: Sequence[tuple[int, Fragment]], kept: Kept
) -> tuple[tuple[int, ...], tuple[BufferPlace, ...]]:
    """Lay (peer, fragment) items out in one block per peer. Returns the blocks' sizes and each item's place."""
    ranges = [[layout.matrices[f.matrix].values_in(per, f.within) for per in kept.per] for _, f in items]
    data, statistics, flags = ([0] * layout.world_size for _ in range(3))
    for (peer, fragment), found in zip(items, ranges, strict=True):
        data[peer] += fragment.numel
        statistics[peer] += kept.words * sum(values.numel for values in found)
        flags[peer] += 1
    sizes = tuple(map(sum, zip(data, statistics, flags, strict=True)))
    starts = list(accumulate(sizes, initial=0))[:-1]
    next_data = list(starts)
    next_value = [start + d for start, d in zip(starts, data, strict=True)]
    next_flag = [start + s for start, s in zip(next_value, statistics, strict=True)]
    places = []
    for (peer, f), found in zip(items, ranges, strict=True):
        values = []
        for within in found:
            values.append(Values(within, next_value[peer]))
            next_value[peer] += within.numel * kept.words
        places.append(BufferPlace(f.matrix, f.within, next_data[peer], tuple(values), next_flag[peer]))
        next_data[peer] += f.numel
        next_flag[peer] += 1
    return sizes, tuple(places)
