"""Kernels that rules launch, by formula: a term for each operator in the order of the rule's own file.

A rule, or a setting, for which there is no formula here is left out of the count, and named.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from ds_optforge.forecast.forecast import PlannedCall
from ds_optforge.forecast.multi_tensor import multi_tensor_launches
from ds_optforge.orthogonalize import accurate_method, coefficient_set, gram_dtype, uses_gram
from ds_optforge.rules.muon import Muon, Orthogonalization
from ds_optforge.rules.normuon import NorMuon
from ds_optforge.rules.settings import RuleSettings
from ds_optforge.zero.batches import OwnedBatch

# By rule: the number of lists of each foreach operator of a call.
_ELEMENTWISE: Mapping[str, Callable[[bool, RuleSettings], tuple[int, ...]]] = {
    "lion": lambda decays, settings: (3, 1, *((1,) if decays else ()), 2, 2),
    "sgd": lambda decays, settings: (
        *((3,) if getattr(settings, "weight_decay", 0.0) else ()),
        *(1, 2),
        *((3,) if getattr(settings, "nesterov", False) else ()),
        2,
    ),
    "schedule_free_adamw": lambda decays, settings: (1, 3, 2, 1, 1, 3, *((2,) if decays else ()), 2, 2, 2),
}


def counted_alone(settings: RuleSettings) -> bool:
    """Whether there is a formula for the rule with these settings: float32 state, and no cautious decay of AdamW or Lion."""
    known = settings.rule in ("muon", "normuon", "adamw", *_ELEMENTWISE)
    cautious = settings.rule not in ("muon", "normuon") and getattr(settings, "cautious_weight_decay", False)
    return known and not cautious and settings.state_dtype == "float32"


def _decays(settings: RuleSettings) -> bool:
    return bool(getattr(settings, "lr", 0.0) * getattr(settings, "weight_decay", 0.0))


def in_call(settings: RuleSettings, numels: Sequence[int]) -> int:
    """Return the launches of one call of an elementwise rule for tensors of these sizes."""
    if settings.rule == "adamw":  # the counters of its steps made and raised, and the fused kernel
        return 1 + multi_tensor_launches([1] * len(numels), 1) + multi_tensor_launches(numels, 4)
    lists = _ELEMENTWISE[settings.rule](_decays(settings), settings)
    return sum(multi_tensor_launches(numels, count) for count in lists)


def in_direction(settings: RuleSettings, numels: Sequence[int]) -> int:
    """Return the launches of `Muon.direction` for tensors of these sizes."""
    return multi_tensor_launches(numels, 2) + (multi_tensor_launches(numels, 3) if getattr(settings, "nesterov", False) else 0)


def in_apply(settings: RuleSettings, runs: Sequence[int]) -> int:
    """Return the launches of `Muon.apply` for runs of these sizes of equal tensors side by side."""
    descent = multi_tensor_launches(runs, 2)
    if not _decays(settings):
        return descent
    return descent + (5 * len(runs) if getattr(settings, "cautious_weight_decay", False) else 1 + len(runs))


def in_update(call: PlannedCall, batch: OwnedBatch) -> int:
    """Return the launches of `update` of Muon or NorMuon on one batch."""
    rule = call.rule
    assert isinstance(rule, Muon)
    own, narrow = rule.orthogonalization, call.wire_bytes < 4
    wire = torch.bfloat16 if narrow else torch.float32
    scale = own.scale_of(batch.rows, batch.cols, batch.transposed)
    total = int(own.dtype != wire) + orthogonalization_launches(own, batch.rows, batch.cols, call.device)
    if isinstance(rule, NorMuon):
        return total + int(own.dtype != torch.float32) + 14 + (scale != 1.0)
    rounded = scale != torch.tensor(scale, dtype=wire).item()
    return total + int(own.dtype != wire) + int(rounded and narrow) + (scale != 1.0) + 1


def orthogonalization_launches(own: Orthogonalization, rows: int, cols: int, device: str) -> int:
    """Return the launches of orthogonalizing a batch of (rows, cols) matrices on an accelerator, in either form.

    A sum of a product and a matrix is a copy of the matrix and the product.
    """
    chosen = coefficient_set(own.coefficients)
    steps = len(chosen.sequence(own.steps))
    narrow = gram_dtype(own.dtype, device)
    norm = 3 + (chosen.safety != 1.0)  # and the inverse of it
    if not uses_gram(rows, cols, steps, accurate_method(own.method, steps, narrow, chosen.steep)):
        return 2 * (rows > cols) + norm + 1 + 5 * steps
    total = norm + 2 if narrow != own.dtype else norm + 1 + 2 + 2  # X normalised and X X^T; or X X^T normalised, and Z
    for step in range(steps):
        restarts = step % 3 == 2
        total += 3 + 2 * restarts  # the polynomial; Q X and X X^T
        total += step > 0 and not restarts  # Q Z
        total += 2 if step + 1 < steps and (step + 1) % 3 != 2 else 0  # Z R Z
    return total + 1 + (narrow != own.dtype)
