"""Predicts what a step costs every rank (FLOPs, bytes, memory) from the shapes of a model alone.

The parameters are routed as in training, laid out as DeepSpeed's ZeRO would lay them out, and planned by the code that plans
in training. It takes no process group and no tensors.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, partial
from itertools import chain

from torch import nn

from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.config.sections import ShardingSettings
from ds_optforge.forecast.exchange_sizes import cut_alike, exchange_sizes, fragments
from ds_optforge.forecast.topology import Topology, stepped_together
from ds_optforge.forecast.workspace import scratch_bytes, temporaries, workspaces
from ds_optforge.routing.roles import Route, routes_of
from ds_optforge.rules.around import NOTHING, Around
from ds_optforge.rules.base import MatrixRule, Rule, factors_of, statistics_of, works_in_teams
from ds_optforge.state import BLOCK
from ds_optforge.step.groups import built
from ds_optforge.zero.buckets import NO_STATISTICS, Kept
from ds_optforge.zero.group_plan import matrices_of
from ds_optforge.zero.partition import Matrix, PartitionLayout, chosen_shape, cuts_of_group, cuts_of_parameters
from ds_optforge.zero.plan import ExchangePlan, Team, critical_path, make_plan
from ds_optforge.zero.teams import with_teams

_BYTES = {"bfloat16": 2.0, "float32": 4.0, "8bit": 1 + 4 / BLOCK}  # 8bit: a float32 absmax per block

# Bytes of an element that a step reads and writes beside its state, counted by operator in the step of one process
# (tests/test_planning.py counts again): the gradient and twice the weight in a fused kernel; with a matrix rule also the two
# interpolations, the copies to and from the wire, the norms, both scalings and the decay; with statistics of rows a second
# pass over the updates; with a second moment of elements its square, average and root, and a division by it; with a sum its
# terms, and the updates once more.
_IN_PLACE_BYTES = 12
_PASSES_OUT_OF_PLACE = 2.5
_MATRIX_BYTES = 86
_STATISTIC_BYTES = 40
_SECOND_MOMENT_BYTES = 62
_SUM_BYTES = {"matrix": 34, "row": 66}  # of one sum: its terms, and for rows what is made of it for every element

Cost = Callable[[Matrix], int]
Rows = Callable[[int], int]  # how many of so many output rows are chosen


@dataclass(slots=True)
class RankFigures:
    """The cost of a step on one rank.

    Attributes:
        matrices: number of matrices that the rank orthogonalizes, alone or in a team.
        flops: FLOPs of orthogonalizing them.
        shard_flops: FLOPs of orthogonalizing its own fragments instead (shard_local).
        sent_bytes: bytes that it sends to other ranks: fragments, updates, and what it gathers; where rows are chosen, their
            mean if every row is chosen as often as another.
        gathered_bytes: those that it sends to the other members of its teams, while they wait.
        workspace_bytes: bytes of the exchanges in flight at a time, its largest local bucket and temporary tensors together.
        local_workspace_bytes: the same where fragments are stepped alone: its largest bucket of them, read and written.
        state_bytes: bytes of optimizer state, without the weights.
        elementwise_bytes: bytes that everything but the matrix products reads and writes.
        slice_numel: elements of its slices, padding included.
        largest_slice_numel: elements of the largest slice that one call of ``step()`` updates.
        model_numel: elements of the parameters that its slices are cut from.
    """

    matrices: int = 0
    flops: int = 0
    shard_flops: int = 0
    sent_bytes: int = 0
    gathered_bytes: int = 0
    workspace_bytes: int = 0
    local_workspace_bytes: int = 0
    state_bytes: int = 0
    elementwise_bytes: int = 0
    slice_numel: int = 0
    largest_slice_numel: int = 0
    model_numel: int = 0


@dataclass(frozen=True)
class Forecast:
    """The cost of a step on all ranks.

    Attributes:
        topology: the ranks that it was predicted for.
        ranks: the figures of each rank, in order.
        matrices: number of matrices that are orthogonalized.
        largest: FLOPs of the largest matrix, a lower bound of every step.
        critical_path: FLOPs until the last rank is done, waiting for others included.
        shard_rows: number of fragments of straddling matrices, by the rows that they touch.
        exchanges: number of exchanges, each a pair of collectives.
        sub_groups: calls of ``step()`` that orthogonalize: one per parameter group with matrices, more on ZeRO-3.
        groups: number of parameter groups with matrices.
        zero_numel: elements that a rank sends for ZeRO itself: gradients scattered, weights gathered (twice on stage 3).
        calls: of ``step()``, each with its layout and plan.
        gathers_only: whether a rule has sums or factors of whole matrices, which other sharding modes would not give it.
        teams: number of matrices that several ranks orthogonalize together, by the number of these ranks.
    """

    topology: Topology
    ranks: tuple[RankFigures, ...]
    matrices: int
    largest: int
    critical_path: int
    shard_rows: Counter[int]
    exchanges: int
    sub_groups: int
    groups: int
    zero_numel: int
    calls: tuple["PlannedCall", ...] = ()
    gathers_only: bool = False
    teams: Counter[int] = field(default_factory=Counter)

    @cached_property
    def mean_flops(self) -> float:
        """FLOPs of every rank if the work could be divided evenly."""
        return sum(rank.flops for rank in self.ranks) / len(self.ranks)

    @property
    def balance(self) -> float:
        """FLOPs of the busiest rank over the mean; 1 without matrices."""
        return max(rank.flops for rank in self.ranks) / self.mean_flops if self.matrices else 1.0

    @property
    def path_over_ideal(self) -> float:
        """The critical path over the mean; 1 without matrices."""
        return self.critical_path / self.mean_flops if self.matrices else 1.0


def forecast(model: nn.Module, config: OptimizerConfig, topology: Topology) -> Forecast:
    """Route, lay out and plan ``model`` (on the meta device) for ``topology``.

    Raises:
        ConfigError: the configuration does not fit the model, or expert_parallel does not divide the experts.
    """
    return forecast_routes(routes_of(model, config), config.common.sharding, topology, config.around)


def forecast_routes(
    routes: Sequence[Route], sharding: ShardingSettings, topology: Topology, around: Around = NOTHING
) -> Forecast:
    """Lay out and plan parameters that were routed already, as `forecast` does.

    Raises:
        ConfigError: expert_parallel does not divide the experts.
    """
    groups = [
        PlannedCall(stepped, sharding, topology, experts, around) for stepped, experts in stepped_together(routes, topology)
    ]
    ranks = tuple(RankFigures() for _ in range(topology.world_size))
    rows: Counter[int] = Counter()
    teams: Counter[int] = Counter()
    for group in groups:
        rows.update(group.enter(ranks))
        for team in group.plan.teams if group.plan else ():
            teams[len(team.ranks)] += group.siblings
    planned = [group for group in groups if group.plan]
    return Forecast(
        topology,
        ranks,
        matrices=sum(group.siblings * len(group.layout.matrices) for group in planned),
        largest=max((cost for group in planned for cost in group.costs), default=0),
        critical_path=sum(critical_path(group.plan, group.cost) for group in planned if group.plan),
        shard_rows=rows,
        exchanges=sum(len(group.plan.exchanges) for group in planned if group.plan),
        sub_groups=len(planned),
        groups=len({route.group for route in routes if route.matrices}),
        zero_numel=(3 if topology.stage == 3 else 2) * sum(group.own_numel for group in groups),
        calls=tuple(groups),
        gathers_only=any(_needs_whole(group.rule) for group in planned),
        teams=teams,
    )


def _needs_whole(rule: Rule) -> bool:
    """Whether a rule has sums or factors of whole matrices."""
    return isinstance(rule, MatrixRule) and bool(rule.sums or rule.factors)


def lay_out(routes: Sequence[Route], world_size: int, stage: int) -> tuple[PartitionLayout, int]:
    """Lay out the parameters of a group as ZeRO would; also return the elements of a rank's slice, padding included."""
    cut = cuts_of_parameters if stage == 3 else cuts_of_group
    cuts, slice_numel = cut([route.numel for route in routes], world_size)
    names = tuple(route.name for route in routes)
    matrices = chain.from_iterable(matrices_of(index, route, route.numel) for index, route in enumerate(routes))
    return PartitionLayout(world_size, names, tuple(cuts), tuple(matrices)), slice_numel


