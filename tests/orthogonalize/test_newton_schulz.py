"""The iteration: towards the polar factor, the same in both forms, and counted right."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ds_optforge
from ds_optforge.orthogonalize import COEFFICIENT_SETS, flops, orthogonalize, uses_gram
from tests.oracles import newton_schulz, polar_factor, relative_error

SHAPES = [(24, 24), (24, 30), (24, 48), (24, 200), (30, 24), (48, 24), (200, 24), (1, 9), (9, 1), (1, 1)]
METHODS = ["standard", "gram", "auto"]


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_many_gentle_steps_reach_the_polar_factor(shape: tuple[int, int], method: Any) -> None:
    """The classical triple converges for every singular value in (0, sqrt(3)); 1e-8: cubically, so float64 is exhausted."""
    found = orthogonalize(matrix(*shape), [[1.875, -1.25, 0.375]], 60, method, torch.float64)
    torch.testing.assert_close(found, polar_factor(matrix(*shape)), rtol=0, atol=1e-8)


# Relative distance to the polar factor after the set's own steps on a Gaussian matrix; about twice what was seen.
DISTANCES = {"quintic": 0.3, "polar_express": 0.15, "you": 0.06, "cans": 0.12, "deepseek_v4": 5e-4, "bfm": 5e-3}


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (64, 128)])
@pytest.mark.parametrize("name", COEFFICIENT_SETS)
def test_every_set_comes_close_to_the_polar_factor(name: str, shape: tuple[int, int]) -> None:
    found = orthogonalize(matrix(*shape), name, dtype=torch.float64)
    assert relative_error(found, polar_factor(matrix(*shape))) < DISTANCES[name]


@pytest.mark.promise("muon-defaults")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_default_is_five_quintic_steps(shape: tuple[int, int], method: Any) -> None:
    """It is compared with the formula. 1e-10: float64."""
    found = orthogonalize(matrix(*shape), method=method, dtype=torch.float64)
    assert relative_error(found, newton_schulz(matrix(*shape))) < 1e-10


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", COEFFICIENT_SETS)
def test_the_gram_form_equals_the_standard_form(name: str, shape: tuple[int, int]) -> None:
    """1e-9: R squares the condition number (1e3 at most here), and float64 has 16 digits."""
    standard, gram = (orthogonalize(matrix(*shape), name, None, m, torch.float64) for m in ("standard", "gram"))
    assert relative_error(gram, standard) < 1e-9


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 8, 9])
def test_the_gram_form_equals_the_standard_form_after_any_number_of_steps(steps: int) -> None:
    """Its restarts come before steps 2, 5 and 8."""
    standard, gram = (orthogonalize(matrix(24, 60), "quintic", steps, m, torch.float64) for m in ("standard", "gram"))
    assert relative_error(gram, standard) < 1e-9


@pytest.mark.parametrize(
    ("shape", "method", "tolerance"),
    [
        ((40, 40), "standard", 0.025),
        ((24, 96), "standard", 0.025),
        ((128, 512), "standard", 0.025),
        ((24, 96), "gram", 0.05),
        ((96, 24), "gram", 0.05),
        ((128, 512), "gram", 0.025),
        ((40, 40), "auto", 0.025),
    ],
)
def test_bfloat16_stays_close_to_float64(shape: tuple[int, int], method: Any, tolerance: float) -> None:
    """2.5% is where torch.optim.Muon is. The Gram form's R squares the condition number, which shows on tiny matrices.

    (Forced upon a square Gaussian matrix it is off by 10%; auto takes the standard form there.)
    """
    found = orthogonalize(matrix(*shape, dtype=torch.float32), method=method)
    assert relative_error(found, newton_schulz(matrix(*shape, dtype=torch.float32))) < tolerance


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_has_the_dtype_of_the_products(given: torch.dtype, dtype: torch.dtype, method: Any) -> None:
    assert orthogonalize(matrix(4, 12).to(given), method=method, dtype=dtype).dtype == dtype


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize(("rows", "cols"), [(6, 20), (20, 6), (6, 6)])
def test_matrices_may_have_any_leading_shape(rows: int, cols: int, leading: tuple[int, ...], method: Any) -> None:
    """1e-12: the same float64 products, batched."""
    given = matrix(*leading, rows, cols)
    found = orthogonalize(given, method=method, dtype=torch.float64)
    assert found.shape == given.shape
    expected = torch.stack([newton_schulz(one) for one in given.reshape(-1, rows, cols)]).view(given.shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_a_batch_may_be_empty(leading: tuple[int, ...]) -> None:
    assert orthogonalize(matrix(*leading, 4, 6)).shape == (*leading, 4, 6)


@pytest.mark.parametrize("method", METHODS)
def test_the_transpose_gives_the_transpose(method: Any) -> None:
    wide, tall = matrix(6, 20), matrix(6, 20).T
    torch.testing.assert_close(
        orthogonalize(tall, method=method, dtype=torch.float64),
        orthogonalize(wide, method=method, dtype=torch.float64).T,
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (6, 6)])
def test_the_input_is_left_unchanged(shape: tuple[int, int], dtype: torch.dtype, method: Any) -> None:
    given = matrix(*shape, dtype=dtype)
    orthogonalize(given, method=method, dtype=dtype)
    assert torch.equal(given, matrix(*shape, dtype=dtype))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", COEFFICIENT_SETS)
def test_a_zero_matrix_stays_zero(name: str, method: Any) -> None:
    matrices = torch.stack([torch.zeros(6, 20), matrix(6, 20, dtype=torch.float32)])
    found = orthogonalize(matrices, name, method=method, dtype=torch.float32)
    assert not found[0].any()
    assert found[1].any()


@pytest.mark.parametrize(("name", "steps"), [("quintic", 6), ("deepseek_v4", None), ("bfm", None)])
def test_the_gram_form_of_more_than_five_steps_is_refused_in_16_bits(name: str, steps: int | None) -> None:
    """Its rounding errors grow with each step: the largest singular value of seven quintic steps is 400."""
    message = rf"^method: got 'gram' with {steps or 10} steps in torch.bfloat16; allowed: up to 5 steps, 'auto', 'standard'"
    with pytest.raises(ValueError, match=message):
        orthogonalize(matrix(6, 20, dtype=torch.float32), name, steps, method="gram")


@pytest.mark.parametrize("name", ["polar_express", "cans", "deepseek_v4"])
@pytest.mark.parametrize("method", METHODS)
def test_float32_takes_every_form_of_every_set(name: str, method: Any) -> None:
    """1e-3: float32's rounding, multiplied by the steep start."""
    found = orthogonalize(matrix(24, 96, dtype=torch.float32), name, method=method, dtype=torch.float32)
    assert relative_error(found, orthogonalize(matrix(24, 96, dtype=torch.float32), name, dtype=torch.float64)) < 1e-3


