"""Coefficients (a, b, c) of the Newton-Schulz step ``X <- a X + (b A + c A A) X``, with ``A = X X^T``. Data only.

A set either repeats one triple for any number of steps, or is a sequence that was designed as a whole: its prefixes are
usable, but not more steps than it holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat

Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class CoefficientSet:
    """A sequence of Newton-Schulz triples and the normalisation that it was designed for.

    The start is ``X0 = G / (||G||_F * safety + eps)``.

    Attributes:
        triples: (a, b, c) of each step; their number is the default number of steps.
        repeats: whether the last triple may be repeated for any number of steps.
        safety: factor of the Frobenius norm.
        eps: added to the norm.
    """

    triples: tuple[Triple, ...]
    repeats: bool = False
    safety: float = 1.0
    eps: float = 1e-7

    @property
    def steep(self) -> bool:
        """Whether small singular values rise so fast that the Gram form is inaccurate in bfloat16.

        Measured on matrices of low rank: sets whose first coefficient is at most 4.1 keep their range; of those above 8,
        ``cans`` takes a direction to 0.23 (exact: 0.84) and ``polar_express`` the largest singular value to 1.6 (exact:
        1.14).
        """
        return max(a for a, _, _ in self.triples) > 5.0

    def sequence(self, steps: int | None) -> tuple[Triple, ...]:
        """Return the triples of ``steps`` steps; None takes the set's own number.

        Raises:
            ValueError: fewer than one step, or more than the set holds unless it repeats.
        """
        if steps is None or steps == len(self.triples):
            return self.triples
        if steps < 1:
            raise ValueError(f"steps: got {steps}; allowed: an integer of at least 1")
        if steps > len(self.triples) and not self.repeats:
            raise ValueError(f"steps: got {steps}; allowed: 1 to {len(self.triples)}, the length of this coefficient set")
        return tuple(triple for triple, _ in zip(chain(self.triples, repeat(self.triples[-1])), range(steps), strict=False))


def _with_margin(triples: tuple[Triple, ...], margin: float) -> tuple[Triple, ...]:
    """Replace p(x) by p(x / margin) in every step but the last: room for bfloat16's rounding where p is steep beyond 1."""
    return tuple((a / margin, b / margin**3, c / margin**5) for a, b, c in triples[:-1]) + triples[-1:]


_QUINTIC: Triple = (3.4445, -4.7750, 2.0315)

COEFFICIENT_SETS: dict[str, CoefficientSet] = {
    # Keller Jordan, https://kellerjordan.github.io/posts/muon/ ; the steepest slope at zero, range about [0.7, 1.2].
    "quintic": CoefficientSet((_QUINTIC,) * 5, repeats=True),
    # Amsel et al. 2025, arXiv 2505.16932, Algorithm 1 with safety factor 2e-2 and cushion 2: minimax-optimal per step.
    "polar_express": CoefficientSet(
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        safety=1.02,
        eps=1e-6,
    ),
    # YouJiacheng, https://x.com/YouJiacheng/status/1905861218138804534 : one triple per step, found by search.
    "you": CoefficientSet(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        )
    ),
    # Grishina et al. 2025, arXiv 2506.10935 (CANS): Chebyshev-accelerated Newton-Schulz. Its first
    # step maps to the very edge of what the second one accepts, so without a margin bfloat16 diverges.
    "cans": CoefficientSet(
        _with_margin(
            (
                (8.4703, -25.1081, 18.6293),
                (4.1828, -3.1087, 0.5806),
                (3.9619, -2.9541, 0.5630),
                (3.2866, -2.4647, 0.5074),
                (2.2737, -1.6447, 0.4162),
            ),
            margin=1.02,
        ),
    ),
    # DeepSeek-V4: eight steep steps, then two that converge to 1 (singular values within 5e-4).
    "deepseek_v4": CoefficientSet((_QUINTIC,) * 8 + ((2.0, -1.5, 0.5),) * 2),
    # bfm's `orthogonalize`: a gentler triple, ten steps.
    "bfm": CoefficientSet(((3.0, -3.2, 1.2),) * 10, repeats=True, eps=1e-8),
}


def coefficient_set(coefficients: str | Sequence[Sequence[float]]) -> CoefficientSet:
    """Return the set named ``coefficients``, or make one from a sequence of (a, b, c) triples (a single one repeats).

    Raises:
        ValueError: a name that is not in `COEFFICIENT_SETS`, or a sequence that is not one of triples.
    """
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENT_SETS:
            raise ValueError(
                f"coefficients: got {coefficients!r}; allowed: {', '.join(COEFFICIENT_SETS)}, or a list of triples"
            )
        return COEFFICIENT_SETS[coefficients]
    triples = [tuple(float(value) for value in triple) for triple in coefficients]
    if not triples or any(len(triple) != 3 for triple in triples):
        raise ValueError(f"coefficients: got {coefficients!r}; allowed: a non-empty list of triples [a, b, c]")
    return CoefficientSet(tuple((a, b, c) for a, b, c in triples), repeats=len(triples) == 1)
