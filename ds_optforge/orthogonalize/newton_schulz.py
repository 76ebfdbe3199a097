"""Newton-Schulz orthogonalization of (batches of) matrices, in standard and in Gram form. Pure tensor math.

Standard form: Bernstein & Newhouse 2024 (arXiv 2409.20325), Jordan et al. 2024 (kellerjordan.github.io/posts/muon).
Gram form: Dao et al. 2026 (tridao.me/blog/2026/gram-newton-schulz), which iterates on ``R = X X^T``: a small matrix when X is
long.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ds_optforge.orthogonalize.coefficients import CoefficientSet, Triple, coefficient_set

Method = Literal["auto", "standard", "gram"]


# The Gram form's rounding errors in bfloat16 grow with each step. On matrices with singular values from 1 to 0.01 the largest
# singular value after five quintic steps is 1.4 (1.2 in standard form), after six 3.1, after seven 400.
_GRAM_STEPS_IN_BFLOAT16 = 5


# Elements of the matrices that a processor's cache holds beside their Gram matrices.
_CACHED_NUMEL = 2**19


def restarts(step: int) -> bool:
    """Whether the Gram form recomputes R from X before this step (counted from 0): before steps 2, 5, 8, ...

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
    overwrite: bool = False,
) -> Tensor:
    """Approximate the polar factor ``U V^T`` of each matrix ``U S V^T`` by Newton-Schulz steps.

    One step is ``X <- a X + (b A + c A A) X`` with ``A = X X^T`` and one triple (a, b, c) per step. The start is X divided by
    its Frobenius norm: see `CoefficientSet`.

    Args:
        matrices: (..., rows, cols), any floating dtype. Matrices of a batch do not influence each other.
        coefficients: the name of a set (in `COEFFICIENT_SETS`) or a list of triples.
        steps: the number of steps; None takes the set's own (5 for ``quintic``).
        method: ``standard``, ``gram``, or ``auto``, which takes the form with fewer FLOPs for this shape if that form is
            accurate in ``dtype``.
        dtype: of the matrix products; not float16, but see `gram_dtype`.
        overwrite: whether ``matrices`` may serve as workspace; else they are left unchanged.

    Returns:
        (..., rows, cols) in ``dtype``. A zero matrix stays zero.

    Raises:
        ValueError: fewer than two dimensions, float16, an unknown set, more steps than the set holds, or the Gram form of
            more than five steps in bfloat16 on a CPU.
    """
    if matrices.ndim < 2:
        raise ValueError(f"matrices: got shape {tuple(matrices.shape)}; allowed: (..., rows, cols)")
    if dtype == torch.float16:
        raise ValueError("dtype: got torch.float16, whose range the products leave; allowed: bfloat16, float32, float64")
    chosen = coefficient_set(coefficients)
    triples = chosen.sequence(steps)
    rows, cols = matrices.shape[-2:]
    if matrices.numel() == 0:
        return torch.empty_like(matrices, dtype=dtype)
    batch = matrices.reshape(-1, rows, cols).to(dtype)
    method = accurate_method(method, len(triples), gram_dtype(dtype, batch.device.type), chosen.steep)
    iterate = _gram if uses_gram(rows, cols, len(triples), method) else _standard
    if iterate is _standard and (not batch.is_contiguous() or (not overwrite and batch.data_ptr() == matrices.data_ptr())):
        batch = batch.clone(memory_format=torch.contiguous_format)
    out = torch.empty_like(batch, memory_format=torch.contiguous_format)
    size = at_once(batch)
    for given, result in zip(torch.split(batch, size), torch.split(out, size), strict=True):
        iterate(given, triples, chosen, result)
    return out.reshape(matrices.shape)


