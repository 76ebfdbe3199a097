"""Elementwise steps of flat tensors, in few kernels: decay, descent, products; what rules have in common."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ds_optforge.rules.base import Tensors


def decay(parameters: Tensors, updates: Tensors, rate: float, cautious: bool, active: Tensor | None = None) -> None:
    """Apply decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101) before the update: W <- (1 - rate) W.

    Args:
        parameters: (elements,) each; changed in place.
        updates: (elements,) each; the amounts that will be subtracted. Read only if ``cautious``.
        rate: learning rate times weight decay.
        cautious: whether to decay only the elements with update * W >= 0, for which the update points towards zero too
            (Chen et al. 2025, arXiv 2510.12402; NorMuon's recipe does so).
        active: (parameters,) 0 or 1: 0 leaves a parameter as it is; None counts as all 1.
    """
    if rate == 0:
        return
    if active is None and not cautious:
        # The factor is a tensor, since foreach rounds numbers to the parameters' dtype first.
        torch._foreach_mul_(list(parameters), torch.tensor(1.0 - rate, dtype=torch.float64))
        return
    blocks = side_by_side(parameters, updates if cautious else parameters)
    if not cautious:
        assert active is not None  # seen above
        wide = torch.promote_types(parameters[0].dtype, torch.float32)
        factors = torch.rsub(active.to(wide), 1.0, alpha=rate).view(-1, 1)
        for (weights, _), factor in zip(blocks, torch.split(factors, [len(w) for w, _ in blocks]), strict=True):
            weights.mul_(factor)
        return
    flags = None if active is None else torch.split(active.to(parameters[0].dtype).view(-1, 1), [len(w) for w, _ in blocks])
    for index, (weights, steps) in enumerate(blocks):
        masked = weights * (weights * steps >= 0)
        if flags is not None:
            masked.mul_(flags[index])
        weights.add_(masked, alpha=-rate)


def descend(parameters: Tensors, updates: Tensors, rate: float) -> None:
    """Subtract ``rate`` times the updates, (elements,) each, from the parameters, (elements,) each, in place."""
    blocks = side_by_side(parameters, updates)
    torch._foreach_add_([weights for weights, _ in blocks], [steps for _, steps in blocks], alpha=-rate)


def combine(parameters: Tensors, updates: Tensors, kept: Tensor, taken: Tensor) -> None:
    """Step parameters by a factor of each and one of its update: W <- kept W - taken u.

    Args:
        parameters: (elements,) each; changed in place.
        updates: (elements,) each.
        kept, taken: (parameters,) in float32.
    """
    blocks = side_by_side(parameters, updates)
    counts = [len(weights) for weights, _ in blocks]
    factors = (torch.split(factor.view(-1, 1), counts) for factor in (kept, taken))
    for (weights, steps), one, other in zip(blocks, *factors, strict=True):
        if weights.dtype == one.dtype:
            weights.mul_(one).addcmul_(steps, other, value=-1.0)
        else:  # rounded once
            weights.copy_((weights * one).addcmul_(steps, other, value=-1.0))


def products(first: Tensors, second: Tensors) -> Tensors:
    """Return the products, (elements,) each, of tensors of these sizes, in float32 or wider."""
    wide = torch.promote_types(first[0].dtype, torch.float32)
    return torch._foreach_mul([tensor.to(wide) for tensor in first], [tensor.to(wide) for tensor in second])


def side_by_side(first: Tensors, second: Tensors) -> list[tuple[Tensor, Tensor]]:
    """Put flat tensors that lie side by side in memory, and are alike in size, together.

    Args:
        first: (elements,) each.
        second: (elements,) each, of the same sizes.

    Returns:
        (count, elements) views of both, of as many tensors as are side by side in both, in order.
    """
    starts: list[int] = []
    end: tuple[Any, ...] = ()
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        numel, at, beside = one.numel(), one.storage_offset(), other.storage_offset()
        storages = one.untyped_storage()._cdata, other.untyped_storage()._cdata
        if end != (numel, at, beside, *storages):
            starts.append(index)
        end = (numel, at + numel, beside + numel, *storages)
    counts = [after - start for start, after in pairwise([*starts, len(first)])]
    return [(_block(first[at], count), _block(second[at], count)) for at, count in zip(starts, counts, strict=True)]


def _block(tensor: Tensor, count: int) -> Tensor:
    return tensor.as_strided((count, tensor.numel()), (tensor.numel(), 1))
