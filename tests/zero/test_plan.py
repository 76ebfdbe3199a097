"""The plan, on random layouts: nothing is lost, nothing is done twice, and all ranks mean the same.

A `World` builds every rank's slice element by element, as ZeRO does, so it knows nothing of `Cut`'s arithmetic.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ds_optforge.zero.buckets import NO_STATISTICS, BufferPlace, Kept, RankBucket, exchange_buckets, local_buckets
from ds_optforge.zero.partition import Cut, Matrix, PartitionLayout, Per
from ds_optforge.zero.plan import ExchangePlan, critical_path, make_plan

Element = tuple[int, int]  # (parameter, position within it)
FLAG = "flag"


def holds_for(*arguments: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same random layouts in every run; planning may be slow on a busy machine."""
    return lambda test: settings(max_examples=60, deadline=None, derandomize=True)(given(*arguments)(test))


@dataclass(frozen=True)
class World:
    """A layout, and what every rank's slice holds: an element, or None for padding."""

    layout: PartitionLayout
    slices: tuple[tuple[Element | None, ...], ...]


@dataclass(frozen=True)
class Parameter:
    numel: int
    matrices: tuple[tuple[int, int, int, bool], ...]  # (start, rows, cols, transposed)


@st.composite
def parameters(draw: st.DrawFn) -> tuple[Parameter, ...]:
    """One to six parameters; of one matrix, a bank of several, or several with other elements around them."""
    made = []
    for _ in range(draw(st.integers(1, 6))):
        rows, cols = draw(st.integers(1, 8)), draw(st.integers(1, 8))
        count, gap = draw(st.integers(1, 4)), draw(st.sampled_from([0, 0, 0, 3]))
        starts = [gap + index * (rows * cols + gap) for index in range(count)]
        numel, transposed = count * (rows * cols + gap) + gap, draw(st.booleans())
        made.append(Parameter(numel, tuple((start, rows, cols, transposed) for start in starts)))
    return tuple(made)


def layout_of(world_size: int, made: tuple[Parameter, ...], cuts: list[Cut]) -> PartitionLayout:
    matrices = [Matrix(index, *place) for index, parameter in enumerate(made) for place in parameter.matrices]
    return PartitionLayout(world_size, tuple(f"p{i}" for i in range(len(made))), tuple(cuts), tuple(matrices))


