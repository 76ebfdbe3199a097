"""The coefficient sets: what they make of a singular value, alone and as the iteration on matrices."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_optforge.orthogonalize import (
    COEFFICIENT_SETS,
    CoefficientSet,
    accurate_method,
    coefficient_set,
    orthogonalize,
    uses_gram,
)
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


def assembled(values: Tensor, rows: int, cols: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(count, rows, cols) matrices with the singular ``values`` (count or 1, 1, k), and their left and right directions."""
    generator = torch.Generator().manual_seed(values.shape[-1])
    left, right = (torch.linalg.qr(torch.randn(count, n, values.shape[-1], generator=generator)).Q for n in (rows, cols))
    return (left * values) @ right.mT, left, right


def along_singular_directions(
    rank: int, coefficients: Any, method: Any = "auto", shape: tuple[int, int] = (64, 256), count: int = 100
) -> Tensor:
    """What bfloat16 makes of the singular values of matrices of a given rank: (count, rank)."""
    values = 0.05 + torch.rand(count, 1, rank, generator=torch.Generator().manual_seed(rank))
    given, left, right = assembled(values, *shape, count)
    found = orthogonalize(given, coefficients, method=method, dtype=torch.bfloat16).float()
    return torch.einsum("bik,bij,bjk->bk", left, found, right)


def ill_conditioned(kind: str, rows: int, cols: int) -> Tensor:
    """(5, rows, cols) matrices: Gaussian, or with singular values from 1 down to ``kind``."""
    if kind == "gaussian":
        return torch.randn(5, rows, cols, generator=torch.Generator().manual_seed(0))
    values = torch.logspace(0, math.log10(float(kind)), min(rows, cols)).view(1, 1, -1)
    return assembled(values, rows, cols, 5)[0]


def largest_in_exact_arithmetic(name: str) -> float:
    """The largest value that a set takes any singular value to, those below 1e-3 included."""
    values = torch.logspace(-9, 0, 20000, dtype=torch.float64)
    return scalar(values / coefficient_set(name).safety, coefficient_set(name).triples).max().item()


@pytest.mark.parametrize("name", RANGES)
def test_the_range_of_the_output_in_float64(name: str) -> None:
    found = singular_values(orthogonalize(sweep(), name, dtype=torch.float64))
    low, high = RANGES[name]
    assert found.min().item() == pytest.approx(low, abs=ROUNDING[name])
    assert found.max().item() == pytest.approx(high, abs=ROUNDING[name])


@pytest.mark.parametrize("shape", [(64, 64), (64, 128), (64, 256), (128, 64), (256, 64)], ids=str)
@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in RANGES for method in ("auto", "standard")] + [(name, "gram") for name in ("quintic", "you")],
)
def test_the_range_of_the_output_in_bfloat16(name: str, method: Any, shape: tuple[int, int]) -> None:
    """On matrices of low rank, where rounding errors have only a few directions to spread over.

    A gradient of a few tokens is such a matrix. 0.15 around the exact range: the norm of rounding errors of 64 rows.
    (The Gram form takes a direction of cans to 0.23; auto leaves it out there.)
    """
    low, high = RANGES[name]
    for rank in (1, 2, 8, 32):
        found = along_singular_directions(rank, name, method, shape)
        assert found.min() > low - 0.15, f"rank {rank}"
        assert found.max() < high + 0.15, f"rank {rank}"


# How far the largest singular value in bfloat16 may be above the exact one. In standard form 0.02 was seen. The Gram form
# multiplies the rounding errors of R from step to step: quintic 0.28 and you 0.19 were seen on singular values 1 to 0.01.
ABOVE = {"standard": 0.05, "gram": 0.35}


@pytest.mark.parametrize("shape", [(64, 64), (64, 128), (64, 256), (128, 64), (256, 64)], ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "1e-1", "1e-2", "1e-3", "1e-6"])
@pytest.mark.parametrize("name", COEFFICIENT_SETS)
def test_no_singular_value_outgrows_the_range_in_bfloat16(name: str, kind: str, shape: tuple[int, int]) -> None:
    """However badly conditioned the matrix is: one that is left out of a bound here is one that diverges in training."""
    chosen = coefficient_set(name)
    method = accurate_method("auto", len(chosen.triples), torch.bfloat16, chosen.steep)
    form = "gram" if uses_gram(*shape, len(chosen.triples), method) else "standard"
    found = orthogonalize(ill_conditioned(kind, *shape), name, dtype=torch.bfloat16).float()
    assert torch.linalg.matrix_norm(found, 2).max() < largest_in_exact_arithmetic(name) + ABOVE[form]


