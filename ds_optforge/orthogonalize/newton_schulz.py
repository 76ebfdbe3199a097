"""Newton-Schulz orthogonalization of (batches of) matrices, in standard and in Gram form. Pure tensor math.

Standard form: Bernstein & Newhouse 2024 (arXiv 2409.20325), Jordan et al. 2024 (kellerjordan.github.io/posts/muon).
Gram form: Dao et al., tridao.me/blog/2026/gram-newton-schulz: the iteration runs on ``R = X X^T``, which is small when the
matrix is long.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ds_optforge.orthogonalize.coefficients import CoefficientSet, Triple, coefficient_set

Method = Literal["auto", "standard", "gram"]


def _restarts(step: int) -> bool:
    """Whether the Gram form starts afresh from X before this step (counted from 0): before 2, 5, 8, ...

    R squares the condition number and each step multiplies its rounding errors, so more than three steps on one R
    diverge in bfloat16.
    """
    return step % 3 == 2


@torch.no_grad()
def orthogonalize(
    matrices: Tensor,
    coefficients: str | Sequence[Sequence[float]] = "quintic",
    steps: int | None = None,
    method: Method = "auto",
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Approximate the polar factor ``U V^T`` of each matrix ``U S V^T``.

    Args:
        matrices: (..., rows, cols), any floating dtype; left unchanged. Matrices of a batch do not influence each other.
        coefficients: the name of a set (in `COEFFICIENT_SETS`) or a list of triples.
        steps: the number of steps; None takes the set's own (5 for ``quintic``).
        method: ``auto`` takes the form that needs fewer FLOPs for this shape, if it is accurate in ``dtype``.
        dtype: of the matrix products. The norm that scales the start is computed in float32 or wider.

    Returns:
        (..., rows, cols) in ``dtype``. A zero matrix stays zero.

    Raises:
        ValueError: fewer than two dimensions, an unknown set, more steps than the set holds, or the Gram form of a steep set
            in 16 bits.
    """
    if matrices.ndim < 2:
        raise ValueError(f"matrices: got shape {tuple(matrices.shape)}; allowed: (..., rows, cols)")
    chosen = coefficient_set(coefficients)
    triples = chosen.sequence(steps)
    rows, cols = matrices.shape[-2:]
    batch = matrices.reshape(-1, rows, cols)
    if rows > cols:
        batch = batch.mT  # iterate on the short side
    x = _normalised(batch, chosen.safety, chosen.eps, dtype)
    method = accurate_method(method, chosen, dtype)
    x = _gram(x, triples) if uses_gram(rows, cols, len(triples), method) else _standard(x, triples)
    return (x.mT if rows > cols else x).reshape(matrices.shape)


def flops(rows: int, cols: int, steps: int, method: Method = "auto") -> int:
    """Floating-point operations of orthogonalizing one (rows, cols) matrix, matrix products alone."""
    n, m = min(rows, cols), max(rows, cols)
    standard = steps * (4 * n * n * m + 2 * n**3)
    products, long_products = _gram_products(steps)
    gram = 2 * n * n * m * long_products + 2 * n**3 * products
    return {"standard": standard, "gram": gram, "auto": min(standard, gram)}[method]


def accurate_method(method: Method, coefficients: CoefficientSet, dtype: torch.dtype) -> Method:
    """``auto`` leaves the Gram form out where it would diverge. Raises ValueError where it was asked for by name."""
    if method == "standard" or not coefficients.steep or torch.finfo(dtype).bits >= 32:
        return method
    if method == "gram":
        raise ValueError(f"method: got 'gram' with steep coefficients in {dtype}; allowed: 'auto', 'standard', or float32")
    return "standard"


def uses_gram(rows: int, cols: int, steps: int, method: Method = "auto") -> bool:
    """Whether ``orthogonalize`` takes the Gram form for this shape."""
    if method == "auto":
        return flops(rows, cols, steps, "gram") < flops(rows, cols, steps, "standard")
    return method == "gram"


def _gram_products(steps: int) -> tuple[int, int]:
    """(n x n by n x n products, n x n by n x m products) of the Gram form, as `_gram` below makes them."""
    small = long = 0
    for step in range(steps):
        fresh = step == 0 or _restarts(step)
        long += (1 + (step > 0)) if fresh else 0  # R = X X^T, and X = Q X before a restart
        small += 1 + (not fresh)  # Z; Q Z
        if step + 1 < steps and not _restarts(step + 1):
            small += 2  # R Z, Z Y
    return small, long + 1


def _normalised(batch: Tensor, safety: float, eps: float, dtype: torch.dtype) -> Tensor:
    """``batch / (||batch||_F * safety + eps)`` per matrix as a new contiguous tensor in ``dtype``, in one pass."""
    wide = torch.promote_types(batch.dtype, torch.float32)
    inverse = torch.linalg.vector_norm(batch, dim=(-2, -1), keepdim=True, dtype=wide).mul_(safety).add_(eps).reciprocal_()
    return torch.mul(batch, inverse, out=torch.empty(batch.shape, dtype=dtype, device=batch.device))


def _standard(x: Tensor, triples: Sequence[Triple]) -> Tensor:
    """x: (batch, n, m) with n <= m, consumed."""
    spare = torch.empty_like(x)
    gram = x.new_empty(x.shape[0], x.shape[1], x.shape[1])
    polynomial = torch.empty_like(gram)
    for a, b, c in triples:
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)  # b A + c A A
        torch.baddbmm(x, polynomial, x, beta=a, out=spare)  # a X + B X
        x, spare = spare, x
    return x


def _gram(x: Tensor, triples: Sequence[Triple]) -> Tensor:
    """x: (batch, n, m) with n <= m, consumed. Accumulates the product Q of all steps, X = Q X at the end."""
    q: Tensor | None = None
    r = torch.bmm(x, x.mT)
    for step, (a, b, c) in enumerate(triples):
        if q is not None and _restarts(step):
            x = torch.bmm(q, x)
            r, q = torch.bmm(x, x.mT), None
        z = torch.baddbmm(r, r, r, beta=b, alpha=c)  # b R + c R R
        if q is None:
            q = z.clone()
            q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            q = torch.baddbmm(q, q, z, beta=a)  # Q (Z + a I)
        if step + 1 < len(triples) and not _restarts(step + 1):
            y = torch.baddbmm(r, r, z, beta=a)  # R (Z + a I)
            r = torch.baddbmm(y, z, y, beta=a)  # (Z + a I) R (Z + a I)
    assert q is not None  # at least one triple
    return torch.bmm(q, x)
