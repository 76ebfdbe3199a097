"""Chooses the matrices that several ranks orthogonalize together. Pure Python on integers: no tensors, no groups.

With fewer matrices than ranks, or a few left over, a plan with one owner a matrix leaves ranks idle. A *team* cuts a matrix
into blocks of stored rows: each member owns one block, computes the same rows of every product, and fetches the other
members' rows in between. That costs time of the links, so it is planned only where the critical path becomes shorter all the
same.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TypeAlias

from ds_optforge.zero.partition import Matrix
from ds_optforge.zero.plan import Clocks, ExchangePlan, Team, bounded, critical_path, fingerprint

# What a team's cost is counted in: FLOPs of a member, gathers, and bytes of the tensors that these fill.
TeamCost: TypeAlias = Callable[[int, int, Sequence[int]], tuple[int, int, int]]

# FLOPs in the time in which a byte travels. On accelerators those of an H100 (half of 989 TFLOP/s) with 400 Gbit/s, of which
# programs reach 70%: over NVLink a team would pay sooner. On a CPU those of one core and gloo.
_FLOPS_OF_A_BYTE = {"cpu": 64}
_FLOPS_OF_A_BYTE_ELSEWHERE = 2**14

# Each message of a gather takes at least as long as this many bytes.
_BYTES_OF_A_MESSAGE = 2**16

# A member computes at least this many rows: fewer make products no faster.
_LEAST_ROWS = 64

# Blocks begin at multiples of as many elements of the parameter, as blocks of 8-bit state do (`ds_optforge.state.BLOCK`).
_ALIGNMENT = 256

# Teams are formed where they make the critical path shorter by this share at least.
_GAIN = 0.1

# The search for the longest time that a matrix may take goes down by this factor.
_FINER = 0.9


@dataclass(frozen=True, slots=True)
class _Choice:
    """A number of ranks for matrices of one shape: rows of each, FLOPs and time of the busiest, and what is gathered."""

    rows: tuple[int, ...]
    flops: int
    time: int
    gathered_bytes: int


def with_teams(
    plan: ExchangePlan, cost: Callable[[Matrix], int], team_cost: TeamCost, wire_bytes: int, device: str = "cpu"
) -> ExchangePlan:
    """Return the plan with teams where they make the critical path shorter by a tenth or more; else the plan itself.

    The time that members take to gather rows counts as part of that path. The busiest rank gets no more FLOPs than before.

    Members hold fragments of their matrix, as owners do. Matrices that join several, and those that tensor parallelism has
    cut, keep one owner each.

    Args:
        plan: with one owner a matrix.
        cost: FLOPs of orthogonalizing one matrix.
        team_cost: of (rows, cols, rows of each member): FLOPs of the busiest member, number of gathers, bytes of the
            tensors that they fill.
        wire_bytes: of an element of the exchange.
        device: type of the device of the weights.
    """
    layout = plan.layout
    if not plan.exchanges or layout.tensor_ranks > 1:
        return plan
    cost = _by_shape(cost)
    before = critical_path(plan, cost)
    costs = [cost(matrix) for matrix in layout.matrices]
    local = _local_costs(plan, costs)
    ideal = max(-(-sum(costs) // layout.world_size), max(local))
    if ideal > (1 - _GAIN) * before:
        return plan
    choices, busiest = _Choices(team_cost, wire_bytes, device), max(_loads(plan, costs))
    best, limit, found = before, float(before), None
    while limit > ideal:
        limit *= _FINER
        for evenly in (False, True):
            enough = int((1 - _GAIN / 2) * best)
            tried = _Schedule(plan, costs, local, choices, int(limit), evenly, enough)
            if tried.end <= enough and max(tried.load) <= busiest:
                best, found = tried.end, tried
    if found is None or not found.teams or best > (1 - _GAIN) * before:
        return plan
    exchanges = tuple(bounded(plan.exchanges, found.owners, layout.matrices, plan.bucket_numel))
    owners, teams = tuple(found.owners), tuple(found.teams)
    return replace(
        plan,
        owners=owners,
        exchanges=exchanges,
        teams=teams,
        fingerprint=fingerprint(layout, owners, exchanges, plan.bucket_numel, teams),
    )


def _by_shape(cost: Callable[[Matrix], int]) -> Callable[[Matrix], int]:
    """Return the cost of a matrix, computed once per shape."""
    known: dict[tuple[object, ...], int] = {}

    def of(matrix: Matrix) -> int:
        key = matrix.rows, matrix.cols, matrix.transposed, matrix.joins
        if key not in known:
            known[key] = cost(matrix)
        return known[key]

    return of


def _loads(plan: ExchangePlan, costs: Sequence[int]) -> list[int]:
    """Return the cost of each rank's matrices."""
    loads = [0] * plan.layout.world_size
    for owner, cost in zip(plan.owners, costs, strict=True):
        loads[owner] += cost
    return loads


