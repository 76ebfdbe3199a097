"""Chooses the owner of each matrix and the order in which matrices travel. Pure Python on integers: no tensors, no groups.

Everything here is a deterministic function of the `PartitionLayout`, so that every rank makes the same plan by itself.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from ds_optforge.zero.partition import Matrix, PartitionLayout, Range

# Three exchanges are under way at a time: one returns and one is collected, with a send and a receive buffer each, and one
# is orthogonalized in its receive buffer. These five buffers are to fit into the four of two buckets.
_BUFFERS, _BUFFERS_UNDER_WAY = 4, 5

# On a CPU, buckets that do not travel gain nothing from size: smaller ones stay in the processor's cache. On other devices
# each batch of matrices costs some forty kernels, whatever its size.
_LOCAL_DIVISOR = {"cpu": 16}

# An exchange hides behind the orthogonalization of another one, where there are as many as this. On a CPU, whose collectives
# take its own time, nothing hides, and an exchange of fewer elements per rank is not worth its kernels.
_LEAST_EXCHANGES, _LEAST_NUMEL = 3, 2**22


@dataclass(frozen=True, slots=True)
class Team:
    """Ranks that orthogonalize one straddling matrix together; each owns a block of its stored rows.

    Attributes:
        matrix: number of the matrix in the layout.
        ranks: the members, in increasing order.
        rows: stored rows of each of them, from the first row on.
        flops: FLOPs of the member with most rows.
        gathered_bytes: bytes that a member sends to the others beside the exchange.
    """

    matrix: int
    ranks: tuple[int, ...]
    rows: tuple[int, ...]
    flops: int
    gathered_bytes: int

    def block(self, rank: int, cols: int) -> Range:
        """Return the elements of the matrix, of ``cols`` columns, that ``rank``, a member, owns."""
        member = self.ranks.index(rank)
        return Range(sum(self.rows[:member]) * cols, self.rows[member] * cols)


@dataclass(frozen=True, slots=True)
class ExchangePlan:
    """Owners of matrices, and the exchanges in which matrices travel.

    A matrix that lies whole on one rank is owned by it and never travels.

    Attributes:
        layout: of the group.
        owners: rank that orthogonalizes each matrix; of a team, its first member.
        exchanges: tuples of straddling matrices: one pair of collectives each, the same on every rank.
        bucket_numel: elements of one bucket per rank.
        fingerprint: identifies layout and plan.
        teams: of the matrices that several ranks orthogonalize, in the order in which each member takes them in an exchange,
            before the matrices that it owns alone.
    """

    layout: PartitionLayout
    owners: tuple[int, ...]
    exchanges: tuple[tuple[int, ...], ...]
    bucket_numel: int
    fingerprint: str
    teams: tuple[Team, ...] = ()

    def teams_of(self, exchange: Sequence[int]) -> tuple[Team, ...]:
        """Return the teams of those of these matrices that have one, in order."""
        found = set(exchange) if self.teams else ()
        return tuple(team for team in self.teams if team.matrix in found)

    def local_numel(self, device: str = "cpu") -> int:
        """Return the elements of a bucket that does not travel on that type of ``device``; a larger matrix is one of its own.

        Batches of matrices are as large.
        """
        return max(self.bucket_numel // _LOCAL_DIVISOR.get(device, 1), 1)


def make_plan(layout: PartitionLayout, cost: Callable[[Matrix], int], bucket_numel: int, device: str = "cpu") -> ExchangePlan:
    """Choose owners and exchanges.

    An owner holds a fragment of its matrix. If no two matrices cross the same boundary between ranks (ZeRO-1/2), the largest
    load of a rank is the smallest possible, and ``bucket_numel`` bounds what each rank owns of an exchange. Otherwise
    matrices go longest-processing-time first (Graham 1969) to the holder with the lowest load, and then matrices of equal
    cost change owners so that ranks wait for each other as little as possible.

    Args:
        layout: of one group.
        cost: of orthogonalizing one matrix (FLOPs; any unit).
        bucket_numel: elements of one bucket per rank; an exchange holds at most world_size times 4/5 as many, or one matrix.
        device: type of the device of the weights. But on a CPU there are several exchanges where they hide behind each other.
    """
    holders = [layout.holders(matrix) for matrix in range(len(layout.matrices))]
    costs = [cost(matrix) for matrix in layout.matrices]
    owners = [ranks.start for ranks in holders]
    load = [0] * layout.world_size
    straddling = []
    for matrix, ranks in enumerate(holders):
        if len(ranks) == 1:
            load[ranks.start] += costs[matrix]
        else:
            straddling.append(matrix)
    if _at_most_one_a_boundary(straddling, holders, load):
        _own_straddling(straddling, holders, costs, owners, load)
        exchanges = _one_or_two_exchanges(straddling, owners, layout.matrices, bucket_numel)
    else:
        numel = max(layout.world_size * bucket_numel * _BUFFERS // _BUFFERS_UNDER_WAY, 1)
        exchanges = list(split_evenly(straddling, layout.matrices, numel))
        if device != "cpu" and len(exchanges) < _LEAST_EXCHANGES:
            exchanges = _several(exchanges, layout, numel)
        clocks = Clocks(load, len(exchanges))
        _own_longest_first(straddling, holders, costs, owners, load)
        _swap_equals(exchanges, holders, costs, owners, clocks)
        exchanges = list(bounded(exchanges, owners, layout.matrices, bucket_numel))
    return ExchangePlan(
        layout, tuple(owners), tuple(exchanges), bucket_numel, fingerprint(layout, owners, exchanges, bucket_numel)
    )


def split_evenly(indices: Sequence[int], matrices: Sequence[Matrix], limit: int) -> Iterator[tuple[int, ...]]:
    """Cut a sequence of matrices into as few and as equal tuples as possible.

    Args:
        indices: numbers of the matrices.
        matrices: all matrices of the layout.
        limit: most elements of a tuple; a larger matrix is a tuple of its own.
    """
    left = sum(matrices[index].numel for index in indices)
    taken: list[int] = []
    numel = 0
    for index in indices:
        size = matrices[index].numel
        count = -(-left // limit)  # of the tuples still to come
        # Cut if more than half of the matrix would lie beyond an equal share of what is left.
        if taken and (numel + size > limit or (2 * numel + size) * count > 2 * left):
            yield tuple(taken)
            left -= numel
            taken, numel = [], 0
        taken.append(index)
        numel += size
    if taken:
        yield tuple(taken)


def _several(few: Sequence[tuple[int, ...]], layout: PartitionLayout, limit: int) -> list[tuple[int, ...]]:
    """Cut few exchanges into three or more, by shape, so that one is orthogonalized while others travel.

    They stay as they are if an exchange had fewer matrices than there are ranks, or little to send.

    Args:
        few: the exchanges.
        layout: of the group.
        limit: most elements of an exchange, or one matrix.
    """

    def numel(indices: Sequence[int]) -> int:
        return sum(layout.matrices[index].numel for index in indices)

    straddling = list(chain.from_iterable(few))
    least = _LEAST_NUMEL * layout.world_size
    if numel(straddling) < _LEAST_EXCHANGES * least or len(straddling) < _LEAST_EXCHANGES * layout.world_size:
        return list(few)
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index in straddling:
        by_shape.setdefault((layout.matrices[index].rows, layout.matrices[index].cols), []).append(index)
    groups: list[list[int]] = []
    for alike in by_shape.values():
        if groups and numel(alike) < least:
            groups[-1] += alike
        else:
            groups.append(alike)
    while len(groups) < _LEAST_EXCHANGES or numel(max(groups, key=numel)) > limit:
        largest = max(groups, key=lambda group: (len(group) > 1, numel(group)))
        if len(largest) == 1:
            break
        place, half = groups.index(largest), len(largest) // 2
        groups[place : place + 1] = [largest[:half], largest[half:]]
    return [tuple(sorted(group)) for group in groups]


def _at_most_one_a_boundary(straddling: Sequence[int], holders: Sequence[range], load: Sequence[int]) -> bool:
    """Whether at most one matrix crosses each rank boundary, and a rank in the middle of a matrix holds nothing else."""
    return all(holders[left][-1] <= holders[right][0] for left, right in pairwise(straddling)) and not any(
        load[rank] for matrix in straddling for rank in holders[matrix][1:-1]
    )


def _own_straddling(
    straddling: Sequence[int], holders: Sequence[range], costs: Sequence[int], owners: list[int], load: list[int]
) -> None:
    """Minimize the largest load, given at most one straddling matrix per boundary; writes ``owners`` and adds to ``load``."""
    pairs = []
    for matrix in straddling:
        if len(holders[matrix]) > 2:  # a rank in the middle has nothing else to do
            owners[matrix] = holders[matrix][1]
            load[owners[matrix]] += costs[matrix]
        else:
            pairs.append(matrix)

    def lean_left(limit: int) -> list[int] | None:
        """Return owners with no load above ``limit``, or None: what still fits on the left leaves more room on the right."""
        given, chosen = load.copy(), []
        for matrix in pairs:
            left, right = holders[matrix]
            owner = left if given[left] + costs[matrix] <= limit else right
            given[owner] += costs[matrix]
            if given[owner] > limit:
                return None
            chosen.append(owner)
        return chosen

    low, high = max(load), max(load) + 2 * max((costs[matrix] for matrix in pairs), default=0)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if lean_left(middle) is not None else (middle + 1, high)
    for matrix, owner in zip(pairs, lean_left(low) or (), strict=True):
        owners[matrix] = owner
        load[owner] += costs[matrix]


def _one_or_two_exchanges(
    straddling: Sequence[int], owners: Sequence[int], matrices: Sequence[Matrix], limit: int
) -> list[tuple[int, ...]]:
    """Put all matrices into one exchange, but a rank's second one into another if both have more than ``limit`` elements.

    More exchanges would save no rank any workspace, and would make ranks wait that take part in few of them.
    """
    owned: Counter[int] = Counter()
    exchanges: tuple[list[int], list[int]] = ([], [])
    for matrix in straddling:
        numel = matrices[matrix].numel
        late = owned[owners[matrix]] > 0 and owned[owners[matrix]] + numel > limit
        owned[owners[matrix]] += numel
        exchanges[late].append(matrix)
    return [tuple(exchange) for exchange in exchanges if exchange]


def _own_longest_first(
    straddling: Sequence[int], holders: Sequence[range], costs: Sequence[int], owners: list[int], load: list[int]
) -> None:
    """Assign matrices, costliest first, to the holder with the lowest load; writes ``owners`` and adds to ``load``."""
    everyone = range(len(load))
    bits = len(everyone).bit_length()
    # Among ranks of equal load, distant ones come first: a rank with a large matrix then has idle neighbours that can take
    # smaller ones.
    order = [int(f"{rank:0{bits}b}"[::-1], 2) for rank in everyone]
    heap = [(load[rank], order[rank], rank) for rank in everyone]
    heapq.heapify(heap)
    for matrix in sorted(straddling, key=lambda index: (-costs[index], index)):
        if holders[matrix] == everyone:
            while load[heap[0][2]] != heap[0][0]:  # outdated by a choice made below
                heapq.heapreplace(heap, (load[heap[0][2]], *heap[0][1:]))
            owner = heap[0][2]
        else:
            owner = min(holders[matrix], key=lambda rank: (load[rank], rank))
        owners[matrix] = owner
        load[owner] += costs[matrix]


class Clocks:
    """Simulated times at which ranks finish their orthogonalizations, in units of cost, if nothing else took time.

    collect(k + 1) is issued before bucket k is computed and give_back(k) awaited after bucket k + 1, so that bucket k
    begins on no rank before all have computed bucket k - 2. A rank's local matrices are spread evenly between the exchanges.

    Args:
        local: cost of each rank's local matrices.
        exchanges: number of exchanges.

    Attributes:
        of_rank: time at which each rank finishes what has been added so far.
        end: the latest of them.
    """

    def __init__(self, local: Sequence[int], exchanges: int) -> None:
        self.of_rank = [0] * len(local)
        self.end = 0
        self._local = [(rank, cost) for rank, cost in enumerate(local) if cost]
        self._parts = exchanges + 1
        self._part = 0
        self._ends = [0, 0]

    def begin_exchange(self) -> None:
        """Begin the next exchange, after all matrices of the earlier ones have been added."""
        self._add_local()
        self._ends = [self._ends[1], self.end]

    @property
    def gate(self) -> int:
        """The time before which no rank begins with the current exchange."""
        return self._ends[0]

    def add(self, rank: int, cost: int) -> None:
        """Let ``rank`` compute a matrix of that ``cost`` in the current exchange."""
        self.of_rank[rank] = max(self.of_rank[rank], self._ends[0]) + cost
        self.end = max(self.end, self.of_rank[rank])

    def add_together(self, ranks: Sequence[int], cost: int) -> None:
        """Let ``ranks`` compute a matrix together, for the time ``cost``: none begins before all of them can."""
        begin = max(max(self.of_rank[rank] for rank in ranks), self._ends[0])
        for rank in ranks:
            self.of_rank[rank] = begin + cost
        self.end = max(self.end, begin + cost)

    def finish(self) -> int:
        """Add the remaining local matrices, and return the time at which the last rank finishes."""
        self._add_local()
        return self.end

    def _add_local(self) -> None:
        self._part += 1
        for rank, cost in self._local:
            self.add(rank, cost * self._part // self._parts - cost * (self._part - 1) // self._parts)


def _swap_equals(
    exchanges: Sequence[Sequence[int]], holders: Sequence[range], costs: Sequence[int], owners: list[int], clocks: Clocks
) -> None:
    """Reassign matrices of equal cost and equal holders to the rank that is free first; writes ``owners``.

    Each rank keeps its number of matrices of each kind, so that loads stay balanced as over all exchanges together, and
    each exchange becomes as balanced as that allows.
    """
    kinds: dict[int, tuple[int, range]] = {}
    room: dict[tuple[int, range], Counter[int]] = {}
    left = [0] * len(clocks.of_rank)
    for matrix in chain.from_iterable(exchanges):
        left[owners[matrix]] += costs[matrix]
        kinds[matrix] = costs[matrix], holders[matrix]
        room.setdefault(kinds[matrix], Counter())[owners[matrix]] += 1
    heaps = {kind: [(0, -left[rank], rank) for rank in ranks] for kind, ranks in room.items()}
    for heap in heaps.values():
        heapq.heapify(heap)
    for exchange in exchanges:
        clocks.begin_exchange()
        for matrix in sorted(exchange, key=lambda index: (-costs[index], index)):
            kind = kinds[matrix]
            owners[matrix] = _earliest(heaps[kind], room[kind], clocks.of_rank, left)
            clocks.add(owners[matrix], costs[matrix])
            left[owners[matrix]] -= costs[matrix]


def bounded(
    exchanges: Sequence[tuple[int, ...]], owners: Sequence[int], matrices: Sequence[Matrix], limit: int
) -> Iterator[tuple[int, ...]]:
    """Cut exchanges so that no rank owns more than ``limit`` elements of one, or twice the largest matrix if that is more.

    (A cut between two large matrices of one rank would make all others wait for the first one.)
    """
    limit = max(limit, 2 * max((matrices[index].numel for exchange in exchanges for index in exchange), default=0))
    for exchange in exchanges:
        owned: Counter[int] = Counter()
        first = 0
        for index, matrix in enumerate(exchange):
            numel = matrices[matrix].numel
            if owned[owners[matrix]] and owned[owners[matrix]] + numel > limit:
                yield exchange[first:index]
                first = index
                owned.clear()
            owned[owners[matrix]] += numel
        yield exchange[first:]


def _earliest(heap: list[tuple[int, int, int]], room: Counter[int], clock: Sequence[int], left: Sequence[int]) -> int:
    """Choose the rank with room that is free first, or of those the one with the most work left; takes one from its room."""
    while True:
        rank = heap[0][2]
        now = (clock[rank], -left[rank], rank)
        if room[rank] == 0:
            heapq.heappop(heap)
        elif heap[0] != now:  # outdated: clocks only advance and work only shrinks
            heapq.heapreplace(heap, now)
        else:
            room[rank] -= 1
            return rank


def critical_path(plan: ExchangePlan, cost: Callable[[Matrix], int]) -> int:
    """Return the time at which the last rank finishes, waiting for others included: see `Clocks`.

    It is never less than the largest load of a rank. Traffic, also that of teams, and everything elementwise take no time
    here. With teams, costs are FLOPs.

    Args:
        plan: of the group.
        cost: of orthogonalizing one matrix, in any unit; the result has the same unit.
    """
    layout = plan.layout
    travelling = set(chain.from_iterable(plan.exchanges))
    local = [0] * layout.world_size
    for index, matrix in enumerate(layout.matrices):
        if index not in travelling:
            local[plan.owners[index]] += cost(matrix)
    clocks = Clocks(local, len(plan.exchanges))
    for exchange in plan.exchanges:
        clocks.begin_exchange()
        teams = plan.teams_of(exchange)
        for team in teams:
            clocks.add_together(team.ranks, team.flops)
        for index in set(exchange).difference(team.matrix for team in teams) if teams else exchange:
            clocks.add(plan.owners[index], cost(layout.matrices[index]))
    return clocks.finish()


def fingerprint(
    layout: PartitionLayout,
    owners: Sequence[int],
    exchanges: Sequence[tuple[int, ...]],
    bucket_numel: int,
    teams: tuple[Team, ...] = (),
) -> str:
    """Return a text that identifies layout and plan: a hash."""
    text = repr((layout, tuple(owners), tuple(exchanges), bucket_numel, *teams))
    return hashlib.sha256(text.encode()).hexdigest()