@st.composite
def flat_partitions(draw: st.DrawFn) -> World:
    """ZeRO-1 and 2: parameters in one buffer, aligned and padded, cut into equal slices; the last ones may be empty."""
    made, world_size = draw(parameters()), draw(st.integers(1, 64))
    alignment = draw(st.sampled_from([1, 2, 4, 16]))
    buffer: list[Element | None] = [None] * draw(st.integers(0, 5))  # a group may start anywhere in the buffer
    cuts = []
    for index, parameter in enumerate(made):
        buffer += [None] * (-len(buffer) % alignment)
        cuts.append(len(buffer))
        buffer += [(index, element) for element in range(parameter.numel)]
    size = -(-len(buffer) // world_size) + draw(st.sampled_from([0, 0, 1, 7]))
    buffer += [None] * (size * world_size - len(buffer))
    slices = tuple(tuple(buffer[rank * size : (rank + 1) * size]) for rank in range(world_size))
    return World(layout_of(world_size, made, [Cut(base, size, 0) for base in cuts]), slices)


@st.composite
def parameter_partitions(draw: st.DrawFn) -> World:
    """ZeRO-3: every parameter cut into equal partitions, the last ones padded; a slice is a rank's partitions in a row."""
    made, world_size = draw(parameters()), draw(st.integers(1, 64))
    slices: list[list[Element | None]] = [[] for _ in range(world_size)]
    cuts = []
    for index, parameter in enumerate(made):
        size = -(-parameter.numel // world_size)
        cuts.append(Cut(0, size, len(slices[0])))
        padded: list[Element | None] = [(index, element) for element in range(parameter.numel)]
        padded += [None] * (size * world_size - parameter.numel)
        for rank in range(world_size):
            slices[rank] += padded[rank * size : (rank + 1) * size]
    return World(layout_of(world_size, made, cuts), tuple(map(tuple, slices)))


@st.composite
def replicated(draw: st.DrawFn) -> World:
    """Stage 0 and plain PyTorch: one rank that holds everything."""
    made = draw(parameters())
    whole: list[Element | None] = []
    cuts = []
    for index, parameter in enumerate(made):
        cuts.append(Cut(0, parameter.numel, len(whole)))
        whole += [(index, element) for element in range(parameter.numel)]
    return World(layout_of(1, made, cuts), (tuple(whole),))


worlds = st.one_of(flat_partitions(), parameter_partitions(), replicated())
bucket_sizes = st.sampled_from([1, 7, 50, 10_000])
# Elements of the wire per value: 1 for float32 on float32, 2 on bfloat16.
kept_statistics = st.sampled_from([NO_STATISTICS, Kept(("row",), 1), Kept(("row",), 2), Kept(("row", "matrix"), 2)])


def cubic(matrix: Matrix) -> int:
    return min(matrix.rows, matrix.cols) ** 2 * max(matrix.rows, matrix.cols)


def plan_of(world: World, bucket_numel: int) -> ExchangePlan:
    return make_plan(world.layout, cubic, bucket_numel)


def exchanges(plan: ExchangePlan, kept: Kept = NO_STATISTICS) -> list[list[RankBucket]]:
    """Per exchange, the buckets of all ranks."""
    ranks = range(plan.layout.world_size)
    return [list(buckets) for buckets in zip(*(exchange_buckets(plan, rank, kept) for rank in ranks), strict=True)]


def beginning_in(matrix: Matrix, start: int, numel: int, per: Per = "row") -> list[int]:
    """The output rows of a matrix, or the matrix itself, whose first element is one of [start, start + numel)."""
    first_elements = range(matrix.cols) if matrix.transposed else range(0, matrix.numel, matrix.cols)
    first_elements = range(1) if per == "matrix" else first_elements
    return [row for row, element in enumerate(first_elements) if start <= element < start + numel]


class TestLayout:
    @holds_for(worlds)
    def test_every_element_of_every_matrix_is_held_once_where_the_fragment_says(self, world: World) -> None:
        seen: list[list[int]] = [[] for _ in world.layout.matrices]
        for rank, piece in enumerate(world.slices):
            for fragment in world.layout.fragments(rank):
                matrix = world.layout.matrices[fragment.matrix]
                elements = range(fragment.within.start, fragment.within.end)
                held = piece[fragment.slice_start : fragment.slice_start + fragment.numel]
                assert held == tuple((matrix.parameter, matrix.start + element) for element in elements)
                seen[fragment.matrix] += elements
        assert [sorted(elements) for elements in seen] == [list(range(m.numel)) for m in world.layout.matrices]

    @holds_for(worlds)
    def test_fragments_of_a_rank_ascend_in_its_slice_and_do_not_overlap(self, world: World) -> None:
        for rank, piece in enumerate(world.slices):
            end = 0
            for fragment in world.layout.fragments(rank):
                assert fragment.slice_start >= end
                end = fragment.slice_start + fragment.numel
            assert end <= len(piece)

    @holds_for(worlds)
    def test_holders_are_exactly_the_ranks_with_a_fragment(self, world: World) -> None:
        for index in range(len(world.layout.matrices)):
            ranks = range(world.layout.world_size)
            holding = [rank for rank in ranks if world.layout.fragment(index, rank) is not None]
            assert list(world.layout.holders(index)) == holding

    @holds_for(worlds)
    def test_every_output_row_begins_in_one_fragment(self, world: World) -> None:
        seen: list[list[int]] = [[] for _ in world.layout.matrices]
        for rank in range(world.layout.world_size):
            for fragment in world.layout.fragments(rank):
                matrix = world.layout.matrices[fragment.matrix]
                found = matrix.outputs_in(fragment.within)
                rows = beginning_in(matrix, fragment.within.start, fragment.numel)
                assert rows == list(range(found.start, found.end))
                seen[fragment.matrix] += rows
        assert seen == [list(range(matrix.outputs)) for matrix in world.layout.matrices]

    def test_a_matrix_is_described_by_name_place_and_shape(self) -> None:
        layout = PartitionLayout(2, ("experts",), (Cut(0, 20, 0),), (Matrix(0, 0, 4, 5), Matrix(0, 20, 4, 5)))
        assert layout.describe(1) == "experts[20:40] 4x5"


def spread(world_size: int, sides: Sequence[int]) -> PartitionLayout:
    """Square matrices, each spread evenly over all ranks, as ZeRO-3 does."""
    cuts, offset = [], 0
    for side in sides:
        cuts.append(Cut(0, side * side // world_size, offset))
        offset += side * side // world_size
    matrices = tuple(Matrix(index, 0, side, side) for index, side in enumerate(sides))
    return PartitionLayout(world_size, tuple(map(str, sides)), tuple(cuts), matrices)


def in_a_row(shapes: Sequence[tuple[int, int]], size: int) -> PartitionLayout:
    """Matrices side by side in one buffer that is cut into slices of ``size`` elements, as ZeRO-1/2 do."""
    starts = [sum(rows * cols for rows, cols in shapes[:index]) for index in range(len(shapes) + 1)]
    matrices = tuple(Matrix(index, 0, *shape) for index, shape in enumerate(shapes))
    cuts = tuple(Cut(start, size, 0) for start in starts[:-1])
    return PartitionLayout(-(-starts[-1] // size), tuple(map(str, shapes)), cuts, matrices)


def loads(plan: ExchangePlan, cost: Callable[[Matrix], int] = cubic) -> list[int]:
    """What each rank orthogonalizes."""
    owned = [0] * plan.layout.world_size
    for matrix, owner in zip(plan.layout.matrices, plan.owners, strict=True):
        owned[owner] += cost(matrix)
    return owned


def smallest_largest_load(layout: PartitionLayout) -> int:
    """Of all assignments of matrices to ranks that hold a piece, the one whose busiest rank has the least, by trying all."""
    holders = [layout.holders(matrix) for matrix in range(len(layout.matrices))]
    return min(max(loads(ExchangePlan(layout, owners, (), 1, ""))) for owners in product(*holders))


class TestOwners:
    @holds_for(worlds, bucket_sizes)
    def test_an_owner_holds_a_piece(self, world: World, bucket_numel: int) -> None:
        plan = plan_of(world, bucket_numel)
        for index, owner in enumerate(plan.owners):
            assert owner in world.layout.holders(index)

    @holds_for(worlds, bucket_sizes)
    def test_each_matrix_is_orthogonalized_once_by_its_owner(self, world: World, bucket_numel: int) -> None:
        plan = plan_of(world, bucket_numel)
        done = [
            (matrix, rank)
            for rank in range(world.layout.world_size)
            for bucket in exchange_buckets(plan, rank) + local_buckets(plan, rank, plan.local_numel())
            for matrix in bucket.owned
        ]
        assert sorted(done) == list(enumerate(plan.owners))

    @holds_for(worlds, bucket_sizes)
    def test_only_matrices_on_several_ranks_travel(self, world: World, bucket_numel: int) -> None:
        plan = plan_of(world, bucket_numel)
        shared = [m for m in range(len(world.layout.matrices)) if len(world.layout.holders(m)) > 1]
        assert sorted(matrix for exchange in plan.exchanges for matrix in exchange) == shared
        for rank in range(world.layout.world_size):
            for bucket in local_buckets(plan, rank, plan.local_numel()):
                assert not bucket.travels
                assert all(world.layout.holders(m) == range(rank, rank + 1) for m in bucket.owned)

    def test_equal_matrices_are_dealt_out_evenly(self) -> None:
        plan = make_plan(spread(4, [8] * 12), cubic, 10_000)
        assert sorted(plan.owners) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]

    def test_each_exchange_is_balanced_by_itself(self) -> None:
        """Ranks wait for each other at its end. An exchange is 4/5 of four buckets: four matrices of 64 elements."""
        plan = make_plan(spread(4, [8] * 16), cubic, 80)
        assert len(plan.exchanges) == 4
        assert [sorted(plan.owners[m] for m in exchange) for exchange in plan.exchanges] == [[0, 1, 2, 3]] * 4

    @pytest.mark.parametrize("large", [0, 4, 8])
    def test_a_large_matrix_counts_for_eight_small_ones_wherever_it_stands(self, large: int) -> None:
        sides = [8] * 8
        sides.insert(large, 16)
        plan = make_plan(spread(2, sides), cubic, 10_000)
        assert plan.owners.count(plan.owners[large]) == 1

    @holds_for(st.lists(st.sampled_from([4, 8, 12, 16]), min_size=1, max_size=40), st.sampled_from([2, 4]))
    def test_no_rank_has_more_than_its_share_and_one_matrix(self, sides: list[int], world_size: int) -> None:
        """What longest-processing-time-first guarantees."""
        layout = spread(world_size, sides)
        costs = [cubic(matrix) for matrix in layout.matrices]
        assert max(loads(make_plan(layout, cubic, 10_000))) <= sum(costs) / world_size + max(costs)

    @holds_for(
        st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12),
        st.integers(5, 90),
        st.sampled_from([1, 20, 10_000]),
    )
    def test_no_choice_among_straddling_matrices_is_better(
        self, shapes: list[tuple[int, int]], size: int, bucket_numel: int
    ) -> None:
        """ZeRO-1/2, also where the buckets are small. At most one matrix crosses a boundary."""
        layout = in_a_row(shapes, size)
        assume(prod(len(layout.holders(m)) for m in range(len(shapes))) <= 5000)
        assert max(loads(make_plan(layout, cubic, bucket_numel))) == smallest_largest_load(layout)

    def test_a_bank_beside_others_is_no_row_of_straddling_matrices(self) -> None:
        """ZeRO-3: the first parameter is three matrices on three ranks, the second one matrix on all of them."""
        matrices = (Matrix(0, 0, 4, 4), Matrix(0, 16, 4, 4), Matrix(0, 32, 4, 4), Matrix(1, 0, 6, 6))
        layout = PartitionLayout(3, ("bank", "other"), (Cut(0, 16, 0), Cut(0, 12, 16)), matrices)
        plan = make_plan(layout, lambda matrix: 5 if matrix == matrices[1] else 1, 100)
        assert plan.owners == (0, 1, 2, 0)


def path_by_hand(plan: ExchangePlan) -> int:
    """Step by step as ranks run: bucket k begins nowhere before every rank has finished bucket k - 2."""
    matrices = plan.layout.matrices
    ends = [[0] * plan.layout.world_size] * 2
    for exchange in plan.exchanges:
        work = [
            sum(cubic(matrices[matrix]) for matrix in exchange if plan.owners[matrix] == rank)
            for rank in range(plan.layout.world_size)
        ]
        ends.append([max(mine, max(ends[-2])) + new if new else mine for mine, new in zip(ends[-1], work, strict=True)])
    return max(ends[-1])


class TestCriticalPath:
    def test_a_rank_may_be_one_bucket_behind_and_no_more(self) -> None:
        """Two ranks; rank 0 has all the work of bucket 0, rank 1 that of buckets 1 and 2."""
        layout = spread(2, [8, 8, 8])
        plan = ExchangePlan(layout, (0, 1, 1), ((0,), (1,), (2,)), 32, "")
        assert critical_path(plan, cubic) == 2 * 512
        plan = ExchangePlan(layout, (0, 1, 0), ((0,), (1,), (2,)), 32, "")
        assert critical_path(plan, cubic) == 2 * 512
        plan = ExchangePlan(spread(2, [8, 8, 8, 8]), (0, 0, 1, 1), ((0,), (1,), (2,), (3,)), 32, "")
        assert critical_path(plan, cubic) == 3 * 512  # bucket 2 waits for bucket 0

    def test_local_matrices_fill_the_gaps(self) -> None:
        """Ten slices of 64 elements with one matrix each: nobody waits for anybody."""
        layout = in_a_row([(8, 8)] * 10, 64)
        assert critical_path(make_plan(layout, cubic, 1), cubic) == 512

    @holds_for(
        st.lists(st.sampled_from([4, 8, 12, 16]), min_size=1, max_size=40),
        st.sampled_from([2, 4]),
        st.sampled_from([20, 100, 400]),
    )
    def test_it_is_what_a_walk_through_the_buckets_gives(self, sides: list[int], world_size: int, bucket_numel: int) -> None:
        plan = make_plan(spread(world_size, sides), cubic, bucket_numel)
        found = critical_path(plan, cubic)
        assert found == path_by_hand(plan)
        assert max(loads(plan)) <= found <= sum(loads(plan))

    @pytest.mark.parametrize("layers", [16, 32])
    def test_equal_matrices_change_owners_so_that_buckets_are_balanced_too(self, layers: int) -> None:
        """A large and four small ones a layer: loads are even over the run, and nobody waits for long on the way."""
        plan = make_plan(spread(8, [32, 16, 16, 16, 16] * layers), cubic, 2400)
        mean = sum(loads(plan)) / 8
        assert max(loads(plan)) == mean
        assert len(plan.exchanges) >= 3
        assert critical_path(plan, cubic) <= 1.15 * mean


class TestBuckets:
    @holds_for(worlds, bucket_sizes)
    def test_an_exchange_is_bounded_in_all_or_for_each_owner_unless_it_is_one_matrix(
        self, world: World, bucket_numel: int
    ) -> None:
        plan = plan_of(world, bucket_numel)
        for exchange in plan.exchanges:
            owned: dict[int, list[int]] = {}
            for matrix in exchange:
                owned.setdefault(plan.owners[matrix], []).append(world.layout.matrices[matrix].numel)
            in_all = sum(map(sum, owned.values())) <= world.layout.world_size * bucket_numel
            assert in_all or all(sum(sizes) <= bucket_numel or len(sizes) == 1 for sizes in owned.values())

    @holds_for(worlds, bucket_sizes)
    def test_matrices_of_an_exchange_ascend_so_that_fragments_do(self, world: World, bucket_numel: int) -> None:
        for exchange in plan_of(world, bucket_numel).exchanges:
            assert list(exchange) == sorted(exchange)

    def test_exchanges_are_as_equal_as_can_be(self) -> None:
        """Ten matrices of 64 elements in exchanges of at most 4: not 4, 4 and 2."""
        plan = make_plan(spread(4, [8] * 10), cubic, 80)
        assert [len(exchange) for exchange in plan.exchanges] == [3, 4, 3]

    @pytest.mark.parametrize(
        ("sides", "world_size", "bucket_numel", "expected"),
        [
            ([1024, 1024, 1024, 1024, 2048, 2048] * 8, 4, 2**26, 3),  # 32 and 16: by shape, the larger half in two
            ([1024] * 512, 8, 2**26, 3),  # of one shape: halved until there are three
            ([1024] * 512, 8, 2**20, 86),  # six each: as on a CPU
            ([1024] * 20, 8, 2**26, 1),  # fewer than three a rank
            ([64] * 512, 8, 2**26, 1),  # little to send
        ],
    )
    def test_accelerators_have_three_exchanges_where_one_hides_behind_another(
        self, sides: list[int], world_size: int, bucket_numel: int, expected: int
    ) -> None:
        layout = spread(world_size, sides)
        plan, on_cpu = (make_plan(layout, cubic, bucket_numel, device) for device in ("cuda", "cpu"))
        assert len(plan.exchanges) == expected
        assert sorted(index for exchange in plan.exchanges for index in exchange) == list(range(len(sides)))
        assert all(list(exchange) == sorted(exchange) for exchange in plan.exchanges)
        numel = [sum(layout.matrices[index].numel for index in exchange) for exchange in plan.exchanges]
        assert max(numel) <= world_size * bucket_numel
        assert max(loads(plan)) == max(loads(on_cpu))

    @holds_for(worlds, bucket_sizes)
    def test_a_local_bucket_is_bounded_unless_it_is_one_matrix(self, world: World, bucket_numel: int) -> None:
        plan = plan_of(world, bucket_numel)
        for rank in range(world.layout.world_size):
            for bucket in local_buckets(plan, rank, plan.local_numel()):
                numel = sum(fragment.numel for fragment in bucket.fragments)
                assert numel <= bucket_numel or len(bucket.owned) == 1

    @holds_for(worlds, bucket_sizes)
    def test_what_one_rank_sends_another_receives(self, world: World, bucket_numel: int) -> None:
        ranks = range(world.layout.world_size)
        for buckets in exchanges(plan_of(world, bucket_numel)):
            sent = [[buckets[sender].sends[receiver] for receiver in ranks] for sender in ranks]
            received = [[buckets[receiver].receives[sender] for receiver in ranks] for sender in ranks]
            assert sent == received

    @holds_for(worlds, bucket_sizes, kept_statistics)
    def test_the_buffers_are_as_long_as_their_blocks(self, world: World, bucket_numel: int, kept: Kept) -> None:
        for buckets in exchanges(plan_of(world, bucket_numel), kept):
            for bucket in buckets:
                assert (bucket.send_numel, bucket.receive_numel) == (sum(bucket.sends), sum(bucket.receives))


def all_to_all(buffers: list[list[object]], splits: list[tuple[int, ...]]) -> list[list[object]]:
    """What torch's all_to_all_single does: block s of rank r's buffer becomes block r of rank s's."""
    blocks = []
    for buffer, sizes in zip(buffers, splits, strict=True):
        assert len(buffer) == sum(sizes)
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        blocks.append([buffer[end - size : end] for end, size in zip(ends, sizes, strict=True)])
    return [[item for row in blocks for item in row[rank]] for rank in range(len(buffers))]


def pack(bucket: RankBucket, piece: tuple[Element | None, ...], rank: int, layout: PartitionLayout) -> list[object]:
    """A rank's send buffer: elements, row statistics and a flag that tells whose it is, each at its position."""
    buffer: list[object] = [None] * bucket.send_numel

    def put(position: int, values: Sequence[object]) -> None:
        assert buffer[position : position + len(values)] == [None] * len(values)  # nothing is written twice
        buffer[position : position + len(values)] = values

    for fragment, place in zip(bucket.fragments, bucket.sent, strict=True):
        assert (place.matrix, place.within) == (fragment.matrix, fragment.within)
        put(place.position, piece[fragment.slice_start : fragment.slice_start + fragment.numel])
        for index, values in enumerate(place.statistics):
            put(values.position, statistics(bucket, place, index, layout))
        put(place.flag, [(FLAG, fragment.matrix, rank)])
    # No gaps, but in what travels before the next fragment, which begins aligned.
    assert buffer.count(None) <= (7 * len(bucket.sent) if bucket.travels else 0)
    return buffer


def statistics(bucket: RankBucket, place: BufferPlace, index: int, layout: PartitionLayout) -> list[object]:
    """The values of one statistic whose first element lies in the place's fragment."""
    values = place.statistics[index]
    found = beginning_in(layout.matrices[place.matrix], place.within.start, place.within.numel, bucket.kept.per[index])
    assert found == list(range(values.within.start, values.within.end))
    return [(index, place.matrix, value, word) for value in found for word in range(bucket.kept.words)]


def statistic_positions(bucket: RankBucket, place: BufferPlace, index: int) -> range:
    values = place.statistics[index]
    return range(values.position, values.position + values.within.numel * bucket.kept.words)


def unpack(bucket: RankBucket, buffer: list[object], layout: PartitionLayout) -> None:
    """Check that the owned matrices are whole, elements and statistics in their places, with a flag from every holder."""
    elements: dict[int, list[object]] = {m: [None] * layout.matrices[m].numel for m in bucket.owned}
    kinds = range(len(bucket.kept.per))
    values: dict[tuple[int, int], list[object]] = {(m, kind): [] for m in bucket.owned for kind in kinds}
    flags: dict[int, list[object]] = {m: [] for m in bucket.owned}
    for place in bucket.received:
        arrived = buffer[place.position : place.position + place.within.numel]
        elements[place.matrix][place.within.start : place.within.end] = arrived
        for kind in kinds:
            values[place.matrix, kind] += [buffer[at] for at in statistic_positions(bucket, place, kind)]
        flags[place.matrix].append(buffer[place.flag])
    for index in bucket.owned:
        matrix = layout.matrices[index]
        words = range(bucket.kept.words)
        assert elements[index] == [(matrix.parameter, matrix.start + e) for e in range(matrix.numel)]
        for kind, per in enumerate(bucket.kept.per):
            count = matrix.outputs if per == "row" else 1
            assert values[index, kind] == [(kind, index, value, word) for value in range(count) for word in words]
        assert flags[index] == [(FLAG, index, holder) for holder in layout.holders(index)]


def update(bucket: RankBucket, buffer: list[object]) -> list[object]:
    """What an owner gives back: everything that it received, marked, in its place."""
    marked: list[object] = [None] * len(buffer)
    for place in bucket.received:
        elements = range(place.position, place.position + place.within.numel)
        values = [at for kind in range(len(bucket.kept.per)) for at in statistic_positions(bucket, place, kind)]
        for position in (*elements, *values, place.flag):
            marked[position] = ("updated", buffer[position])
    return marked


class TestExchange:
    """The way out and back, simulated for all ranks with lists."""

    @holds_for(worlds, bucket_sizes, kept_statistics)
    def test_travelling_matrices_arrive_whole_and_their_updates_return(
        self, world: World, bucket_numel: int, kept: Kept
    ) -> None:
        for buckets in exchanges(plan_of(world, bucket_numel), kept):
            sent = [pack(bucket, world.slices[rank], rank, world.layout) for rank, bucket in enumerate(buckets)]
            received = all_to_all(sent, [bucket.sends for bucket in buckets])
            for bucket, buffer in zip(buckets, received, strict=True):
                unpack(bucket, buffer, world.layout)
            updates = [update(bucket, buffer) for bucket, buffer in zip(buckets, received, strict=True)]
            returned = all_to_all(updates, [bucket.receives for bucket in buckets])
            assert returned == [[item and ("updated", item) for item in buffer] for buffer in sent]

    @holds_for(worlds, bucket_sizes, kept_statistics)
    def test_local_matrices_are_whole_in_the_send_buffer_itself(self, world: World, bucket_numel: int, kept: Kept) -> None:
        plan = plan_of(world, bucket_numel)
        for rank, piece in enumerate(world.slices):
            for bucket in local_buckets(plan, rank, plan.local_numel(), kept):
                buffer = pack(bucket, piece, rank, world.layout)
                unpack(bucket, buffer, world.layout)
                assert update(bucket, buffer) == [("updated", item) for item in buffer]

    @holds_for(worlds, bucket_sizes)
    def test_every_fragment_is_in_one_bucket_of_its_rank(self, world: World, bucket_numel: int) -> None:
        plan = plan_of(world, bucket_numel)
        for rank in range(world.layout.world_size):
            buckets = exchange_buckets(plan, rank) + local_buckets(plan, rank, plan.local_numel())
            fragments = [fragment for bucket in buckets for fragment in bucket.fragments]
            assert sorted(fragments, key=lambda f: f.matrix) == list(world.layout.fragments(rank))

    @pytest.mark.parametrize("world_size", [2, 4, 8])
    def test_what_travels_on_zero_3_is_counted_exactly(self, world_size: int) -> None:
        """All ranks together, out and back: 2 (w - 1) / w elements a parameter, and 8 for each fragment that leaves.

        One is its flag; the next fragment begins at a multiple of 8.
        """
        shapes = [(16, 8), (8, 24), (40, 16)]
        cuts, offset = [], 0
        for rows, cols in shapes:
            cuts.append(Cut(0, rows * cols // world_size, offset))
            offset += rows * cols // world_size
        matrices = tuple(Matrix(index, 0, *shape) for index, shape in enumerate(shapes))
        plan = make_plan(PartitionLayout(world_size, ("a", "b", "c"), tuple(cuts), matrices), cubic, 100)
        travelled = 0
        for buckets in exchanges(plan):
            for rank, bucket in enumerate(buckets):
                travelled += sum(n for other, n in enumerate(bucket.sends) if other != rank)  # collect
                travelled += sum(n for other, n in enumerate(bucket.receives) if other != rank)  # give_back
        elements = sum(matrix.numel for matrix in matrices)
        leaving = len(matrices) * (world_size - 1)
        assert travelled == 2 * (world_size - 1) * elements // world_size + 2 * 8 * leaving

    def test_a_straddling_matrix_of_zero_2_sends_only_what_the_owner_lacks(self) -> None:
        """Two 4x5 matrices on two slices of 20, the first starting at 10: 10 elements and a flag, made 16, there and back."""
        layout = PartitionLayout(2, ("a",), (Cut(10, 20, 0),), (Matrix(0, 0, 4, 5),))
        plan = make_plan(layout, cubic, 100)
        first, second = (exchange_buckets(plan, rank)[0] for rank in (0, 1))
        assert plan.owners == (0,)
        assert (first.sends, second.sends) == ((16, 0), (16, 0))

    @holds_for(worlds, bucket_sizes, kept_statistics)
    def test_every_fragment_that_travels_begins_at_a_multiple_of_8(self, world: World, bucket_numel: int, kept: Kept) -> None:
        """Kernels that copy many tensors at a time copy four elements at once where all of them begin so."""
        for buckets in exchanges(plan_of(world, bucket_numel), kept):
            for bucket in buckets:
                assert all(place.position % 8 == 0 for place in (*bucket.sent, *bucket.received))


class TestFingerprint:
    @holds_for(worlds, bucket_sizes)
    def test_the_same_layout_gives_the_same_plan(self, world: World, bucket_numel: int) -> None:
        assert plan_of(world, bucket_numel) == plan_of(world, bucket_numel)

    @holds_for(worlds)
    def test_a_matrix_of_another_shape_changes_it(self, world: World) -> None:
        first = world.layout.matrices[0]
        assume(first.rows != first.cols)
        turned = (replace(first, rows=first.cols, cols=first.rows), *world.layout.matrices[1:])
        other = replace(world, layout=replace(world.layout, matrices=turned))
        assert plan_of(other, 50).fingerprint != plan_of(world, 50).fingerprint

    def base(self) -> PartitionLayout:
        """Two 4x3 matrices, each cut in half."""
        matrices = (Matrix(0, 0, 4, 3), Matrix(1, 0, 4, 3))
        return PartitionLayout(2, ("a", "b"), (Cut(0, 6, 0), Cut(0, 6, 6)), matrices)

    @pytest.mark.parametrize(
        "change",
        [
            {"world_size": 3},
            {"names": ("a", "c")},
            {"cuts": (Cut(0, 6, 0), Cut(0, 6, 8))},
            {"matrices": (Matrix(0, 0, 4, 3), Matrix(1, 0, 3, 4))},
            {"matrices": (Matrix(0, 0, 4, 3), Matrix(1, 0, 4, 3, transposed=True))},
        ],
        ids=["world size", "name", "cut", "shape", "transposed"],
    )
    def test_whatever_ranks_could_disagree_about_changes_it(self, change: dict[str, object]) -> None:
        plan, other = make_plan(self.base(), cubic, 50), make_plan(replace(self.base(), **change), cubic, 50)  # type: ignore[arg-type]
        assert plan.fingerprint != other.fingerprint

    def test_the_size_of_buckets_changes_it(self) -> None:
        assert make_plan(self.base(), cubic, 50).fingerprint != make_plan(self.base(), cubic, 51).fingerprint

    def test_the_owners_change_it(self) -> None:
        """With equal costs each rank owns one matrix, with no cost the first rank owns both."""
        even, free = make_plan(self.base(), cubic, 50), make_plan(self.base(), lambda matrix: 0, 50)
        assert even.owners != free.owners
        assert even.fingerprint != free.fingerprint


class TestScale:
    """10,000 matrices over 4,096 ranks: what the largest runs need, in seconds on one core."""

    RANKS, MATRICES, SHAPE = 4096, 10_000, (4096, 11_008)

    def layout(self, stage: int) -> PartitionLayout:
        numel = self.SHAPE[0] * self.SHAPE[1]
        if stage == 3:
            cuts = [Cut(0, numel // self.RANKS, index * numel // self.RANKS) for index in range(self.MATRICES)]
        else:
            size = -(-self.MATRICES * numel // self.RANKS)
            cuts = [Cut(index * numel, size, 0) for index in range(self.MATRICES)]
        names = tuple(f"layers.{index}.weight" for index in range(self.MATRICES))
        matrices = tuple(Matrix(index, 0, *self.SHAPE) for index in range(self.MATRICES))
        return PartitionLayout(self.RANKS, names, tuple(cuts), matrices)

    @pytest.mark.parametrize("stage", [2, 3])
    def test_the_largest_runs_can_be_planned(self, stage: int) -> None:
        plan = make_plan(self.layout(stage), cubic, 2**26)
        owned = [plan.owners.count(rank) for rank in (0, self.RANKS - 1)]
        for rank, expected in zip((0, self.RANKS - 1), owned, strict=True):
            buckets = exchange_buckets(plan, rank) + local_buckets(plan, rank, plan.local_numel())
            assert sum(len(bucket.owned) for bucket in buckets) == expected
        assert 1 <= max(owned) <= 4  # 2.4 on average
