"""Refuses matrices of zeros, before their first step, for rules that could never leave zero."""

from collections.abc import Collection

import torch

from ds_optforge.errors import ConfigError
from ds_optforge.step.slices import Slices
from ds_optforge.zero.agreement import sum_over_ranks


def refuse_zeros(slices: Slices, tensors: Collection[int], rule: str) -> None:
    """Raise on every rank if a matrix has no element that is not zero. Collective.

    Args:
        slices: the group's tensors.
        tensors: numbers of those that are looked at.
        rule: name of the rule.

    Raises:
        ConfigError: names the matrices.
    """
    placement, binding = slices.placement, slices.binding
    found = torch.zeros(len(placement.layout.matrices), dtype=torch.float32, device=binding.device)
    flat = [tensor.detach().reshape(-1) for tensor in slices.tensors]
    fragments = placement.layout.fragments(placement.rank)
    views, matrices = [], []
    for fragment in fragments:
        lies = placement.range_of(fragment)
        if lies.tensor in tensors:
            views.append(flat[lies.tensor].narrow(0, lies.within.start, lies.within.numel))
            matrices.append(fragment.matrix)
        else:
            found[fragment.matrix] = 1.0
    if views:
        largest = torch.stack(torch._foreach_norm(views, float("inf")))  # squares of small values would be zero
        found[torch.tensor(matrices, device=found.device)] = largest.ne(0).to(found)
    sum_over_ranks(found, binding)
    zeros = [placement.layout.describe(index) for index in found.eq(0).nonzero().flatten().tolist()]
    if zeros:
        more = f" and {len(zeros) - 3} more" if len(zeros) > 3 else ""
        raise ConfigError(
            f"{', '.join(zeros[:3])}{more}: got zeros with rule '{rule}', which keeps the norm with which a matrix starts; "
            "allowed: initial values that are not all zero, or another rule for it, by 'overrides'"
        )
