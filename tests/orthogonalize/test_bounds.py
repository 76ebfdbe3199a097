"""What is healthy: against matrices whose singular values are known, and the bounds' formula written down once more."""

import math

import pytest
import torch
from torch import Tensor

from ds_optforge.orthogonalize import COEFFICIENT_SETS, Healthy, coefficient_set, healthy, orthogonalize

LEAVES_ALONE = ((1.0, 0.0, 0.0),)  # a "Newton-Schulz step" that returns what it is given


def bounds(name: str, directions: int, bits: int = 64) -> Healthy:
    chosen = coefficient_set(name)
    return healthy(chosen.sequence(None), chosen.safety, directions, bits)


def momentum(directions: int, condition: float, empty: int = 0) -> Tensor:
    """(directions, 2 directions) in float64: singular values at equal ratios, ``empty`` of them zero."""
    generator = torch.Generator().manual_seed(directions)
    left, right = (
        torch.linalg.qr(torch.randn(n, directions, generator=generator, dtype=torch.float64)).Q
        for n in (directions, 2 * directions)
    )
    values = condition ** -((torch.arange(directions, dtype=torch.float64) + 0.5) / directions)
    values[directions - empty :] = 0.0
    return (left * values) @ right.mT


def error_and_size(orthogonal: Tensor) -> tuple[float, float]:
    """||O O^T - I||_F / sqrt(n), and the root mean square of the singular values, ||O||_F / sqrt(n)."""
    wide = orthogonal.double()
    gram = wide @ wide.mT - torch.eye(len(wide), dtype=torch.float64)
    return float(gram.norm()) / math.sqrt(len(wide)), float(wide.norm()) / math.sqrt(len(wide))


@pytest.mark.parametrize("name", COEFFICIENT_SETS)
@pytest.mark.parametrize("directions", [8, 64])
def test_ordinary_momenta_are_within_the_bounds(name: str, directions: int) -> None:
    for dtype, bits in ((torch.float64, 64), (torch.bfloat16, 16)):
        allowed = bounds(name, directions, bits)
        for condition in (1.0, 30.0, 1e3, 1e4):
            for empty in {0, directions // 12}:
                error, size = error_and_size(orthogonalize(momentum(directions, condition, empty), name, dtype=dtype))
                assert error <= allowed.error, (dtype, condition, empty)
                assert allowed.smallest <= size <= allowed.largest, (dtype, condition, empty)


@pytest.mark.parametrize("name", COEFFICIENT_SETS)
def test_a_momentum_of_few_directions_is_not(name: str) -> None:
    """4 of 64: 60 singular values are 0, so that the error is at least sqrt(60 / 64) = 0.97."""
    error, size = error_and_size(orthogonalize(momentum(64, 2.0, empty=60), name, dtype=torch.float64))
    allowed = bounds(name, 64)
    assert error > 0.96 > allowed.error
    assert size < allowed.smallest


def test_the_bounds_of_what_is_left_alone() -> None:
    """One direction has the singular value 1; a tenth of the directions has none: sqrt(0.1), sqrt(0.9) and 1."""
    found = healthy(LEAVES_ALONE, 1.0, 1, 32)
    assert found == Healthy(pytest.approx(math.sqrt(0.1)), pytest.approx(math.sqrt(0.9)), pytest.approx(1.0))  # type: ignore[arg-type]


def test_the_start_is_divided_by_the_safety_factor() -> None:
    """1 / 2 is left: an error of 3/4 in nine of ten directions."""
    found = healthy(LEAVES_ALONE, 2.0, 1, 32)
    assert found.error == pytest.approx(math.sqrt(0.9 * 0.75**2 + 0.1))
    assert found.largest == pytest.approx(0.5)


def test_more_directions_allow_for_more_error() -> None:
    """Of the same norm, each has less: the smallest ones are further from what the steps bring to 1."""
    errors = [bounds("polar_express", directions).error for directions in (16, 64, 256, 1024, 4096)]
    assert errors == sorted(errors)


def test_more_steps_allow_for_less_error() -> None:
    triples = coefficient_set("bfm")
    errors = [healthy(triples.sequence(steps), 1.0, 64, 32).error for steps in (2, 5, 10)]
    assert errors == sorted(errors, reverse=True)
