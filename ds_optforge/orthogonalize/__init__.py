"""Newton-Schulz orthogonalization: coefficients (data) and the iteration (tensor math)."""

from ds_optforge.orthogonalize.bounds import Healthy, healthy
from ds_optforge.orthogonalize.coefficients import COEFFICIENT_SETS, CoefficientSet, coefficient_set
from ds_optforge.orthogonalize.newton_schulz import (
    Method,
    accurate_method,
    at_once,
    flops,
    gram_dtype,
    orthogonalize,
    uses_gram,
)
from ds_optforge.orthogonalize.team import Team, orthogonalize_rows, team_cost

__all__ = [
    "COEFFICIENT_SETS",
    "CoefficientSet",
    "Healthy",
    "Method",
    "Team",
    "accurate_method",
    "at_once",
    "coefficient_set",
    "flops",
    "gram_dtype",
    "healthy",
    "orthogonalize",
    "orthogonalize_rows",
    "team_cost",
    "uses_gram",
]