def at_once(batch: Tensor) -> int:
    """Return the number of matrices to iterate on together: on a CPU one per thread, or more if they fit its cache; else all.

    (On a CPU, 24 matrices of 512x512 together took 1.4 times as long as two at a time, in one thread.)

    Args:
        batch: (n, rows, cols), not empty.
    """
    if batch.device.type != "cpu":
        return len(batch)
    return max(torch.get_num_threads(), _CACHED_NUMEL // batch[0].numel())


def flops(rows: int, cols: int, steps: int, method: Method = "auto") -> int:
    """Return the FLOPs of orthogonalizing one (rows, cols) matrix: those of the matrix products, 2 n m k each.

    Args:
        rows: of the matrix.
        cols: of the matrix.
        steps: number of Newton-Schulz steps.
        method: ``standard``, ``gram``, or ``auto`` for the smaller of both.
    """
    n, m = min(rows, cols), max(rows, cols)
    standard = steps * (4 * n * n * m + 2 * n**3)
    products, long_products = _gram_products(steps)
    gram = 2 * n * n * m * long_products + 2 * n**3 * products
    return {"standard": standard, "gram": gram, "auto": min(standard, gram)}[method]


def gram_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """Return the dtype of the Gram form's products: that of the matrices, but on accelerators float16 for bfloat16.

    Where cuBLAS adds up a sum in parts, and rounds each to 16 bits, five quintic steps in bfloat16 take the largest singular
    value to 1.8; float16 has eight times the precision and, once X is normalised, the range. (Emulated, up to eight parts: at
    most 1.25 with every set.) A CPU adds up in float32, and is slow in float16.

    Args:
        dtype: of the matrix products.
        device: type of the matrices' device.
    """
    return torch.float16 if dtype == torch.bfloat16 and device != "cpu" else dtype


def accurate_method(method: Method, steps: int, dtype: torch.dtype, steep: bool = False) -> Method:
    """Return ``standard`` for ``auto`` where the Gram form diverges or is inaccurate, and any other method as it is.

    Args:
        method: as configured.
        steps: number of steps; more than five diverge in bfloat16.
        dtype: of the Gram form's products: it is accurate in all but bfloat16.
        steep: see `CoefficientSet.steep`; the Gram form is then inaccurate in bfloat16.

    Raises:
        ValueError: ``gram`` where it diverges.
    """
    diverges = steps > _GRAM_STEPS_IN_BFLOAT16
    if method == "standard" or not (diverges or steep) or dtype != torch.bfloat16:
        return method
    if method == "auto":
        return "standard"
    if diverges:
        raise ValueError(
            f"method: got 'gram' with {steps} steps in {dtype}; allowed: up to {_GRAM_STEPS_IN_BFLOAT16} steps, 'auto', "
            "'standard', or float32"
        )
    return method


def uses_gram(rows: int, cols: int, steps: int, method: Method = "auto") -> bool:
    """Whether `orthogonalize` takes the Gram form for a (rows, cols) matrix, ``steps`` and a ``method`` that is accurate."""
    if method == "auto":
        return flops(rows, cols, steps, "gram") < flops(rows, cols, steps, "standard")
    return method == "gram"


def _gram_products(steps: int) -> tuple[int, int]:
    """Count the products that `_gram` makes: (of n x n by n x n matrices, of n x n by n x m matrices)."""
    small = long = 0
    for step in range(steps):
        fresh = step == 0 or restarts(step)
        long += (1 + (step > 0)) if fresh else 0  # R = X X^T, and X = Q X before a restart
        small += 1 + (not fresh)  # Z; Q Z
        if step + 1 < steps and not restarts(step + 1):
            small += 2  # R Z, Z Y
    return small, long + 1


def _standard(given: Tensor, triples: Sequence[Triple], chosen: CoefficientSet, out: Tensor) -> None:
    """Iterate in standard form on ``given``, (batch, rows, cols), which is overwritten; write to ``out``, of the same shape."""
    tall = given.shape[1] > given.shape[2]
    x = _transposed(given, out.view(given.mT.shape)) if tall else given
    last = given.view(x.shape) if tall else out
    if x.device.type == "cpu":
        gram = torch.bmm(x, x.mT)
        x.mul_(normalise(gram, chosen))
    else:  # reads X once more, and launches half as many kernels
        x.mul_(inverse_norm(x, chosen))
        gram = torch.bmm(x, x.mT)
    polynomial, buffers = torch.empty_like(gram), (last if len(triples) % 2 else torch.empty_like(x), x)
    for step, (a, b, c) in enumerate(triples):
        if step > 0:
            torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)  # b A + c A A
        into = last if step + 1 == len(triples) else buffers[step % 2]
        x = torch.baddbmm(x, polynomial, x, beta=a, out=into)  # a X + B X
    if tall:
        _transposed(x, out)


