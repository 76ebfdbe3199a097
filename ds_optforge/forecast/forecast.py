"""Predicts what a step costs every rank (FLOPs, bytes, memory) from the shapes of a model alone.

The parameters are routed as in training, laid out as DeepSpeed's ZeRO would lay them out, and planned by the code that plans
in training. It takes no process group and no tensors.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

from torch import nn

from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.config.sections import ShardingSettings
from ds_optforge.errors import ConfigError
from ds_optforge.routing.roles import Route, routes_of
from ds_optforge.rules.base import MatrixRule
from ds_optforge.state import BLOCK
from ds_optforge.step.groups import built
from ds_optforge.zero.buckets import NO_STATISTICS, Kept
from ds_optforge.zero.group_plan import matrices_of
from ds_optforge.zero.partition import Matrix, PartitionLayout, Range, cuts_of_group, cuts_of_parameters
from ds_optforge.zero.plan import ExchangePlan, critical_path, make_plan

SUB_GROUP_SIZE = 1_000_000_000  # DeepSpeed's default of zero_optimization.sub_group_size
_BYTES = {"bfloat16": 2.0, "float32": 4.0, "8bit": 1 + 4 / BLOCK}  # 8bit: a float32 absmax per block

Cost = Callable[[Matrix], int]


@dataclass(frozen=True, slots=True)
class Topology:
    """The ranks of a run, and how ZeRO uses them.

    Attributes:
        world_size: number of ranks that ZeRO cuts the parameters over.
        stage: ZeRO stage: 1, 2 or 3.
        expert_parallel: number of ranks that each bank of experts is split over, before ZeRO cuts the shares over the others.
        sub_group_size: elements per rank that ZeRO-3 steps at a time.

    Raises:
        ConfigError: no run can have these numbers.
    """

    world_size: int
    stage: int
    expert_parallel: int = 1
    sub_group_size: int = SUB_GROUP_SIZE

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.world_size < 1:
            raise ConfigError(f"world size: got {self.world_size}; allowed: at least 1")
        if self.stage not in (1, 2, 3):
            raise ConfigError(f"stage: got {self.stage}; allowed: 1, 2, 3 (on stage 0 every rank computes every matrix)")
        if self.expert_parallel < 1 or self.world_size % self.expert_parallel:
            raise ConfigError(f"expert parallel: got {self.expert_parallel}; allowed: a divisor of {self.world_size} ranks")
        if self.expert_parallel > 1 and self.stage == 3:
            raise ConfigError(f"expert parallel: got {self.expert_parallel} on stage 3; allowed: 1 (DeepSpeed has no more)")


@dataclass(slots=True)
class RankFigures:
    """The cost of a step on one rank.

    Attributes:
        matrices: number of matrices that the rank orthogonalizes.
        flops: FLOPs of orthogonalizing them.
        shard_flops: FLOPs of orthogonalizing its own fragments instead (shard_local).
        sent_bytes: bytes that it sends to other ranks, fragments and updates.
        workspace_bytes: bytes of the exchanges in flight at a time, its largest local bucket and its largest matrix together.
        state_bytes: bytes of optimizer state, without the weights.
    """

    matrices: int = 0
    flops: int = 0
    shard_flops: int = 0
    sent_bytes: int = 0
    workspace_bytes: int = 0
    state_bytes: int = 0


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
        zero_bytes: bytes that a rank sends for ZeRO itself: gradients scattered, weights gathered (twice on stage 3), 2 bytes
            per element.
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
    zero_bytes: int
    gathers_only: bool = False

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
    return forecast_routes(routes_of(model, config), config.common.sharding, topology)


def forecast_routes(routes: Sequence[Route], sharding: ShardingSettings, topology: Topology) -> Forecast:
    """Lay out and plan parameters that were routed already, as `forecast` does.

    Raises:
        ConfigError: expert_parallel does not divide the experts.
    """
    groups = [_Group(stepped, sharding, topology, experts) for stepped, experts in _groups(routes, topology)]
    ranks = tuple(RankFigures() for _ in range(topology.world_size))
    rows: Counter[int] = Counter()
    for group in groups:
        rows.update(group.enter(ranks))
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
        zero_bytes=(6 if topology.stage == 3 else 4) * sum(group.own_numel for group in groups),
        gathers_only=any(isinstance(group.rule, MatrixRule) and bool(group.rule.sums) for group in planned),
    )


def _groups(routes: Sequence[Route], topology: Topology) -> Iterator[tuple[list[Route], bool]]:
    """Yield what each call of ``step()`` updates: (parameters of a group, or of a sub-group on ZeRO-3; True for experts)."""
    members: dict[tuple[str, bool], list[Route]] = {}
    for route in routes:
        experts = topology.expert_parallel > 1 and _is_bank(route)
        members.setdefault((route.group, experts), []).append(_share(route, topology.expert_parallel) if experts else route)
    for (_, experts), group in members.items():
        if topology.stage < 3:
            yield group, experts
            continue
        ends = accumulate(-(-route.numel // topology.world_size) for route in group)
        sub_group: list[Route] = []
        done = 0
        for route, end in zip(group, ends, strict=True):
            sub_group.append(route)
            if end - done >= topology.sub_group_size:
                yield sub_group, experts
                sub_group, done = [], end
        if sub_group:
            yield sub_group, experts


def _is_bank(route: Route) -> bool:
    return "experts" in route.name.split(".") and len(route.shape) == 3


def _share(route: Route, ranks: int) -> Route:
    """One rank's share of a bank of experts. Raises ConfigError where the number of experts is no multiple of ``ranks``."""
    if route.shape[0] % ranks:
        raise ConfigError(f"expert parallel: got {ranks}; allowed: a divisor of the {route.shape[0]} experts of {route.name}")
    shape = (route.shape[0] // ranks, *route.shape[1:])
    matrices = route.matrices[: len(route.matrices) // ranks]
    return replace(route, shape=shape, numel=route.numel // ranks, matrices=matrices)


def lay_out(routes: Sequence[Route], world_size: int, stage: int) -> tuple[PartitionLayout, int]:
    """Lay out the parameters of a group as ZeRO would; also return the elements of a rank's slice, padding included."""
    cut = cuts_of_parameters if stage == 3 else cuts_of_group
    cuts, slice_numel = cut([route.numel for route in routes], world_size)
    names = tuple(route.name for route in routes)
    matrices = chain.from_iterable(matrices_of(index, route, route.numel) for index, route in enumerate(routes))
    return PartitionLayout(world_size, names, tuple(cuts), tuple(matrices)), slice_numel


class _Group:
    """One call of ``step()`` on all ranks. ``plan`` is None for an elementwise rule.

    With expert parallelism there are ``siblings`` equal groups: rank r of this one stands for ranks r * siblings and following.
    """

    def __init__(self, routes: Sequence[Route], sharding: ShardingSettings, topology: Topology, experts: bool) -> None:
        self.siblings = topology.expert_parallel if experts else 1
        self.rule = built(routes[0].settings)
        self.layout, self.slice_numel = lay_out(routes, topology.world_size // self.siblings, topology.stage)
        self.own_numel = self.slice_numel * (self.layout.world_size - 1)
        self.state_dtype = routes[0].settings.state_dtype
        self.wire_bytes = int(_BYTES[sharding.wire_dtype])
        self.plan: ExchangePlan | None = None
        self.cost: Cost = lambda matrix: 0
        self.kept = NO_STATISTICS
        if isinstance(self.rule, MatrixRule):
            self.cost = _remembered(self.rule.cost)
            self.kept = Kept(tuple(statistic.per for statistic in self.rule.statistics), 4 // self.wire_bytes)
            self.plan = make_plan(self.layout, self.cost, sharding.bucket_numel)
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
            rank.workspace_bytes = max(rank.workspace_bytes, own.workspace_bytes)  # groups are stepped one after another
            rank.state_bytes += own.state_bytes
        return rows

    def _figures(self) -> tuple[list[RankFigures], Counter[int]]:
        elementwise = sum(4.0 if buffer.full_precision else _BYTES[self.state_dtype] for buffer in self.rule.buffers)
        figures = [RankFigures(state_bytes=int(self.slice_numel * elementwise)) for _ in range(self.layout.world_size)]
        rows: Counter[int] = Counter()
        if self.plan:
            self._add_orthogonalization(self.plan, figures, rows)
            sizes = exchange_sizes(self.plan, self.kept)
            for rank, own in enumerate(figures):
                own.sent_bytes = self.wire_bytes * sum(size.travels(rank) for size in sizes) + self._sum_bytes(self.plan)
            self._add_workspace(self.plan, figures, sizes)
        return figures, rows

    def _sum_bytes(self, plan: ExchangePlan) -> int:
        """Bytes that a rank sends to add up the rule's sums: all-reduces of float64, each value twice but for its own share."""
        sums = self.rule.sums if isinstance(self.rule, MatrixRule) else ()
        matrices = [self.layout.matrices[index] for exchange in plan.exchanges for index in exchange]
        values = sum(matrix.values(item.per) for item in sums for matrix in matrices)
        return 2 * 8 * values * (self.layout.world_size - 1) // self.layout.world_size

    def _add_orthogonalization(self, plan: ExchangePlan, figures: list[RankFigures], rows: Counter[int]) -> None:
        for cost, owner in zip(self.costs, plan.owners, strict=True):
            figures[owner].matrices += 1
            figures[owner].flops += cost
        for alike in _cut_alike(self.layout, range(len(self.costs))):
            matrix = self.layout.matrices[alike[0]]
            for rank, within in _fragments(self.layout, alike[0]):
                touched = matrix.rows_touched(within).numel
                figures[rank].shard_flops += len(alike) * self.cost(replace(matrix, rows=touched, joins=None))
                if within.numel < matrix.numel:
                    rows[touched] += self.siblings * len(alike)
                kept = sum(matrix.values_in(per, within).numel for per in self.kept.per)
                figures[rank].state_bytes += 4 * len(alike) * kept

    def _add_workspace(self, plan: ExchangePlan, figures: list[RankFigures], sizes: "Sequence[ExchangeSizes]") -> None:
        travelling = {matrix for exchange in plan.exchanges for matrix in exchange}
        local, largest_local, largest = ([0] * len(figures) for _ in range(3))
        for index, (matrix, owner) in enumerate(zip(self.layout.matrices, plan.owners, strict=True)):
            largest[owner] = max(largest[owner], matrix.numel)
            if index not in travelling:
                local[owner] += matrix.numel
                largest_local[owner] = max(largest_local[owner], matrix.numel)
        for rank, own in enumerate(figures):
            received = [size.receives[rank] for size in sizes]
            both = [0, *(size.sends[rank] + size.receives[rank] for size in sizes), 0]
            # One exchange returns, one is orthogonalized in its receive buffer, one is collected; done, the second returns too.
            under_way = (max(both[k] + now + both[k + 2], both[k + 1] + both[k + 2]) for k, now in enumerate(received))
            in_flight = max(under_way, default=0)
            bucket = max(min(local[rank], plan.local_numel()), largest_local[rank])
            own.workspace_bytes = self.wire_bytes * (in_flight + bucket + largest[rank])


def _remembered(cost: Callable[[int, int], int]) -> Cost:
    """The cost of a matrix, computed once per shape."""
    known: dict[tuple[int, int], int] = {}

    def of(matrix: Matrix) -> int:
        shape = matrix.part_shape
        if shape not in known:
            known[shape] = cost(*shape)
        return matrix.parts * known[shape]

    return of


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


def exchange_sizes(plan: ExchangePlan, kept: Kept = NO_STATISTICS) -> list[ExchangeSizes]:
    """Sizes of the buffers that `exchange_buckets` makes on every rank, in O(fragments) time."""
    sizes = []
    for exchange in plan.exchanges:
        size = ExchangeSizes(*([0] * plan.layout.world_size for _ in range(3)))
        for alike in _cut_alike(plan.layout, exchange):
            matrix, first = plan.layout.matrices[alike[0]], plan.layout.holders(alike[0]).start
            elements = [
                within.numel + 1 + kept.words * sum(matrix.values_in(per, within).numel for per in kept.per)
                for _, within in _fragments(plan.layout, alike[0])
            ]
            for rank, count in enumerate(elements, start=first):
                size.sends[rank] += len(alike) * count
            for owner in (plan.owners[index] for index in alike):
                size.receives[owner] += sum(elements)
                size.keeps[owner] += elements[owner - first]
        sizes.append(size)
    return sizes


def _cut_alike(layout: PartitionLayout, indices: Sequence[int]) -> Iterable[list[int]]:
    """Group matrices by shape and cuts: on ZeRO-3, the layers of a model are alike."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index in indices:
        matrix = layout.matrices[index]
        cut = layout.cuts[matrix.parameter]
        key = (cut.base + matrix.start, cut.size, matrix.rows, matrix.cols, matrix.transposed, matrix.joins)
        groups.setdefault(key, []).append(index)
    return groups.values()


def _fragments(layout: PartitionLayout, index: int) -> Iterator[tuple[int, Range]]:
    """Yield (rank, elements within the matrix) for each fragment of a matrix."""
    matrix = layout.matrices[index]
    cut = layout.cuts[matrix.parameter]
    begin = cut.base + matrix.start
    at = 0
    for rank in layout.holders(index):
        end = min((rank + 1) * cut.size - begin, matrix.numel)
        yield rank, Range(at, end - at)
        at = end


@dataclass(frozen=True, slots=True)
class Hardware:
    """The speed of a rank.

    Attributes:
        tflops: bfloat16 TFLOP/s that matrix products reach.
        link_gbps: Gbit/s of its link, in each direction.

    Raises:
        ConfigError: a speed is not positive.
    """

    tflops: float
    link_gbps: float

    def __post_init__(self) -> None:
        """Check the speeds."""
        for name, value in (("tflops", self.tflops), ("link gbps", self.link_gbps)):
            if not 0 < value < float("inf"):
                raise ConfigError(f"{name}: got {value:g}; allowed: a positive number")


@dataclass(frozen=True, slots=True)
class Mode:
    """A sharding mode and its predicted time.

    Attributes:
        name: title of the mode.
        settings: fields of the "sharding" section that choose it.
        orthogonalization, traffic: seconds per step, on average over steps.
    """

    name: str
    settings: Mapping[str, Any]
    orthogonalization: float
    traffic: float

    @property
    def seconds(self) -> float:
        """Seconds per step if traffic and computation overlap fully."""
        return max(self.orthogonalization, self.traffic)


PERIODS = (2, 5, 10)
AFFORDABLE = 0.1  # of the time of ZeRO's own traffic


def modes(predicted: Forecast, hardware: Hardware) -> list[Mode]:
    """Predict gather, shard_local with a gather every `PERIODS` steps, and shard_local alone, on the slowest rank.

    They are in order of exactness, the most exact first; gather alone for a rule with sums over whole matrices.
    """
    whole = predicted.critical_path / (hardware.tflops * 1e12)
    traffic = max(rank.sent_bytes for rank in predicted.ranks) * 8 / (hardware.link_gbps * 1e9)
    alone = max(rank.shard_flops for rank in predicted.ranks) / (hardware.tflops * 1e12)
    result = [Mode("gather", {"mode": "gather"}, whole, traffic)]
    if predicted.gathers_only:
        return result
    for period in PERIODS:
        average = (whole + (period - 1) * alone) / period
        settings = {"mode": "shard_local", "gather_every": period}
        result.append(Mode(f"gather every {period}", settings, average, traffic / period))
    return [*result, Mode("shard_local", {"mode": "shard_local"}, alone, 0.0)]


def zero_seconds(predicted: Forecast, hardware: Hardware) -> float:
    """Seconds that ZeRO's own traffic takes: no iteration is much shorter, whatever the batch and the optimizer."""
    return predicted.zero_bytes * 8 / (hardware.link_gbps * 1e9)


def best_mode(predicted: Forecast, hardware: Hardware) -> Mode:
    """Choose the most exact mode that takes at most a tenth of `zero_seconds`, else shard_local.

    Exactness comes first because only a training run can tell what less of it costs in loss.
    """
    candidates = modes(predicted, hardware)
    bound = AFFORDABLE * zero_seconds(predicted, hardware)
    return next((mode for mode in candidates if mode.seconds <= bound), candidates[-1])


def better_bucket(
    routes: Sequence[Route], sharding: ShardingSettings, topology: Topology, now: Forecast, largest: int = 2**31
) -> tuple[int, Forecast] | None:
    """Find a larger bucket_numel: the smallest power of two whose critical path is within 5% of the best that buckets reach.

    Returns:
        (bucket_numel, its forecast), or None where that would gain less than 5%.
    """
    numel = 1 << sharding.bucket_numel.bit_length()
    tried: list[tuple[int, Forecast]] = []
    while now.exchanges > 1 and numel <= largest and (not tried or tried[-1][1].exchanges > 1):
        tried.append((numel, forecast_routes(routes, sharding.model_copy(update={"bucket_numel": numel}), topology)))
        numel *= 2
    if not tried:
        return None
    reachable = min(found.critical_path for _, found in tried)
    if 20 * now.critical_path <= 21 * reachable:
        return None
    return next((numel, found) for numel, found in tried if 20 * found.critical_path <= 21 * reachable)