@pytest.mark.parametrize("factor", [1e-3, 1e3, 1e15])
def test_the_size_of_a_matrix_does_not_matter(factor: float) -> None:
    """1e-3 at the small end: eps of 1e-7 in a norm of 1e-2; the squares of the large end need more than float16's range."""
    found = orthogonalize(factor * matrix(6, 20, dtype=torch.float32), dtype=torch.float32)
    assert relative_error(found, newton_schulz(matrix(6, 20, dtype=torch.float32))) < 1e-3


def test_a_float16_matrix_whose_norm_overflows_float16_is_normalised() -> None:
    """2% of rounding to bfloat16."""
    found = orthogonalize((3e4 * matrix(24, 24).sign()).half())
    assert relative_error(found, newton_schulz(matrix(24, 24).sign())) < 0.025


@pytest.mark.parametrize("method", METHODS)
def test_a_nan_stays_in_its_own_matrix(method: Any) -> None:
    given = matrix(3, 6, 20, dtype=torch.float32)
    given[1, 2, 3] = float("nan")
    found = orthogonalize(given, method=method, dtype=torch.float32)
    assert [one.isnan().any().item() for one in found] == [False, True, False]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6, 10])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(24, 24), (24, 30), (24, 48), (24, 200), (200, 24)])
def test_flops_are_those_of_the_products_that_run(shape: tuple[int, int], method: Any, steps: int) -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonalize(matrix(*shape), "quintic", steps, method, torch.float64)
    assert flops(*shape, steps, method) == counter.get_total_flops()