def test_steep_triples_of_ones_own_stay_in_range_in_bfloat16() -> None:
    """The same numbers as a named set, so the same form: the range is a property of the numbers."""
    low, high = RANGES["cans"]
    found = along_singular_directions(8, COEFFICIENT_SETS["cans"].triples)
    assert found.min() > low - 0.15
    assert found.max() < high + 0.15


@pytest.mark.parametrize(
    ("name", "steep"),
    [("quintic", False), ("you", False), ("bfm", False), ("deepseek_v4", False), ("polar_express", True), ("cans", True)],
)
def test_a_set_is_steep_where_its_first_coefficient_is_large(name: str, steep: bool) -> None:
    """4.1 is not, 8.2 is."""
    assert COEFFICIENT_SETS[name].steep is steep


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


@pytest.mark.promise("muon-defaults")
def test_quintic_is_torchs() -> None:
    assert COEFFICIENT_SETS["quintic"].triples == QUINTIC


def test_polar_express_is_the_papers() -> None:
    """Amsel et al. 2025, 5 steps, safety factor 2e-2, cushion 2."""
    chosen = COEFFICIENT_SETS["polar_express"]
    assert chosen.triples == (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    )
    assert (chosen.repeats, chosen.safety, chosen.eps) == (False, 1.02, 1e-6)


def test_you_is_the_one_that_was_published() -> None:
    """https://x.com/YouJiacheng/status/1905861218138804534, and modded-nanogpt's record of that day."""
    chosen = COEFFICIENT_SETS["you"]
    assert chosen.triples == (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    )
    assert (chosen.repeats, chosen.safety, chosen.eps) == (False, 1.0, 1e-7)


def test_cans_is_the_papers_with_a_margin_of_2_percent_in_all_steps_but_the_last() -> None:
    """Grishina et al. 2025. With x / 1.02 for x, a is divided by 1.02, b by its cube and c by its fifth power."""
    chosen = COEFFICIENT_SETS["cans"]
    papers = (
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
    )
    for (a, b, c), expected in zip(chosen.triples, papers, strict=False):
        assert (a * 1.02, b * 1.061208, c * 1.1040808032) == pytest.approx(expected, rel=1e-12)
    assert chosen.triples[4:] == ((2.2737, -1.6447, 0.4162),)
    assert (chosen.repeats, chosen.safety, chosen.eps) == (False, 1.0, 1e-7)


def test_deepseek_v4_is_eight_quintic_steps_then_two_that_converge() -> None:
    assert COEFFICIENT_SETS["deepseek_v4"].triples == (QUINTIC[0],) * 8 + ((2.0, -1.5, 0.5),) * 2


def test_bfm_is_its_orthogonalize() -> None:
    chosen = COEFFICIENT_SETS["bfm"]
    assert (chosen.triples, chosen.eps) == (((3.0, -3.2, 1.2),) * 10, 1e-8)


@pytest.mark.promise("muon-defaults")
def test_the_default_number_of_steps_is_the_sets_own() -> None:
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


@pytest.mark.promise("unknown-name")
def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"got 'newton'; allowed: quintic, polar_express, you, .* or a list of triples"):
        coefficient_set("newton")


@pytest.mark.parametrize("coefficients", [[], [[1.0, 2.0]], [[1.0, 2.0, 3.0, 4.0]]], ids=["none", "a pair", "four"])
def test_what_is_no_list_of_triples(coefficients: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"allowed: a non-empty list of triples \[a, b, c\]"):
        coefficient_set(coefficients)


def test_a_set_is_data() -> None:
    assert CoefficientSet(((3.0, -3.0, 1.0),), repeats=True) == coefficient_set([[3, -3, 1]])
