"""What Newton-Schulz makes of an ordinary momentum: how far from orthogonal, and how large. Arithmetic on singular values.

No spectrum is right for every model, so the error and the smallest size are bounds over a family. Its matrices have n singular
values at equal ratios, from the largest to one that is up to 10,000 times smaller; and up to a tenth of the directions have no
gradient at all (a projection before a softmax or a norm always has some). docs/telemetry.md compares it with real momenta.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ds_optforge.orthogonalize.coefficients import Triple

LARGEST_CONDITION = 1e4
EMPTY_DIRECTIONS = 0.1

# Condition numbers of the family, and singular values of one matrix: with four times as many, no bound moves by 0.01.
_CONDITIONS = 65
_SINGULAR_VALUES = 256

# What products in 16 bits add to the error and to the size. On matrices of this family with 8 to 256 rows, 0.07 was the most,
# and 0.02 where the error itself is near its bound.
_ROUNDING = 0.05


@dataclass(frozen=True, slots=True)
class Healthy:
    """Bounds for the approximate polar factors O of ordinary momenta of one shape.

    Attributes:
        error: the largest ||O O^T - I||_F / sqrt(n), with n rows, the fewer.
        smallest: the smallest root mean square of O's singular values; 1 if O is exactly orthogonal.
        largest: the largest one, whatever the momentum.
    """

    error: float
    smallest: float
    largest: float


@cache
def healthy(triples: tuple[Triple, ...], safety: float, directions: int, bits: int) -> Healthy:
    """Return the bounds for matrices of one shape.

    Args:
        triples: of the Newton-Schulz steps, in their order.
        safety: see `CoefficientSet`.
        directions: n, the smaller side of the matrices.
        bits: of the numbers in the products.
    """
    squares = _result(_family(directions) / safety, triples).square()
    full, rounding = 1.0 - EMPTY_DIRECTIONS, _ROUNDING if bits < 32 else 0.0
    error = (squares - 1.0).square().mean(1).max().item()
    return Healthy(
        error=math.sqrt(full * error + EMPTY_DIRECTIONS) + rounding,
        smallest=math.sqrt(full * squares.mean(1).min().item()) * (1.0 - rounding),
        largest=_result(torch.logspace(-9, 0, 10_000, dtype=torch.float64) / safety, triples).max().item() * (1.0 + rounding),
    )


def _family(directions: int) -> Tensor:
    """Return (condition numbers, singular values) of matrices of Frobenius norm 1; each value stands for equally many."""
    conditions = torch.linspace(0, math.log(LARGEST_CONDITION), _CONDITIONS, dtype=torch.float64)
    count = min(directions, _SINGULAR_VALUES)
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    values = torch.exp(-conditions[:, None] * places)
    return values / (values.square().mean(1, keepdim=True) * directions).sqrt()


def _result(values: Tensor, triples: tuple[Triple, ...]) -> Tensor:
    """Return the singular values after the Newton-Schulz steps, elementwise."""
    for a, b, c in triples:
        values = a * values + b * values**3 + c * values**5
    return values