def _gram(given: Tensor, triples: Sequence[Triple], chosen: CoefficientSet, out: Tensor) -> None:
    """Iterate in Gram form on ``given``, (batch, rows, cols), which is left unchanged; write to ``out``, of the same shape.

    Q accumulates the product of the steps; X <- Q X before a restart.
    """
    x, q, inverse = given, None, None
    narrow = gram_dtype(given.dtype, given.device.type)
    if narrow != given.dtype:
        x = unit(given, chosen, narrow)
    tall = x.shape[1] > x.shape[2]
    r = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
    if x is given:
        inverse = normalise(r, chosen)
    for step, triple in enumerate(triples):
        if q is not None and restarts(step):
            x = torch.bmm(x, q) if tall else torch.bmm(q, x)
            r, q = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT), None
        z = _polynomial(r, triple)
        if step + 1 < len(triples) and not restarts(step + 1):
            r = torch.bmm(torch.bmm(r, z), z)
        if step == 0 and inverse is not None:
            z.mul_(inverse)
        q = z if q is None else torch.bmm(q, z)
    assert q is not None  # at least one triple
    last = (x, q) if tall else (q, x)
    if x.dtype == out.dtype:
        torch.bmm(*last, out=out)
    else:
        out.copy_(torch.bmm(*last))


def unit(given: Tensor, chosen: CoefficientSet, dtype: torch.dtype) -> Tensor:
    """Return X0 = X / (||X||_F * safety + eps) of ``given``, (batch, n, m), in ``dtype``."""
    out = torch.empty_like(given, dtype=dtype, memory_format=torch.contiguous_format)
    return torch.mul(given, inverse_norm(given, chosen), out=out)


def inverse_norm(given: Tensor, chosen: CoefficientSet) -> Tensor:
    """Return the factor from X, (batch, n, m), to X0, (batch, 1, 1) in float32 or wider."""
    wide = torch.promote_types(given.dtype, torch.float32)
    norm = torch.linalg.vector_norm(given, dim=(-2, -1), keepdim=True, dtype=wide)
    return _inverse(norm, chosen)


def _inverse(norm: Tensor, chosen: CoefficientSet) -> Tensor:
    """Turn ||X||_F into 1 / (||X||_F * safety + eps), in place."""
    if chosen.safety != 1.0:
        norm.mul_(chosen.safety)
    return norm.add_(chosen.eps).reciprocal_()


def normalise(gram: Tensor, chosen: CoefficientSet) -> Tensor:
    """Turn ``X X^T``, (batch, n, n), into that of ``X0 = X / (||X||_F * safety + eps)``, in place.

    The norm is the root of the trace, so that X itself is neither read nor written. The factor has the dtype of X, since
    mixed types are slow on a CPU; its rounding, up to 0.2% in bfloat16, only makes the norm of X0 differ from 1.

    Returns:
        The factor from X to X0, (batch, 1, 1).
    """
    wide = torch.promote_types(gram.dtype, torch.float32)
    norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=wide).sqrt_()
    inverse = _inverse(norm, chosen).to(gram.dtype).view(-1, 1, 1)
    gram.mul_(inverse).mul_(inverse)
    return inverse


def _polynomial(gram: Tensor, triple: Triple) -> Tensor:
    """Compute a I + b A + c A A, (batch, n, n), by which a step multiplies X; A is ``gram``."""
    a, b, c = triple
    result = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    result.diagonal(dim1=-2, dim2=-1).add_(a)
    return result


def _transposed(x: Tensor, out: Tensor) -> Tensor:
    """Write the transposes of ``x``, (batch, n, m), to ``out``, (batch, m, n); one by one on a CPU, which is faster there."""
    if x.device.type != "cpu":
        return out.copy_(x.mT)
    for target, source in zip(out, x, strict=True):
        target.copy_(source.mT)
    return out
