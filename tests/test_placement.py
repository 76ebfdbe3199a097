"""Every element and every output row of a parameter is held once, by whatever ranks; a checkpoint's names rest on that."""

from itertools import accumulate, pairwise

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_optforge.checkpoint.logical import block_cuts
from ds_optforge.zero.partition import Cut, Joined, Matrix, PartitionLayout, Per
from ds_optforge.zero.placement import Placement

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

SHAPES = st.lists(  # of parameters: matrices of (rows, cols), stored (in, out) or not
    st.tuples(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3), st.booleans()),
    min_size=1,
    max_size=5,
)


def placements(parameters: list[tuple[list[tuple[int, int]], bool]], world: int, zero3: bool) -> list[Placement]:
    """As ZeRO-1/2 (one flat group) or ZeRO-3 (each parameter) cuts them: one of each rank."""
    numels = [sum(rows * cols for rows, cols in matrices) for matrices, _ in parameters]
    matrices = [
        Matrix(index, start, rows, cols, transposed)
        for index, (shapes, transposed) in enumerate(parameters)
        for start, (rows, cols) in zip(accumulate((r * c for r, c in shapes), initial=0), shapes, strict=False)
    ]
    if zero3:
        sizes = [-(-numel // world) for numel in numels]
        cuts = [Cut(0, size, offset) for size, offset in zip(sizes, accumulate(sizes, initial=0), strict=False)]
    else:
        size = -(-sum(numels) // world)
        cuts = [Cut(base, size, 0) for base, _ in zip(accumulate(numels, initial=0), numels, strict=False)]
    names = tuple(f"p{index}" for index in range(len(parameters)))
    layout = PartitionLayout(world, names, tuple(cuts), tuple(matrices))
    return [Placement(layout, rank, (0,)) for rank in range(world)]


@unhurried
@given(SHAPES, st.integers(1, 6), st.booleans())
def test_every_element_is_held_once_and_at_one_place(
    parameters: list[tuple[list[tuple[int, int]], bool]], world: int, zero3: bool
) -> None:
    ranks = placements(parameters, world, zero3)
    for index, (matrices, _) in enumerate(parameters):
        held = [found for placement in ranks if (found := placement.held(index))]
        assert [e for h in held for e in range(h.within.start, h.within.end)] == list(range(sum(r * c for r, c in matrices)))
    for placement in ranks:
        held = [found for index in range(len(parameters)) if (found := placement.held(index))]
        assert all(a.tensor_start + a.numel <= b.tensor_start for a, b in pairwise(held))


@unhurried
@given(SHAPES, st.integers(1, 6), st.booleans(), st.sampled_from(["row", "matrix"]))
def test_every_value_of_a_statistic_is_held_once_where_the_first_element_of_its_row_or_matrix_lies(
    parameters: list[tuple[list[tuple[int, int]], bool]], world: int, zero3: bool, per: Per
) -> None:
    ranks = placements(parameters, world, zero3)
    for index, (matrices, transposed) in enumerate(parameters):
        held = [found for p in ranks if (found := p.held_values(index, per, p.value_places(per)))]
        rows = sum(c if transposed else r for r, c in matrices) if per == "row" else len(matrices)
        assert ranks[0].values(index, per) == rows
        assert [row for h in held for row in range(h.within.start, h.within.end)] == list(range(rows))
    for placement in ranks:
        places = placement.value_places(per)
        held = [found for index in range(len(parameters)) if (found := placement.held_values(index, per, places))]
        assert [h.tensor_start for h in held] == list(accumulate((h.numel for h in held), initial=0))[:-1]
        assert sum(h.numel for h in held) == sum(placement.value_counts(per))


@unhurried
@given(SHAPES, st.integers(1, 6), st.booleans())
def test_it_survives_a_file(parameters: list[tuple[list[tuple[int, int]], bool]], world: int, zero3: bool) -> None:
    for placement in placements(parameters, world, zero3):
        assert Placement.from_plain(placement.to_plain()) == placement


def test_every_factor_is_kept_by_its_owner_alone() -> None:
    """Two joined matrices of (4, 6) and one of (5, 3), which two ranks share: rows: 2 x 16 and 25 values, columns: 72 and 9."""
    matrices = (Matrix(0, 0, 8, 6, joins=Joined(2, 1)), Matrix(1, 0, 5, 3))
    layout = PartitionLayout(2, ("a", "b"), (Cut(0, 24, 0), Cut(0, 8, 24)), matrices)
    first, second = (Placement(layout, rank, (0, 24), owners=(1, 0)) for rank in range(2))
    assert [place.owned_counts("rows") for place in (first, second)] == [[0, 25], [32, 0]]
    assert [place.owned_counts("cols") for place in (first, second)] == [[0, 9], [72, 0]]
    assert [place.owned_counts("matrix") for place in (first, second)] == [[0, 15], [48, 0]]
    assert Placement.from_plain(second.to_plain()) == second


def test_blocks_restart_where_a_rank_or_a_matrix_begins_inside_one() -> None:
    placement = placements([([(30, 40), (10, 32)], False)], 3, zero3=True)[0]
    numel = 30 * 40 + 10 * 32
    size = -(-numel // 3)
    assert block_cuts(placement, 0) == sorted({size, 2 * size, 1200})
    assert block_cuts(placements([([(32, 32)], False)], 4, zero3=True)[0], 0) == []  # 256 elements a rank: nothing to tell
