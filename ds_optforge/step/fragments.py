"""What a step reads from gradients, and makes of updates, fragment by fragment."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_optforge.rules.flat import side_by_side


def flat_gradient(tensor: Tensor) -> Tensor:
    """Return the gradient of a tensor, (elements,) and dense, in its dtype; zeros where it has none."""
    if tensor.grad is None:
        return torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    gradient = tensor.grad.to_dense() if tensor.grad.is_sparse else tensor.grad
    return gradient.reshape(-1).to(tensor.dtype)


def nonzero(fragments: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return (fragments,) flags in ``dtype``: 1 where the norm in float32 is not zero (NaN counts as not zero), else 0."""
    if not fragments:
        return torch.empty(0, dtype=dtype)
    norms = torch.stack(torch._foreach_norm(list(fragments)))
    return torch.ne(norms, 0, out=torch.empty_like(norms, dtype=dtype))


def scale_to(updates: Sequence[Tensor], norms: Tensor) -> None:
    """Scale each update in place to its Frobenius norm in ``norms``; zeros stay zeros.

    Args:
        updates: (elements,) each.
        norms: (updates,) in float32.
    """
    found = torch.stack(torch._foreach_norm(list(updates), dtype=torch.float32))
    factors = torch.where(found > 0, norms / found, torch.zeros_like(found))
    blocks = [block for block, _ in side_by_side(updates, updates)]
    for block, of_block in zip(blocks, torch.split(factors.view(-1, 1), [len(block) for block in blocks]), strict=True):
        block.mul_(of_block)
