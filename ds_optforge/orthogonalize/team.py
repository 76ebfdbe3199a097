"""Newton-Schulz orthogonalization of one matrix by several ranks, a *team*. Pure tensor math: the caller brings the collective.

Each member computes some rows of every matrix product, and fetches the other rows where the next product needs them. No sum
is cut: an element of a product is the same dot product of the same rounded numbers as where one rank computes all of it, and
its additions come in the order in which the library's kernel for that shape makes them. A method other than the one-rank one
(or partial sums, which would be half as many bytes for a long matrix) would round otherwise.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from ds_optforge.orthogonalize.coefficients import CoefficientSet, Triple, coefficient_set
from ds_optforge.orthogonalize.newton_schulz import (
    Method,
    accurate_method,
    flops,
    gram_dtype,
    inverse_norm,
    normalise,
    restarts,
    unit,
    uses_gram,
)


class Team(Protocol):
    """The ranks that orthogonalize one matrix together, as one of them sees them."""

    @property
    def place(self) -> int:
        """The number of this member."""

    @property
    def rows(self) -> Sequence[int]:
        """Stored rows of the result that each member computes, from the first row on."""

    def gather(self, whole: Tensor, counts: Sequence[int]) -> None:
        """Fill ``whole``, (1, n, m), of which this member has written its own rows. Collective over the team.

        Args:
            whole: contiguous.
            counts: rows of each member, from the first row on; n in all.
        """


@torch.no_grad()
def orthogonalize_rows(
    matrix: Tensor,
    team: Team,
    coefficients: str | Sequence[Sequence[float]] = "quintic",
    steps: int | None = None,
    method: Method = "auto",
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Compute this member's rows of what `orthogonalize` makes of one matrix, by the same method. Collective over the team.

    Args:
        matrix: (1, rows, cols), the whole matrix, the same on all members; it may be overwritten.
        team: the ranks that compute it together.
        coefficients, steps, method, dtype: as in `orthogonalize`.

    Returns:
        (1, own rows, cols) in ``dtype``.

    Raises:
        ValueError: see `orthogonalize`.
    """
    chosen = coefficient_set(coefficients)
    triples = chosen.sequence(steps)
    rows, cols = matrix.shape[-2:]
    given = matrix.to(dtype)
    method = accurate_method(method, len(triples), gram_dtype(given.dtype, given.device.type), chosen.steep)
    iterate = _gram if uses_gram(rows, cols, len(triples), method) else _standard
    return iterate(given, triples, chosen, team)