@pytest.mark.parametrize(("n", "m"), [(24, 24), (24, 30), (24, 200), (512, 2048)])
def test_flops_of_five_steps_in_closed_form(n: int, m: int) -> None:
    """tridao.me/blog/2026/gram-newton-schulz; n the short side, m the long one."""
    assert flops(n, m, 5, "standard") == flops(m, n, 5, "standard") == 5 * (4 * n**2 * m + 2 * n**3)
    assert flops(n, m, 5, "gram") == flops(m, n, 5, "gram") == 8 * n**2 * m + 28 * n**3


@pytest.mark.parametrize(("shape", "gram"), [((24, 24), False), ((24, 36), False), ((24, 37), True), ((37, 24), True)])
def test_auto_takes_the_gram_form_where_it_is_cheaper(shape: tuple[int, int], gram: bool) -> None:
    """20 n^2 m + 10 n^3 > 8 n^2 m + 28 n^3 where m > 1.5 n."""
    assert uses_gram(*shape, 5) is gram
    assert flops(*shape, 5) == flops(*shape, 5, "gram" if gram else "standard")
    with FlopCounterMode(display=False) as counter:
        orthogonalize(matrix(*shape), dtype=torch.float64)
    assert counter.get_total_flops() == flops(*shape, 5)


@pytest.mark.parametrize(
    ("name", "steps", "dtype", "gram"),
    [
        ("quintic", 5, torch.bfloat16, True),
        ("you", 5, torch.bfloat16, True),
        ("quintic", 6, torch.bfloat16, False),
        ("quintic", 6, torch.float32, True),
        ("deepseek_v4", 10, torch.bfloat16, False),
        ("deepseek_v4", 5, torch.bfloat16, True),
        ("polar_express", 5, torch.bfloat16, False),
        ("cans", 5, torch.bfloat16, False),
        ("cans", 5, torch.float32, True),
    ],
)
def test_auto_leaves_the_gram_form_out_where_it_is_inaccurate(name: str, steps: int, dtype: torch.dtype, gram: bool) -> None:
    """In 16 bits: after more than five steps it diverges; the steepest sets leave their range (see test_coefficients)."""
    with FlopCounterMode(display=False) as counter:
        orthogonalize(matrix(24, 96, dtype=torch.float32), name, steps, dtype=dtype)
    assert counter.get_total_flops() == flops(24, 96, steps, "gram" if gram else "standard")


@pytest.mark.promise("orthogonalize")
def test_it_is_usable_on_its_own() -> None:
    """5%: bfloat16 in the Gram form."""
    found = ds_optforge.orthogonalize(matrix(24, 96, dtype=torch.float32))
    assert relative_error(found, newton_schulz(matrix(24, 96, dtype=torch.float32))) < 0.05


@pytest.mark.promise("muon-settings")
def test_steps_and_coefficients_take_effect() -> None:
    triples = ((3.0, -3.2, 1.2),) * 3
    found = orthogonalize(matrix(6, 20), triples, 3, dtype=torch.float64)
    assert relative_error(found, newton_schulz(matrix(6, 20), triples)) < 1e-10


@pytest.mark.parametrize("shape", [(), (5,)])
def test_a_vector_is_an_error_that_says_so(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^matrices: got shape \(5?,?\); allowed: \(\.\.\., rows, cols\)"):
        orthogonalize(matrix(*shape))


def test_an_unknown_set_is_an_error() -> None:
    with pytest.raises(ValueError, match="got 'newton'; allowed: quintic"):
        orthogonalize(matrix(4, 6), "newton")


def test_more_steps_than_the_set_has_are_an_error() -> None:
    with pytest.raises(ValueError, match="steps: got 6; allowed: 1 to 5"):
        orthogonalize(matrix(4, 6), "you", 6)


def test_products_in_float16_are_refused() -> None:
    """The squares of a gradient's elements leave its range."""
    with pytest.raises(ValueError, match=r"dtype: got torch.float16, .*; allowed: bfloat16, float32, float64"):
        orthogonalize(matrix(4, 6), dtype=torch.float16)
