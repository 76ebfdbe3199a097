"""Partition, plan and buckets of small layouts, counted by hand: every bound on both of its sides.

tests/zero/test_plan.py shows what holds for all layouts.
"""

from collections.abc import Sequence

import pytest

from ds_optforge.zero.buckets import NO_STATISTICS, Kept, travelling_numel
from ds_optforge.zero.partition import (
    Cut,
    Fragment,
    Joined,
    Matrix,
    PartitionLayout,
    Range,
    chosen_shape,
    cuts_of_group,
    cuts_of_parameters,
)
from ds_optforge.zero.plan import Clocks, ExchangePlan, Team, bounded, make_plan, split_evenly
from tests.zero.test_plan import cubic, in_a_row

SQUARE, FLAT = (1024, 1024), (512, 2048)  # 2**20 elements each


def vectors(*numels: int) -> list[Matrix]:
    return [Matrix(index, 0, 1, numel) for index, numel in enumerate(numels)]


def over_all(world_size: int, shapes: Sequence[tuple[int, int]]) -> PartitionLayout:
    """Matrices that are spread evenly over all ranks, as ZeRO-3 does."""
    cuts, _ = cuts_of_parameters([rows * cols for rows, cols in shapes], world_size)
    matrices = tuple(Matrix(index, 0, *shape) for index, shape in enumerate(shapes))
    return PartitionLayout(world_size, tuple(map(str, range(len(shapes)))), tuple(cuts), matrices)