def team_cost(rows: int, cols: int, steps: int, method: Method, blocks: Sequence[int]) -> tuple[int, int, int]:
    """Count what `orthogonalize_rows` costs a member.

    Args:
        rows: of the matrix.
        cols: of the matrix.
        steps: number of Newton-Schulz steps.
        method: one that is accurate.
        blocks: stored rows of each member.

    Returns:
        (FLOPs of the member with most rows; calls of `Team.gather`; elements of the tensors that these fill).
    """
    n, m = min(rows, cols), max(rows, cols)
    tall = rows > cols
    own = -(-flops(rows, cols, steps, method) * max(blocks) // rows)
    if not uses_gram(rows, cols, steps, method):
        # A in each step, X after each but the last; of a tall matrix the last polynomial, as its result is cut along m.
        return own, 2 * steps - 1 + tall, steps * n * n + (steps - 1) * n * m + tall * n * n
    again = sum(restarts(step) for step in range(steps))
    polynomials = sum(_needs_polynomial(step, steps) for step in range(steps))
    # R in each step, Z where a product follows, X at a restart; of a tall matrix Q at a restart and at the end.
    squares = steps + polynomials + tall * (again + 1)
    return own, squares + again, squares * n * n + again * n * m


def _is_fresh(step: int) -> bool:
    """Whether R comes from X in this step of the Gram form, so that Q begins anew."""
    return step == 0 or restarts(step)


def _goes_on(step: int, steps: int) -> bool:
    """Whether the next step of the Gram form takes its R from this one's."""
    return step + 1 < steps and not restarts(step + 1)


def _needs_polynomial(step: int, steps: int) -> bool:
    """Whether this step of the Gram form multiplies by the whole polynomial."""
    return _goes_on(step, steps) or not _is_fresh(step)


def _standard(given: Tensor, triples: Sequence[Triple], chosen: CoefficientSet, team: Team) -> Tensor:
    """Iterate in standard form on ``given``, (1, rows, cols), which is overwritten; return this member's stored rows."""
    tall = given.shape[1] > given.shape[2]
    x = given.mT.contiguous() if tall else given
    counts = _even(x.shape[1], len(team.rows)) if tall else team.rows
    own = _block(counts, team.place)
    normalised_first = x.device.type != "cpu"  # as in the form for one rank, with which this is to agree
    if normalised_first:
        x.mul_(inverse_norm(x, chosen))
    gram, other = x.new_empty(1, x.shape[1], x.shape[1]), torch.empty_like(x)
    polynomial = torch.empty_like(gram)
    for step, (a, b, c) in enumerate(triples):
        torch.bmm(x.narrow(1, *own), x.mT, out=gram.narrow(1, *own))
        team.gather(gram, counts)
        if step == 0 and not normalised_first:
            x.mul_(normalise(gram, chosen))
        mine = gram.narrow(1, *own)
        torch.baddbmm(mine, mine, gram, beta=b, alpha=c, out=polynomial.narrow(1, *own))  # b A + c A A
        if step + 1 == len(triples):
            break
        torch.baddbmm(x.narrow(1, *own), polynomial.narrow(1, *own), x, beta=a, out=other.narrow(1, *own))  # a X + B X
        team.gather(other, counts)
        x, other = other, x
    if not tall:
        return torch.baddbmm(x.narrow(1, *own), polynomial.narrow(1, *own), x, beta=a)
    team.gather(polynomial, counts)
    stored = x.narrow(2, *_block(team.rows, team.place))
    return torch.baddbmm(stored, polynomial, stored, beta=a).mT.contiguous()


def _gram(given: Tensor, triples: Sequence[Triple], chosen: CoefficientSet, team: Team) -> Tensor:
    """Iterate in Gram form on ``given``, (1, rows, cols), which is left unchanged; return this member's stored rows."""
    x, inverse, steps = given, None, len(triples)
    narrow = gram_dtype(given.dtype, given.device.type)
    if narrow != given.dtype:
        x = unit(given, chosen, narrow)
    tall = x.shape[1] > x.shape[2]
    short = min(x.shape[1:])
    counts = _even(short, len(team.rows)) if tall else team.rows
    own = _block(counts, team.place)
    r, z, q = (x.new_empty(1, short, short) for _ in range(3))
    mine = q.narrow(1, *own)  # of Q; only of a tall matrix a product needs the rest
    for step, triple in enumerate(triples):
        if _is_fresh(step):
            if step > 0:
                x = _multiplied(x, q, counts, team)
                team.gather(x, team.rows)
            across = x.narrow(2, *own).mT if tall else x.narrow(1, *own)
            torch.bmm(across, x if tall else x.mT, out=r.narrow(1, *own))
            team.gather(r, counts)
            if step == 0 and x is given:
                inverse = normalise(r, chosen)
        of_z = _polynomial_rows(r, own, triple, z)
        if _needs_polynomial(step, steps):
            team.gather(z, counts)
        factor = of_z if _is_fresh(step) else torch.bmm(mine, z)
        mine.copy_(factor * inverse if step == 0 and inverse is not None else factor)
        if _goes_on(step, steps):
            r = _next_gram(r, z, own)
            team.gather(r, counts)
    last = _multiplied(x, q, counts, team)
    return last.narrow(1, *_block(team.rows, team.place)).to(given.dtype)


def _polynomial_rows(gram: Tensor, own: tuple[int, int], triple: Triple, out: Tensor) -> Tensor:
    """Write this member's rows of a I + b A + c A A to ``out``, (1, n, n), and return a view of them; A is ``gram``."""
    a, b, c = triple
    rows, result = gram.narrow(1, *own), out.narrow(1, *own)
    torch.baddbmm(rows, rows, gram, beta=b, alpha=c, out=result)
    result.diagonal(offset=own[0], dim1=-2, dim2=-1).add_(a)
    return result


def _next_gram(r: Tensor, z: Tensor, own: tuple[int, int]) -> Tensor:
    """Return R Z Z, (1, n, n), of which only this member's rows are computed."""
    result = torch.empty_like(r)
    torch.bmm(torch.bmm(r.narrow(1, *own), z), z, out=result.narrow(1, *own))
    return result


def _multiplied(x: Tensor, q: Tensor, counts: Sequence[int], team: Team) -> Tensor:
    """Return Q X, or X Q of a tall X, like ``x``, of which only this member's stored rows are computed."""
    result = torch.empty_like(x)
    stored = _block(team.rows, team.place)
    if x.shape[1] > x.shape[2]:
        team.gather(q, counts)
        torch.bmm(x.narrow(1, *stored), q, out=result.narrow(1, *stored))
    else:
        torch.bmm(q.narrow(1, *stored), x, out=result.narrow(1, *stored))
    return result


def _even(count: int, members: int) -> list[int]:
    """Cut ``count`` rows as evenly as possible."""
    return [count * (member + 1) // members - count * member // members for member in range(members)]


def _block(counts: Sequence[int], place: int) -> tuple[int, int]:
    """Return (first, number) of the rows of one member."""
    return list(accumulate(counts, initial=0))[place], counts[place]
