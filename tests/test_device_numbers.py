"""Numbers that hold on CUDA too, whose roundings are put upon the CPU's tensors."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ds_optforge import build_optimizer
from ds_optforge.orthogonalize import COEFFICIENT_SETS, flops, newton_schulz, orthogonalize
from tests.device_numbers import CanonicalNaNs, SplitSums
from tests.layers import linears, matrix, set_gradients


def row_moments(rows: int, steps: int, mode: AbstractContextManager[object]) -> Tensor:
    model = linears(0.1 * matrix(rows, 24))
    optimizer = build_optimizer(model, {"name": "normuon", "lr": 0.02})
    for step in range(steps):
        set_gradients(model.parameters(), step)
        with mode:
            optimizer.step()
    return optimizer.state[model[0].weight]["row_second_moment"]


@pytest.mark.parametrize("steps", [1, 3])
def test_float32_statistics_travel_through_bfloat16_bit_by_bit(steps: int) -> None:
    """Half of a float32 may be a NaN of bfloat16: one in 256 of them, so that 4,096 rows have some."""
    expected, found = (row_moments(4096, steps, mode) for mode in (nullcontext(), CanonicalNaNs()))
    halves = expected.view(torch.bfloat16)
    assert halves.isnan().any()
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.fixture
def as_on_an_accelerator() -> Iterator[None]:
    """The Gram form of bfloat16 matrices takes the products that it takes there."""
    kept = {torch.bfloat16: torch.float16}
    with mock.patch.object(newton_schulz, "gram_dtype", side_effect=lambda dtype, device: kept.get(dtype, dtype)):
        yield


def with_singular_values(values: Tensor, cols: int, seed: int) -> Tensor:
    """(n, cols) in bfloat16, of random singular directions."""
    left, right = (torch.linalg.qr(matrix(size, len(values), seed=seed)).Q for size in (len(values), cols))
    return ((left * values) @ right.mT).bfloat16()


@pytest.mark.usefixtures("as_on_an_accelerator")
class TestTheGramForm:
    """Of orthogonalization in bfloat16, whose products accelerators make in float16."""

    @pytest.mark.parametrize("splits", [1, 2, 4, 8])
    @pytest.mark.parametrize("name", COEFFICIENT_SETS)
    def test_no_singular_value_outgrows_its_range_however_sums_are_split(self, name: str, splits: int) -> None:
        """In bfloat16 the largest is 1.4 without splits, 1.87 with eight (quintic), and 2.3 for polar_express."""
        for lowest in (-1, -2, -4):
            given = torch.stack([with_singular_values(torch.logspace(0, lowest, 128), 512, seed) for seed in range(2)])
            with SplitSums(splits):
                found = orthogonalize(given, name).float()
            assert torch.linalg.matrix_norm(found, 2).max() < 1.3

    @pytest.mark.parametrize("splits", [1, 8])
    @pytest.mark.parametrize("rank", [1, 8])
    @pytest.mark.parametrize("name", COEFFICIENT_SETS)
    def test_matrices_of_low_rank_are_as_accurate_as_in_the_standard_form(self, name: str, rank: int, splits: int) -> None:
        given = with_singular_values(torch.cat([torch.ones(rank), torch.zeros(64 - rank)]), 256, 0)
        exact = orthogonalize(given, name, method="standard", dtype=torch.float64)
        with SplitSums(splits):
            found = torch.linalg.svdvals(orthogonalize(given, name).float())[:rank]
        assert (found - torch.linalg.svdvals(exact)[:rank]).abs().max() < 0.05

    @pytest.mark.parametrize("shape", [(32, 256), (256, 32)])
    @pytest.mark.parametrize("name", COEFFICIENT_SETS)
    def test_it_is_as_close_to_exact_arithmetic_as_the_standard_form(self, name: str, shape: tuple[int, int]) -> None:
        """2.5%: see test_newton_schulz.py."""
        given = matrix(2, *shape)
        exact = orthogonalize(given, name, dtype=torch.float64)
        assert (orthogonalize(given, name).double() - exact).norm() / exact.norm() < 0.025

    @pytest.mark.parametrize("size", [1e-6, 1e6, 1e15])
    def test_the_size_of_a_matrix_does_not_matter(self, size: float) -> None:
        given = matrix(32, 256).bfloat16()
        torch.testing.assert_close(orthogonalize(size * given), orthogonalize(given), rtol=0, atol=0.02)

    def test_a_zero_matrix_stays_zero_and_a_nan_in_its_matrix(self) -> None:
        given = matrix(3, 6, 24).bfloat16()
        given[0], given[1, 2, 3] = 0, float("nan")
        found = orthogonalize(given)
        assert not found[0].any()
        assert [one.isnan().any().item() for one in found] == [False, True, False]

    def test_the_matrices_are_left_unchanged(self) -> None:
        given = matrix(2, 6, 24).bfloat16()
        orthogonalize(given)
        assert torch.equal(given, matrix(2, 6, 24).bfloat16())


@pytest.mark.parametrize(("name", "steps"), [("quintic", 8), ("polar_express", 5), ("cans", 5), ("deepseek_v4", 10)])
def test_accelerators_take_the_gram_form_of_every_set_where_it_is_cheaper(name: str, steps: int) -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.empty(64, 512, dtype=torch.bfloat16, device="meta"), name, steps)
    assert counter.get_total_flops() == flops(64, 512, steps, "gram") < flops(64, 512, steps, "standard")


def test_a_on_the_diagonal_of_the_polynomial_would_double_the_error() -> None:
    """Which would save a copy for each product, so it is not done: the standard form, 256 x 256."""
    values = torch.logspace(0, -1, 256, dtype=torch.float64)
    left, right = (torch.linalg.qr(matrix(256, 256, seed=seed, dtype=torch.float64))[0] for seed in (1, 2))
    given = left * values @ right.mT
    exact = iterated(given, torch.float64, diagonal=False)
    summed, diagonal = (
        (iterated(given, torch.bfloat16, diagonal=how).double() - exact).norm() / exact.norm() for how in (False, True)
    )
    assert summed < 0.015
    assert diagonal > 1.7 * summed


def iterated(given: Tensor, dtype: torch.dtype, diagonal: bool) -> Tensor:
    """Quintic steps with ``a`` in a sum, or on the diagonal of the polynomial, everything rounded to ``dtype``."""
    x = (given / given.norm()).to(dtype)
    for a, b, c in COEFFICIENT_SETS["quintic"].triples:
        gram = x @ x.mT
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        if diagonal:
            polynomial.diagonal().add_(a)
        x = polynomial @ x if diagonal else torch.addmm(x, polynomial, x, beta=a)
    return x