class PlannedCall:
    """One call of ``step()`` on all ranks.

    With expert parallelism there are ``siblings`` equal groups: rank r of this one stands for ranks r * siblings and following.

    Attributes:
        siblings: number of equal groups.
        device: type of the ranks' devices.
        settings, rule: of the parameters.
        layout: of the parameters.
        slice_numel: elements of a rank's slice, padding included.
        plan: owners and exchanges; None for an elementwise rule.
        kept: the rule's statistics.
        rows: how many of so many output rows are chosen; None for all of them.
        wire_bytes: of an element that travels.
    """

    def __init__(
        self, routes: Sequence[Route], sharding: ShardingSettings, topology: Topology, experts: bool, around: Around
    ) -> None:
        self.siblings = topology.expert_parallel if experts else 1
        self.device = topology.device
        self.settings = routes[0].settings
        self.rule = built(self.settings, sharding)
        self.buffers = (*self.rule.buffers, *around.buffers)
        self.layout, self.slice_numel = lay_out(routes, topology.world_size // self.siblings, topology.stage)
        self.own_numel = self.slice_numel * (self.layout.world_size - 1)
        self.state_dtype = self.settings.state_dtype
        self.wire_bytes = int(_BYTES[sharding.wire_dtype])
        self.plan: ExchangePlan | None = None
        self.cost: Cost = lambda matrix: 0
        self.kept = NO_STATISTICS
        self.rows: Rows | None = None
        if isinstance(self.rule, MatrixRule):
            self.rows = self.rule.choice.count if self.rule.choice else None
            self.cost = _remembered(partial(self.rule.cost_on, topology.device), self.rows)
            travelling = statistics_of(self.rule, "update")
            self.kept = Kept(tuple(statistic.per for statistic in travelling), 4 // self.wire_bytes)
            self.plan = make_plan(self.layout, self.cost, sharding.bucket_numel, topology.device)
            if works_in_teams(self.rule) and sharding.travels:
                team_cost = partial(self.rule.team_cost, topology.device)
                self.plan = with_teams(self.plan, self.cost, team_cost, self.wire_bytes, topology.device)
        self.costs = [self.cost(matrix) for matrix in self.layout.matrices]

    def enter(self, ranks: Sequence[RankFigures]) -> Counter[int]:
        """Add this group's cost to the figures; return the rows that fragments of straddling matrices touch."""
        figures, rows = self._figures()
        for index, rank in enumerate(ranks):
            own = figures[index // self.siblings]
            rank.matrices += own.matrices
            rank.flops += own.flops
            rank.shard_flops += own.shard_flops
            rank.sent_bytes += own.sent_bytes
            rank.gathered_bytes += own.gathered_bytes
            # Groups are stepped one after another.
            rank.workspace_bytes = max(rank.workspace_bytes, own.workspace_bytes)
            rank.local_workspace_bytes = max(rank.local_workspace_bytes, own.local_workspace_bytes)
            rank.state_bytes += own.state_bytes
            rank.elementwise_bytes += own.elementwise_bytes
            rank.slice_numel += self.slice_numel
            rank.largest_slice_numel = max(rank.largest_slice_numel, self.slice_numel)
            rank.model_numel += self.slice_numel * self.layout.world_size
        return rows

    def _figures(self) -> tuple[list[RankFigures], Counter[int]]:
        ranks = self.layout.world_size
        state = sum(4.0 if buffer.full_precision else _BYTES[self.state_dtype] for buffer in self.buffers)
        touched = int(self.slice_numel * self._bytes_of_an_element(state))
        figures = [RankFigures(state_bytes=int(self.slice_numel * state), elementwise_bytes=touched) for _ in range(ranks)]
        rows: Counter[int] = Counter()
        if self.plan:
            self._add_orthogonalization(self.plan, figures, rows)
            sizes = exchange_sizes(self.plan, self.kept)
            sent = exchange_sizes(self.plan, self.kept, self.rows) if self.rows else sizes
            for rank, own in enumerate(figures):
                travels = self.wire_bytes * sum(size.travels(rank) for size in sent) + self._sum_bytes(self.plan)
                own.sent_bytes = travels + own.gathered_bytes
            assert isinstance(self.rule, MatrixRule)
            held = workspaces(self.rule, self.plan, sizes, self.wire_bytes, self.device)
            for own, workspace in zip(figures, held, strict=True):
                own.workspace_bytes = workspace
        return figures, rows

    def _bytes_of_an_element(self, state: float) -> float:
        """Bytes that a step reads and writes for an element of the slice, with ``state`` bytes of it kept."""
        if isinstance(self.rule, MatrixRule):
            # A second moment of the update that a sum reads is computed for the sum, and again when it is kept.
            times = [2 if buffer.of_update and self.rule.sums else 1 for buffer in self.rule.buffers if not buffer.signed]
            second = _SECOND_MOMENT_BYTES * sum(times)
            rows = _STATISTIC_BYTES if self.kept.per else 0
            return _MATRIX_BYTES + 2 * state + rows + second + sum(_SUM_BYTES[item.per] for item in self.rule.sums)
        return (_IN_PLACE_BYTES + 2 * state) * (1 if self.rule.in_place else _PASSES_OUT_OF_PLACE)

    def _sum_bytes(self, plan: ExchangePlan) -> int:
        """Bytes that a rank sends for sums, and statistics beside them: float64, each value twice but for its own share."""
        sums = self.rule.sums if isinstance(self.rule, MatrixRule) else ()
        pers = [item.per for item in sums] + [found.per for found in statistics_of(self.rule, "direction", "apply")]
        matrices = [self.layout.matrices[index] for exchange in plan.exchanges for index in exchange]
        values = sum(matrix.values(per) for per in pers for matrix in matrices)
        return 2 * 8 * values * (self.layout.world_size - 1) // self.layout.world_size

    def _add_orthogonalization(self, plan: ExchangePlan, figures: list[RankFigures], rows: Counter[int]) -> None:
        teams = {team.matrix: team for team in plan.teams}
        for index, (matrix, cost, owner) in enumerate(zip(self.layout.matrices, self.costs, plan.owners, strict=True)):
            if index in teams:
                self._add_team(teams[index], cost, figures)
                continue
            figures[owner].matrices += 1
            figures[owner].flops += cost
            figures[owner].state_bytes += 4 * sum(math.prod(matrix.factor(factor.of)) for factor in factors_of(self.rule))
        for alike in cut_alike(self.layout, range(len(self.costs))):
            matrix = self.layout.matrices[alike[0]]
            for rank, within in fragments(self.layout, alike[0]):
                touched = matrix.rows_touched(within).numel
                bucket = max(within.numel, min(plan.local_numel(self.device), self.slice_numel))
                held = self._held_alone(replace(matrix, rows=touched, joins=None), len(alike), bucket)
                figures[rank].local_workspace_bytes = max(figures[rank].local_workspace_bytes, held)
                figures[rank].shard_flops += len(alike) * self.cost(replace(matrix, rows=touched, joins=None))
                if within.numel < matrix.numel:
                    rows[touched] += self.siblings * len(alike)
                kept = sum(matrix.values_in(found.per, within).numel for found in statistics_of(self.rule))
                figures[rank].state_bytes += 4 * len(alike) * kept

    def _add_team(self, team: Team, cost: int, figures: list[RankFigures]) -> None:
        gathered = team.gathered_bytes * len(team.ranks) // (len(team.ranks) - 1)
        for rank, rows in zip(team.ranks, team.rows, strict=True):
            share = Fraction(rows, sum(team.rows))
            figures[rank].matrices += 1
            figures[rank].flops += int(cost * share)
            figures[rank].gathered_bytes += int(gathered * share) * (len(team.ranks) - 1)

    def _held_alone(self, matrix: Matrix, count: int, bucket: int) -> int:
        """Bytes of a bucket of fragments that are stepped alone, of which ``count`` are alike: rows of a matrix each."""
        if self.device == "cpu":
            return 2 * self.wire_bytes * bucket
        assert isinstance(self.rule, MatrixRule)
        count = min(count, max(bucket // matrix.numel, 1))
        each = self.wire_bytes * matrix.numel + temporaries(self.rule, matrix, self.wire_bytes, self.device)
        return self.wire_bytes * bucket + max(count * each, scratch_bytes(bucket, self.device))


def _remembered(cost: Callable[[int, int], int], rows: Rows | None) -> Cost:
    """The cost of a matrix, or of the ``rows`` of it that are chosen, computed once per shape."""
    known: dict[tuple[int, int], int] = {}

    def of(matrix: Matrix) -> int:
        shape = chosen_shape(*matrix.part_shape, matrix.transposed, rows)
        if shape not in known:
            known[shape] = cost(*shape)
        return matrix.parts * known[shape]

    return of