def _local_costs(plan: ExchangePlan, costs: Sequence[int]) -> list[int]:
    """Return the cost of the matrices that do not travel, by rank."""
    travelling = {matrix for exchange in plan.exchanges for matrix in exchange}
    local = [0] * plan.layout.world_size
    for matrix, owner in enumerate(plan.owners):
        if matrix not in travelling:
            local[owner] += costs[matrix]
    return local


class _Choices:
    """The teams that each shape could have, by number of ranks."""

    def __init__(self, team_cost: TeamCost, wire_bytes: int, device: str) -> None:
        self._team_cost, self._wire_bytes = team_cost, wire_bytes
        self._rate = _FLOPS_OF_A_BYTE.get(device, _FLOPS_OF_A_BYTE_ELSEWHERE)
        self._found: dict[tuple[int, int, int], list[_Choice]] = {}

    def within(self, matrix: Matrix, holders: int, limit: int) -> _Choice | None:
        """Return the smallest team that takes at most ``limit``, or else the fastest; None if one rank is as fast."""
        alone, *others = self._of(matrix, holders)
        if alone.time <= limit or not others:
            return None
        fast = next((choice for choice in others if choice.time <= limit), None)
        fast = fast or min(others, key=lambda choice: choice.time)
        return fast if fast.time < alone.time else None

    def _of(self, matrix: Matrix, holders: int) -> list[_Choice]:
        if matrix.joins or matrix.start % _ALIGNMENT:
            most = 1
        else:
            units = -(-matrix.rows // _unit(matrix))
            most = max(1, min(holders, units, min(matrix.rows, matrix.cols) // _LEAST_ROWS))
        key = matrix.rows, matrix.cols, most
        if key not in self._found:
            self._found[key] = [self._choice(matrix, size) for size in range(1, most + 1)]
        return self._found[key]

    def _choice(self, matrix: Matrix, size: int) -> _Choice:
        blocks = _blocks(matrix, size)
        flops, gathers, nbytes = self._team_cost(matrix.rows, matrix.cols, blocks)
        if size == 1:
            return _Choice(blocks, flops, flops, 0)
        # The fragments that arrive with the exchange, and a flag of each member, are gathered first, in the wire's dtype.
        gathers, nbytes = gathers + 1, nbytes + (matrix.numel + size) * self._wire_bytes
        sent = nbytes * (size - 1) // size
        return _Choice(blocks, flops, flops + self._rate * (sent + gathers * (size - 1) * _BYTES_OF_A_MESSAGE), sent)


def _unit(matrix: Matrix) -> int:
    """Return the rows of which each block has a multiple, but for the last one."""
    return _ALIGNMENT // math.gcd(matrix.cols, _ALIGNMENT)


def _blocks(matrix: Matrix, size: int) -> tuple[int, ...]:
    """Cut the stored rows as evenly as the alignment allows."""
    unit = _unit(matrix)
    units = -(-matrix.rows // unit)
    ends = [min(unit * (units * member // size), matrix.rows) for member in range(size + 1)]
    return tuple(end - start for start, end in pairwise(ends))


class _Schedule:
    """Owners and teams, chosen in the order of the exchanges, the costliest matrix first, for the ranks that are free first.

    A matrix gets a team, as small a one as will do, if one rank would not be done with it in time.

    Args:
        plan: with the exchanges.
        costs: of the matrices.
        local: by rank, the cost of matrices that do not travel.
        choices: the possible teams.
        limit: the time at which all should be done.
        evenly: whether an exchange should be done by the share of it that is the share of the cost up to there; if not, a
            rank that is free may be at it until the limit.
        enough: the end from which on nothing more needs to be chosen.

    Attributes:
        owners: of all matrices; of a team, its first member.
        teams: in the order in which they were chosen.
        load: FLOPs of each rank.
        end: the time at which the last rank is done; beyond ``enough`` only that it is.
    """

    def __init__(
        self,
        plan: ExchangePlan,
        costs: Sequence[int],
        local: Sequence[int],
        choices: _Choices,
        limit: int,
        evenly: bool,
        enough: int,
    ) -> None:
        self.owners, self.teams, self.load = list(plan.owners), list[Team](), list(local)
        layout = plan.layout
        everyone = range(layout.world_size)
        clocks = Clocks(local, len(plan.exchanges))
        free = _Free(clocks.of_rank)
        done = list(accumulate(sum(costs[matrix] for matrix in exchange) for exchange in plan.exchanges))
        for exchange, cost_until in zip(plan.exchanges, done, strict=True):
            clocks.begin_exchange()
            deadline = limit * cost_until // done[-1] if evenly else limit
            for matrix in sorted(exchange, key=lambda index: (-costs[index], index)):
                if clocks.end > enough:
                    break
                holders = layout.holders(matrix)
                of_all = holders == everyone
                begin = free.earliest() if of_all else min(clocks.of_rank[rank] for rank in holders)
                choice = choices.within(layout.matrices[matrix], len(holders), deadline - max(begin, clocks.gate))
                size = len(choice.rows) if choice else 1
                ranks = free.first(size) if of_all else _first(holders, size, clocks.of_rank)
                clocks.add_together(ranks, choice.time if choice else costs[matrix])
                free.moved(ranks)
                for rank in ranks:
                    self.load[rank] += choice.flops if choice else costs[matrix]
                self.owners[matrix] = ranks[0]
                if choice:
                    self.teams.append(Team(matrix, tuple(ranks), choice.rows, choice.flops, choice.gathered_bytes))
        self.end = clocks.finish()


class _Free:
    """All ranks, the one that is free first in front."""

    def __init__(self, clock: Sequence[int]) -> None:
        self._clock = clock
        self._heap = [(time, rank) for rank, time in enumerate(clock)]
        heapq.heapify(self._heap)

    def earliest(self) -> int:
        """Return the time at which the first of them is free."""
        while self._heap[0][0] < self._clock[self._heap[0][1]]:  # moved by local matrices
            rank = self._heap[0][1]
            heapq.heapreplace(self._heap, (self._clock[rank], rank))
        return self._heap[0][0]

    def first(self, size: int) -> list[int]:
        """Return that many ranks, in increasing order; they are missing until `moved` tells of them."""
        found: set[int] = set()
        while len(found) < size:
            self.earliest()
            found.add(heapq.heappop(self._heap)[1])
        return sorted(found)

    def moved(self, ranks: Sequence[int]) -> None:
        """Enter ranks again whose clocks have been moved."""
        for rank in ranks:
            heapq.heappush(self._heap, (self._clock[rank], rank))


def _first(holders: range, size: int, clock: Sequence[int]) -> list[int]:
    return sorted(heapq.nsmallest(size, holders, key=lambda rank: (clock[rank], rank)))