class TestPartition:
    def test_zero_1_and_2_cut_a_group_into_slices_of_an_even_number(self) -> None:
        """11 elements on two ranks are 6 each, and 8 are 4; 9 are 6, because 5 is odd."""
        assert cuts_of_group([5, 6], 2) == ([Cut(0, 6, 0), Cut(5, 6, 0)], 6)
        assert cuts_of_group([4, 4], 2)[1] == 4
        assert cuts_of_group([9], 2)[1] == 6
        assert cuts_of_group([1], 1)[1] == 2

    def test_zero_3_cuts_each_parameter(self) -> None:
        assert cuts_of_parameters([5, 6, 1], 2) == ([Cut(0, 3, 0), Cut(0, 3, 3), Cut(0, 1, 6)], 7)

    def test_output_rows_of_a_matrix_begin_at_its_stored_rows_or_columns(self) -> None:
        stored, transposed = Matrix(0, 0, 4, 6), Matrix(0, 0, 4, 6, transposed=True)
        assert (stored.outputs, transposed.outputs) == (4, 6)
        assert stored.outputs_in(Range(0, 6)) == Range(0, 1)
        assert stored.outputs_in(Range(5, 2)) == Range(1, 1)
        assert stored.outputs_in(Range(7, 5)) == Range(2, 0)
        assert transposed.outputs_in(Range(2, 10)) == Range(2, 4)
        assert transposed.outputs_in(Range(7, 3)) == Range(6, 0)

    def test_a_shard_of_columns_has_every_row_in_it(self) -> None:
        """Two shards of three columns, one behind the other: rows begin in the first."""
        matrix = Matrix(0, 0, 4, 6, shards=2, dim=1)
        assert (matrix.folds, matrix.width, matrix.local_numel) == (2, 3, 12)
        assert matrix.outputs_in(Range(0, 12)) == Range(0, 4)
        assert matrix.outputs_in(Range(12, 12)) == Range(4, 0)
        assert matrix.rows_touched(Range(12, 12)) == Range(0, 4)
        assert matrix.rows_touched(Range(4, 4)) == Range(1, 2)
        assert matrix.rows_touched(Range(15, 3)) == Range(1, 1)

    def test_a_shard_of_rows_has_whole_ones(self) -> None:
        matrix = Matrix(0, 0, 4, 6, shards=2, dim=0)
        assert (matrix.folds, matrix.width, matrix.local_numel) == (1, 6, 12)
        assert matrix.rows_touched(Range(5, 2)) == Range(0, 2)

    def test_the_value_of_a_matrix_is_kept_where_its_first_element_is(self) -> None:
        matrix = Matrix(0, 0, 4, 6)
        assert (matrix.values("row"), matrix.values("matrix")) == (4, 1)
        assert matrix.values_in("matrix", Range(0, 5)) == Range(0, 1)
        assert matrix.values_in("matrix", Range(1, 5)) == Range(1, 0)
        assert matrix.values_in("matrix", Range(3, 5)) == Range(1, 0)
        assert matrix.values_in("matrix", Range(0, 0)) == Range(0, 0)

    def test_shapes_of_what_an_owner_keeps(self) -> None:
        """Two matrices of two rows in one of four, or of three output columns in one of six."""
        assert [Matrix(0, 0, 4, 6).factor(of) for of in ("rows", "cols", "matrix")] == [(1, 4, 4), (1, 6, 6), (1, 4, 6)]
        halves = Matrix(0, 0, 4, 6, joins=Joined(2, 1))
        assert (halves.parts, halves.part_shape, halves.factor("rows")) == (2, (2, 6), (2, 2, 2))
        columns = Matrix(0, 0, 4, 6, transposed=True, joins=Joined(2, 1))
        assert (columns.part_shape, columns.factor("cols")) == ((4, 3), (2, 3, 3))

    def test_shapes_of_chosen_output_rows(self) -> None:
        assert chosen_shape(4, 6, False, None) == (4, 6)
        assert chosen_shape(4, 6, False, lambda outputs: outputs // 2) == (2, 6)
        assert chosen_shape(4, 6, True, lambda outputs: outputs // 2) == (4, 3)

    def test_tensor_ranks_hold_a_shard_each_or_all_of_it(self) -> None:
        """Two data ranks with slices of 10 elements, times two tensor ranks: 0 and 1 have the first slice."""
        whole = PartitionLayout(4, ("a",), (Cut(0, 10, 0),), (Matrix(0, 0, 4, 5),), tensor_ranks=2)
        assert whole.holders(0) == range(4)
        assert whole.fragment(0, 1) == whole.fragment(0, 0) == Fragment(0, Range(0, 10), 0)
        assert whole.fragment(0, 3) == Fragment(0, Range(10, 10), 0)
        cut = PartitionLayout(4, ("a",), (Cut(0, 10, 0),), (Matrix(0, 0, 4, 5, shards=2),), tensor_ranks=2)
        assert cut.holders(0) == range(2)
        assert [cut.fragment(0, rank) for rank in range(4)] == [
            Fragment(0, Range(0, 10), 0),
            Fragment(0, Range(10, 10), 0),
            None,
            None,
        ]
        assert [cut.start_in_parameter(Fragment(0, Range(start, 2), 0)) for start in (3, 13)] == [3, 3]
        assert cut.describe(0) == "a[0:20] 4x5, cut into 2 by rows"

    def test_a_slice_that_ends_with_a_matrix_does_not_reach_into_the_next(self) -> None:
        layout = PartitionLayout(2, ("a", "b"), (Cut(0, 6, 0), Cut(6, 6, 0)), (Matrix(0, 0, 2, 3), Matrix(1, 0, 2, 3)))
        assert (layout.holders(0), layout.holders(1)) == (range(0, 1), range(1, 2))
        assert layout.fragment(0, 1) is None
        assert layout.fragment(1, 1) == Fragment(1, Range(0, 6), 0)


class TestSizes:
    @pytest.mark.parametrize(
        ("numel", "values", "kept", "expected"),
        [
            (7, 0, NO_STATISTICS, 8),
            (8, 0, NO_STATISTICS, 16),
            (15, 0, NO_STATISTICS, 16),
            (1, 3, Kept(("row",), 2), 8),
            (2, 3, Kept(("row",), 2), 16),
            (4, 3, Kept(("row",), 1), 8),
            (5, 3, Kept(("row",), 1), 16),
        ],
    )
    def test_a_fragment_travels_with_its_statistics_and_a_flag_in_multiples_of_8(
        self, numel: int, values: int, kept: Kept, expected: int
    ) -> None:
        assert travelling_numel(numel, values, kept) == expected

    @pytest.mark.parametrize(("bucket_numel", "cpu", "cuda"), [(160, 10, 160), (16, 1, 16), (15, 1, 15), (1, 1, 1)])
    def test_a_bucket_that_does_not_travel_is_a_sixteenth_on_a_cpu(self, bucket_numel: int, cpu: int, cuda: int) -> None:
        plan = ExchangePlan(in_a_row([(2, 2)], 4), (0,), (), bucket_numel, "")
        assert (plan.local_numel(), plan.local_numel("cuda")) == (cpu, cuda)

    def test_a_member_of_a_team_owns_the_rows_behind_those_of_the_members_before_it(self) -> None:
        team = Team(0, ranks=(2, 5, 7), rows=(3, 2, 1), flops=1, gathered_bytes=0)
        assert [team.block(rank, 4) for rank in (2, 5, 7)] == [Range(0, 12), Range(12, 8), Range(20, 4)]

    @pytest.mark.parametrize(
        ("numels", "limit", "expected"),
        [
            ((4, 4), 8, [(0, 1)]),
            ((4, 4), 7, [(0,), (1,)]),
            ((2, 2, 2, 2), 4, [(0, 1), (2, 3)]),
            ((3, 3, 3, 3), 9, [(0, 1), (2, 3)]),  # not 9 and 3
            ((2, 2, 2), 5, [(0, 1), (2,)]),  # half of the second lies beyond the half of all
            ((9, 1), 4, [(0,), (1,)]),
            ((), 4, []),
        ],
    )
    def test_tuples_are_few_and_equal(self, numels: tuple[int, ...], limit: int, expected: list[tuple[int, ...]]) -> None:
        assert list(split_evenly(range(len(numels)), vectors(*numels), limit)) == expected

    @pytest.mark.parametrize(
        ("limit", "expected"),
        [(12, [(0, 1, 2, 3)]), (11, [(0, 1), (2, 3)]), (8, [(0, 1), (2, 3)]), (1, [(0, 1), (2, 3)])],
    )
    def test_an_owner_has_no_more_of_an_exchange_than_the_limit_or_two_matrices(
        self, limit: int, expected: list[tuple[int, ...]]
    ) -> None:
        """Rank 0 owns three matrices of 4 elements and rank 1 one."""
        assert list(bounded([(0, 1, 2, 3)], (0, 0, 0, 1), vectors(4, 4, 4, 4), limit)) == expected

    @pytest.mark.parametrize(("bucket_numel", "expected"), [(16, ((1, 2),)), (15, ((1,), (2,)))])
    def test_a_ranks_second_straddling_matrix_comes_later_where_both_are_more_than_a_bucket(
        self, bucket_numel: int, expected: tuple[tuple[int, ...], ...]
    ) -> None:
        """Slices of 8: a row of 4, 4 + 4, 4 + 4, a row of 4. The outer ranks are busy, so that the middle one owns both."""
        layout = in_a_row([(1, 4), (2, 4), (2, 4), (1, 4)], 8)
        plan = make_plan(layout, lambda matrix: 100 if matrix.rows == 1 else 1, bucket_numel)
        assert plan.owners == (0, 1, 1, 2)
        assert plan.exchanges == expected

    def test_an_exchange_of_all_ranks_is_four_fifths_of_their_buckets(self) -> None:
        """Two ranks with buckets of 10 elements: 16 travel together, and 18 do not."""
        assert make_plan(over_all(2, [(2, 2)] * 4), cubic, 10).exchanges == ((0, 1, 2, 3),)
        assert make_plan(over_all(2, [(2, 3)] * 3), cubic, 10).exchanges == ((0, 1), (2,))


class TestAccelerators:
    """An exchange has 2**22 elements a rank or more: on two ranks, eight matrices of 2**20."""

    @pytest.mark.parametrize(
        ("world_size", "shapes", "expected"),
        [
            (2, [SQUARE] * 24, [6, 6, 12]),
            (2, [SQUARE] * 23, [23]),  # one less than three exchanges
            (8, [(4096, 4096)] * 24, [6, 6, 12]),
            (8, [(4096, 4096)] * 23, [23]),  # one less than three matrices a rank
            (2, [SQUARE] * 24 + [FLAT] * 8, [12, 12, 8]),
            (2, [SQUARE] * 24 + [FLAT] * 7, [15, 8, 8]),  # too few of their shape, so with the others
        ],
    )
    def test_three_exchanges_where_each_is_worth_it(
        self, world_size: int, shapes: list[tuple[int, int]], expected: list[int]
    ) -> None:
        plan = make_plan(over_all(world_size, shapes), cubic, 2**26, "cuda")
        assert [len(exchange) for exchange in plan.exchanges] == expected


class TestClocks:
    def test_local_matrices_are_spread_between_the_exchanges(self) -> None:
        """Rank 0 has 10 of its own, 5 before the exchange and 5 behind it; of 7 it is 3 and 4."""
        clocks = Clocks([10, 0], 1)
        clocks.begin_exchange()
        assert (clocks.of_rank, clocks.end, clocks.gate) == ([5, 0], 5, 0)
        clocks.add(1, 7)
        assert (clocks.of_rank, clocks.end) == ([5, 7], 7)
        clocks.add_together((0, 1), 3)
        assert (clocks.of_rank, clocks.end) == ([10, 10], 10)
        assert clocks.finish() == 15
        odd = Clocks([7], 1)
        odd.begin_exchange()
        assert odd.of_rank == [3]
        assert odd.finish() == 7

    def test_no_rank_begins_before_all_have_ended_the_exchange_before_the_last(self) -> None:
        clocks = Clocks([0, 0, 0], 3)
        clocks.begin_exchange()
        clocks.add(0, 4)
        clocks.begin_exchange()
        assert clocks.gate == 0
        clocks.begin_exchange()
        assert clocks.gate == 4
        clocks.add(1, 1)
        assert clocks.of_rank == [4, 5, 0]
        clocks.add_together((1, 2), 2)
        assert clocks.of_rank == [4, 7, 7]
        clocks.add_together((0,), 1)
        assert (clocks.of_rank, clocks.finish()) == ([5, 7, 7], 7)

    def test_a_team_waits_for_the_gate_too(self) -> None:
        clocks = Clocks([0, 0], 3)
        clocks.begin_exchange()
        clocks.add(0, 4)
        clocks.begin_exchange()
        clocks.begin_exchange()
        clocks.add_together((1,), 2)
        assert clocks.of_rank == [4, 6]
