"""Who holds what, who orthogonalizes what, and in which order it travels. Pure Python on integers: no tensors, no groups.

A parameter is row-major, so every matrix is a contiguous range of the flattened parameter, and ZeRO's cuts turn it into
contiguous fragments. Everything here is a deterministic function of the `PartitionLayout`, so ranks never have to agree
on a plan by talking.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Matrix:
    """One (rows, cols) matrix: elements [start, start + rows * cols) of the flattened parameter number ``parameter``.

    ``transposed``: it is stored (in, out), so that its output rows are the columns.
    """

    parameter: int
    start: int
    rows: int
    cols: int
    transposed: bool = False

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def outputs(self) -> int:
        return self.cols if self.transposed else self.rows

    def outputs_in(self, start: int, numel: int) -> tuple[int, int]:
        """(first, count) of the output rows whose first element lies in elements [start, start + numel) of the matrix."""
        step = 1 if self.transposed else self.cols
        first, end = -(-start // step), -(-(start + numel) // step)
        return min(first, self.outputs), min(end, self.outputs) - min(first, self.outputs)


@dataclass(frozen=True, slots=True)
class Cut:
    """Where ZeRO put one flattened parameter.

    Element e lives on rank ``(base + e) // size``, at position ``offset + (base + e) % size`` of that rank's slice.
    ZeRO-1/2 cut the flat group (base: the parameter's position in it; size: the partition); ZeRO-3 cuts each parameter
    (base 0; offset: its place in the slice); a replicated parameter is one piece (size: its numel).
    """

    base: int
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements [start, start + numel) of a matrix, at [offset, offset + numel) of one rank's slice."""

    matrix: int
    start: int
    numel: int
    offset: int


@dataclass(frozen=True, slots=True)
class PartitionLayout:
    """Where every matrix of one optimizer group lies: the same object on every rank of the process group.

    ``names`` and ``cuts`` are per parameter, in the order in which the parameters lie in the slices; ``matrices`` are
    ordered likewise, so that a rank's fragments have increasing offsets.
    """

    world_size: int
    names: tuple[str, ...]
    cuts: tuple[Cut, ...]
    matrices: tuple[Matrix, ...]

    def holders(self, matrix: int) -> range:
        """The ranks that hold at least one element of the matrix."""
        piece = self.matrices[matrix]
        cut = self.cuts[piece.parameter]
        first = cut.base + piece.start
        return range(first // cut.size, (first + piece.numel - 1) // cut.size + 1)

    def fragment(self, matrix: int, rank: int) -> Fragment | None:
        """The part of the matrix that ``rank`` holds; None if it holds nothing."""
        piece = self.matrices[matrix]
        cut = self.cuts[piece.parameter]
        begin = cut.base + piece.start
        low = max(begin, rank * cut.size)
        numel = min(begin + piece.numel, (rank + 1) * cut.size) - low
        if numel <= 0:
            return None
        return Fragment(matrix, low - begin, numel, cut.offset + low - rank * cut.size)

    def fragments(self, rank: int) -> Iterator[Fragment]:
        """All fragments of one rank, with increasing offsets."""
        for matrix in range(len(self.matrices)):
            fragment = self.fragment(matrix, rank)
            if fragment is not None:
                yield fragment

    def describe(self, matrix: int) -> str:
        """One line about a matrix, for error messages."""
        piece = self.matrices[matrix]
        return f"{self.names[piece.parameter]}[{piece.start}:{piece.start + piece.numel}] {piece.rows}x{piece.cols}"


@dataclass(frozen=True, slots=True)
class ExchangePlan:
    """Which rank orthogonalizes each matrix, and in which buckets matrices travel.

    ``exchanges`` are runs of matrices that lie on several ranks: one pair of collectives each, the same on every rank.
    A matrix that lies whole on one rank is owned by it and never travels. ``fingerprint`` identifies layout and plan.
    """

    layout: PartitionLayout
    owners: tuple[int, ...]
    exchanges: tuple[tuple[int, ...], ...]
    bucket_numel: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Section:
    """Where one fragment lies in a send or receive buffer: its elements, its output rows' statistics, and its flag.

    Attributes:
        start, numel: the elements [start, start + numel) of its matrix, at ``position`` of the buffer.
        first_row, rows: the output rows that begin in the fragment, at ``row_position``, ``row_words`` elements each.
        flag: position of the flag.
    """

    matrix: int
    start: int
    numel: int
    position: int
    first_row: int
    rows: int
    row_position: int
    flag: int


@dataclass(frozen=True, slots=True)
class RankBucket:
    """What one rank does in one bucket.

    The send buffer is a block per destination rank: the fragments that it owns, in matrix order, then their row
    statistics, then their flags. The receive buffer is a block per source rank, built alike.

    Attributes:
        fragments: this rank's fragments, with increasing slice offsets.
        sent: where each of them lies in the send buffer.
        owned: matrices that this rank orthogonalizes, in order.
        received: where their fragments lie in the receive buffer.
        sends: elements per destination rank; empty when nothing travels (then send and receive buffer are the same).
        receives: elements per source rank; empty likewise.
        row_words: elements of the wire dtype per row statistic; 0 when the rule has none.
    """

    fragments: tuple[Fragment, ...]
    sent: tuple[Section, ...]
    owned: tuple[int, ...]
    received: tuple[Section, ...]
    sends: tuple[int, ...]
    receives: tuple[int, ...]
    row_words: int

    @property
    def travels(self) -> bool:
        return bool(self.sends)

    @property
    def send_numel(self) -> int:
        return self._numel(self.sent)

    @property
    def receive_numel(self) -> int:
        return self._numel(self.received)

    def _numel(self, sections: Sequence[Section]) -> int:
        return sum(section.numel + section.rows * self.row_words + 1 for section in sections)


def make_plan(layout: PartitionLayout, cost: Callable[[Matrix], int], bucket_numel: int) -> ExchangePlan:
    """Choose owners and buckets.

    Args:
        layout: of one group.
        cost: of orthogonalizing one matrix (FLOPs; any unit).
        bucket_numel: elements of one bucket per rank; an exchange holds at most world_size times as many, or one matrix.

    Owners of an exchange's matrices are chosen longest-processing-time first among the ranks that hold a piece, so that
    each exchange is balanced; ties go to the rank with the lower load so far.
    """
    holders = [layout.holders(matrix) for matrix in range(len(layout.matrices))]
    costs = [cost(matrix) for matrix in layout.matrices]
    owners = [ranks.start for ranks in holders]
    load = [0] * layout.world_size
    shared = []
    for matrix, ranks in enumerate(holders):
        if len(ranks) == 1:
            load[ranks.start] += costs[matrix]
        else:
            shared.append(matrix)
    exchanges = list(_runs_of(shared, layout.matrices, layout.world_size * bucket_numel))
    # A rank walks its local matrices between the exchanges, so each exchange sees its part of that work.
    local_share = [total // max(len(exchanges), 1) for total in load]
    for exchange in exchanges:
        _choose_owners(exchange, holders, costs, owners, load, local_share)
    return ExchangePlan(
        layout, tuple(owners), tuple(exchanges), bucket_numel, _fingerprint(layout, owners, exchanges, bucket_numel)
    )


def _runs_of(indices: Sequence[int], matrices: Sequence[Matrix], limit: int) -> Iterator[tuple[int, ...]]:
    """Cut ``indices`` into runs of at most ``limit`` elements (a larger matrix is a run of its own)."""
    run: list[int] = []
    numel = 0
    for index in indices:
        if run and numel + matrices[index].numel > limit:
            yield tuple(run)
            run, numel = [], 0
        run.append(index)
        numel += matrices[index].numel
    if run:
        yield tuple(run)


def _choose_owners(
    exchange: Sequence[int],
    holders: Sequence[range],
    costs: Sequence[int],
    owners: list[int],
    load: list[int],
    local_share: Sequence[int],
) -> None:
    """Longest processing time first; writes ``owners`` and adds to ``load``."""
    everyone = range(len(load))
    here = list(local_share)
    heap = [(here[rank], load[rank], rank) for rank in everyone]
    heapq.heapify(heap)
    for matrix in sorted(exchange, key=lambda index: (-costs[index], index)):
        if holders[matrix] == everyone:
            while (here[heap[0][2]], load[heap[0][2]]) != heap[0][:2]:  # outdated by a choice made below
                heapq.heapreplace(heap, (here[heap[0][2]], load[heap[0][2]], heap[0][2]))
            owner = heap[0][2]
        else:
            owner = min(holders[matrix], key=lambda rank: (here[rank], load[rank], rank))
        owners[matrix] = owner
        here[owner] += costs[matrix]
        load[owner] += costs[matrix]


def _fingerprint(
    layout: PartitionLayout, owners: Sequence[int], exchanges: Sequence[tuple[int, ...]], bucket_numel: int
) -> str:
    text = repr((layout, tuple(owners), tuple(exchanges), bucket_numel))
    return hashlib.sha256(text.encode()).hexdigest()


def exchange_buckets(plan: ExchangePlan, rank: int, row_words: int = 0) -> list[RankBucket]:
    """This rank's part in every exchange, in the order of the collectives."""
    return [_exchange_bucket(plan, exchange, rank, row_words) for exchange in plan.exchanges]


def local_buckets(plan: ExchangePlan, rank: int, row_words: int = 0) -> list[RankBucket]:
    """The matrices that lie whole on this rank, in runs of at most ``bucket_numel`` elements."""
    layout = plan.layout
    local = [m for m in range(len(layout.matrices)) if layout.holders(m) == range(rank, rank + 1)]
    return [_local_bucket(layout, run, rank, row_words) for run in _runs_of(local, layout.matrices, plan.bucket_numel)]


def _exchange_bucket(plan: ExchangePlan, exchange: Sequence[int], rank: int, row_words: int) -> RankBucket:
    layout, owners = plan.layout, plan.owners
    held = [fragment for matrix in exchange if (fragment := layout.fragment(matrix, rank)) is not None]
    owned = tuple(matrix for matrix in exchange if owners[matrix] == rank)
    arriving = [
        (source, fragment)
        for matrix in owned
        for source in layout.holders(matrix)
        if (fragment := layout.fragment(matrix, source)) is not None
    ]
    sends, sent = _blocks(layout, [(owners[fragment.matrix], fragment) for fragment in held], row_words)
    receives, received = _blocks(layout, arriving, row_words)
    return RankBucket(tuple(held), sent, owned, received, sends, receives, row_words)


def _local_bucket(layout: PartitionLayout, run: Sequence[int], rank: int, row_words: int) -> RankBucket:
    held = [fragment for matrix in run if (fragment := layout.fragment(matrix, rank)) is not None]
    _, sections = _blocks(layout, [(rank, fragment) for fragment in held], row_words)
    return RankBucket(tuple(held), sections, tuple(run), sections, (), (), row_words)


def _blocks(
    layout: PartitionLayout, items: Sequence[tuple[int, Fragment]], row_words: int
) -> tuple[tuple[int, ...], tuple[Section, ...]]:
    """Lay (peer, fragment) items out in one block per peer. Returns the blocks' sizes and each item's section."""
    rows = [layout.matrices[f.matrix].outputs_in(f.start, f.numel) if row_words else (0, 0) for _, f in items]
    data, statistics, flags = ([0] * layout.world_size for _ in range(3))
    for (peer, fragment), (_, count) in zip(items, rows, strict=True):
        data[peer] += fragment.numel
        statistics[peer] += count * row_words
        flags[peer] += 1
    sizes = tuple(map(sum, zip(data, statistics, flags, strict=True)))
    starts = list(accumulate(sizes, initial=0))[:-1]
    next_data = list(starts)
    next_row = [start + d for start, d in zip(starts, data, strict=True)]
    next_flag = [start + s for start, s in zip(next_row, statistics, strict=True)]
    sections = []
    for (peer, f), (first, count) in zip(items, rows, strict=True):
        sections.append(Section(f.matrix, f.start, f.numel, next_data[peer], first, count, next_row[peer], next_flag[peer]))
        next_data[peer] += f.numel
        next_row[peer] += count * row_words
        next_flag[peer] += 1
    return sizes, tuple(sections)
