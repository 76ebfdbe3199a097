"""The coefficient sets: what they make of a singular value, alone and as the iteration on matrices."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_optforge.orthogonalize import COEFFICIENT_SETS, CoefficientSet, coefficient_set, orthogonalize
from tests.oracles import QUINTIC

# Where each set takes singular values from [1e-3, 1]. A float64 scalar sweep, published to two digits.
# (cans: its margin of 2% a step moves the small end from 0.88 to 0.84.)
RANGES = {
    "quintic": (0.47, 1.20),
    "you": (0.48, 1.15),
    "polar_express": (0.85, 1.14),
    "cans": (0.84, 1.12),
    "deepseek_v4": (1.000, 1.0005),
}
ROUNDING = {"quintic": 0.005, "you": 0.006, "polar_express": 0.005, "cans": 0.01, "deepseek_v4": 5e-5}


def sweep() -> Tensor:
    """(4000, 2, 2) diagonal matrices of norm 1, whose 8000 singular values cover [1e-3, 1]."""
    small = torch.logspace(-3, math.log10(math.sqrt(0.5)), 4000, dtype=torch.float64)
    return torch.diag_embed(torch.stack([small, (1 - small**2).sqrt()], dim=-1))


def singular_values(matrices: Tensor) -> Tensor:
    """Signed: a direction that turned over is negative."""
    return matrices.diagonal(dim1=-2, dim2=-1)


def scalar(value: Tensor, triples: Sequence[Sequence[float]]) -> Tensor:
    for a, b, c in triples:
        value = a * value + b * value**3 + c * value**5
    return value


def along_singular_directions(rank: int, coefficients: Any, method: Any) -> Tensor:
    """What bfloat16 makes of the singular values of 100 wide matrices of a given rank: (100, rank)."""
    generator = torch.Generator().manual_seed(rank)
    left = torch.linalg.qr(torch.randn(100, 64, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(100, 256, rank, generator=generator)).Q
    values = 0.05 + torch.rand(100, 1, rank, generator=generator)
    found = orthogonalize((left * values) @ right.mT, coefficients, method=method, dtype=torch.bfloat16).float()
    return torch.einsum("bik,bij,bjk->bk", left, found, right)


@pytest.mark.parametrize("name", RANGES)
def test_the_range_of_the_output_in_float64(name: str) -> None:
    found = singular_values(orthogonalize(sweep(), name, dtype=torch.float64))
    low, high = RANGES[name]
    assert found.min().item() == pytest.approx(low, abs=ROUNDING[name])
    assert found.max().item() == pytest.approx(high, abs=ROUNDING[name])


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in RANGES for method in ("auto", "standard")]
    + [(name, "gram") for name in ("quintic", "you", "deepseek_v4")],
)
def test_the_range_of_the_output_in_bfloat16(name: str, method: Any) -> None:
    """On wide matrices of low rank, where rounding errors have only a few directions to spread over.

    A gradient of a few tokens is such a matrix. 0.15 around the exact range: the norm of rounding errors of 64 rows.
    (The Gram form multiplies such a matrix by up to 1e6 with the two steepest sets; auto leaves it out there.)
    """
    low, high = RANGES[name]
    for rank in (1, 2, 8):
        found = along_singular_directions(rank, name, method)
        assert found.min() > low - 0.15, f"rank {rank}"
        assert found.max() < high + 0.15, f"rank {rank}"


def test_steep_triples_of_ones_own_stay_in_range_in_bfloat16() -> None:
    """The same numbers as a named set, so the same risk: 2720 was seen where 1.14 is exact."""
    low, high = RANGES["polar_express"]
    found = along_singular_directions(2, COEFFICIENT_SETS["polar_express"].triples, "auto")
    assert found.min() > low - 0.15
    assert found.max() < high + 0.15


@pytest.mark.parametrize("name", COEFFICIENT_SETS)
def test_a_matrix_of_one_direction_stays_in_range_in_bfloat16(name: str) -> None:
    """A singular value of 1 is where the first polynomial is steepest."""
    value = singular_values(orthogonalize(torch.diag(torch.tensor([1.0, 0.0])), name, dtype=torch.bfloat16))[0]
    chosen = coefficient_set(name)
    exact = scalar(torch.tensor(1 / chosen.safety, dtype=torch.float64), chosen.triples)
    assert value.item() == pytest.approx(exact.item(), abs=0.1)


@pytest.mark.parametrize("name", COEFFICIENT_SETS)
def test_the_iteration_on_a_matrix_is_the_polynomial_of_its_singular_values(name: str) -> None:
    """1e-12: float64."""
    chosen = coefficient_set(name)
    values = singular_values(sweep()) / (chosen.safety + chosen.eps)
    found = singular_values(orthogonalize(sweep(), name, method="standard", dtype=torch.float64))
    torch.testing.assert_close(found, scalar(values, chosen.triples), rtol=0, atol=1e-12)


def test_quintic_is_torchs() -> None:
    """checklist 46"""
    assert COEFFICIENT_SETS["quintic"].triples == QUINTIC


def test_polar_express_is_the_papers() -> None:
    """Amsel et al. 2025, 5 steps, safety factor 2e-2, cushion 2: its first and last triple."""
    chosen = COEFFICIENT_SETS["polar_express"]
    assert chosen.triples[0] == (8.156554524902461, -22.48329292557795, 15.878769915207462)
    assert chosen.triples[-1] == (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)
    assert (len(chosen.triples), chosen.safety, chosen.eps) == (5, 1.02, 1e-6)


def test_deepseek_v4_is_eight_quintic_steps_then_two_that_converge() -> None:
    assert COEFFICIENT_SETS["deepseek_v4"].triples == (QUINTIC[0],) * 8 + ((2.0, -1.5, 0.5),) * 2


def test_bfm_is_its_orthogonalize() -> None:
    chosen = COEFFICIENT_SETS["bfm"]
    assert (chosen.triples, chosen.eps) == (((3.0, -3.2, 1.2),) * 10, 1e-8)


def test_the_default_number_of_steps_is_the_sets_own() -> None:
    """checklist 46"""
    assert {name: len(coefficient_set(name).sequence(None)) for name in COEFFICIENT_SETS} == {
        "quintic": 5,
        "polar_express": 5,
        "you": 5,
        "cans": 5,
        "deepseek_v4": 10,
        "bfm": 10,
    }


@pytest.mark.parametrize("steps", [1, 4, 5, 9])
def test_a_set_that_repeats_gives_any_number_of_steps(steps: int) -> None:
    assert COEFFICIENT_SETS["quintic"].sequence(steps) == QUINTIC[:1] * steps


def test_fewer_steps_are_the_first_ones() -> None:
    chosen = COEFFICIENT_SETS["you"]
    assert chosen.sequence(3) == chosen.triples[:3]


@pytest.mark.parametrize("name", ["polar_express", "you", "cans", "deepseek_v4"])
def test_a_set_that_was_designed_as_a_whole_has_no_further_steps(name: str) -> None:
    most = len(COEFFICIENT_SETS[name].triples)
    with pytest.raises(ValueError, match=f"^steps: got {most + 1}; allowed: 1 to {most}, the length of this"):
        COEFFICIENT_SETS[name].sequence(most + 1)


def test_no_steps_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"^steps: got 0; allowed: an integer of at least 1"):
        COEFFICIENT_SETS["quintic"].sequence(0)


def test_one_triple_of_ones_own_repeats_and_several_do_not() -> None:
    assert coefficient_set([[3, -3, 1]]).sequence(4) == ((3.0, -3.0, 1.0),) * 4
    with pytest.raises(ValueError, match="allowed: 1 to 2"):
        coefficient_set([[3, -3, 1], [2, -1.5, 0.5]]).sequence(3)


def test_an_unknown_name_lists_the_known_ones() -> None:
    """checklist 2"""
    with pytest.raises(ValueError, match=r"got 'newton'; allowed: quintic, polar_express, you, .* or a list of triples"):
        coefficient_set("newton")


@pytest.mark.parametrize("coefficients", [[], [[1.0, 2.0]], [[1.0, 2.0, 3.0, 4.0]]], ids=["none", "a pair", "four"])
def test_what_is_no_list_of_triples(coefficients: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"allowed: a non-empty list of triples \[a, b, c\]"):
        coefficient_set(coefficients)


def test_a_set_is_data() -> None:
    assert CoefficientSet(((3.0, -3.0, 1.0),), repeats=True) == coefficient_set([[3, -3, 1]])
