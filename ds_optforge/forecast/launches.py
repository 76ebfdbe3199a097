"""Kernels that one rank's step launches on an accelerator, by formula.

They are counted as `tests/launches.py` counts those of real steps on the meta device: by PyTorch's own rules for CUDA
(ATen/native/cuda: MultiTensorApply.cuh, ForeachUtils.h), without collectives. No GPU has confirmed them. CUDA 13 has room for
seven times as many tensors and blocks in a launch, so that it makes fewer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ds_optforge.forecast.forecast import Forecast, PlannedCall
from ds_optforge.forecast.multi_tensor import copy_launches, multi_tensor_launches
from ds_optforge.forecast.rule_launches import counted_alone, in_apply, in_call, in_direction, in_update
from ds_optforge.rules.base import ElementwiseRule, MatrixRule
from ds_optforge.step.bind import elementwise_spans, pack, portion_of
from ds_optforge.step.slices import Portion, chunk_numel
from ds_optforge.zero.batches import OwnedBatch, batches_of
from ds_optforge.zero.buckets import RankBucket, exchange_buckets, local_buckets
from ds_optforge.zero.placement import Placement


@dataclass(frozen=True, slots=True)
class Launches:
    """The kernels of a step of ``gather`` on one rank.

    Attributes:
        rank: the one that orthogonalizes most.
        kernels: that it launches.
        uncounted: names of rules, or of rules with settings, for which there is no formula; nothing of them is counted.
    """

    rank: int
    kernels: int
    uncounted: tuple[str, ...]


def step_launches(predicted: Forecast) -> Launches:
    """Count the kernels of a steady step of ``gather`` on the rank with the most FLOPs."""
    rank = max(range(len(predicted.ranks)), key=lambda each: predicted.ranks[each].flops)
    kernels, uncounted = 0, set()
    for call in predicted.calls:
        around = len(call.buffers) > len(call.rule.buffers)  # something around the rule
        if not counted_alone(call.settings) or around or call.rows or (call.plan and call.plan.teams):
            uncounted.add(call.settings.rule)
        elif isinstance(call.rule, MatrixRule):
            kernels += _matrix_launches(call, rank // call.siblings)
        else:
            kernels += _elementwise_launches(call, rank // call.siblings)
    return Launches(rank, kernels, tuple(sorted(uncounted)))


def _elementwise_launches(call: PlannedCall, rank: int) -> int:
    assert isinstance(call.rule, ElementwiseRule)
    held = Placement(call.layout, rank, (0,)).held_fragments()
    spans = elementwise_spans(held, [call.slice_numel], torch.device(call.device), call.rule, call.settings.state_dtype)
    return sum(in_call(call.settings, [span.within.numel for span in each]) for each in spans)


def _matrix_launches(call: PlannedCall, rank: int) -> int:
    assert call.plan is not None
    assert isinstance(call.rule, MatrixRule)
    numel = call.plan.local_numel(call.device)
    placement = Placement(call.layout, rank, (0,))
    total = 0
    for own in (*exchange_buckets(call.plan, rank, call.kept), *local_buckets(call.plan, rank, numel, call.kept)):
        places = tuple(placement.range_of(fragment) for fragment in own.fragments)
        packed = pack(call.layout, own, places, chunk_numel(torch.device(call.device)))
        bucket = _Bucket(call, own, batches_of(call.layout, own, numel), [portion_of(items) for items in packed])
        total += bucket.collected() + bucket.updated() + bucket.applied()
    return total


@dataclass(frozen=True, slots=True)
class _Bucket:
    """One bucket of one rank: the terms are in the order of `ds_optforge.step.group_step` and `zero.exchange`."""

    call: PlannedCall
    own: RankBucket
    batches: Sequence[OwnedBatch]
    portions: Sequence[Portion]

    @property
    def _sent_values(self) -> list[int]:
        return self._values(range(len(self.own.sent)), sent=True)

    def _values(self, places: Iterable[int], sent: bool) -> list[int]:
        """Elements of the statistics' bit patterns of fragments."""
        found = self.own.sent if sent else self.own.received
        return [values.within.numel * self.own.kept.words for place in places for values in found[place].statistics]

    def collected(self) -> int:
        """Launches from the gradients to the owned matrices' flags."""
        total = 0
        for portion in self.portions:
            total += in_direction(self.call.settings, [span.within.numel for span in portion.spans])
            total += copy_launches(portion.sizes)
        if self.own.fragments:
            norms = multi_tensor_launches([fragment.numel for fragment in self.own.fragments], 1) + 2
            total += norms + 2 + 1  # stacked, compared, and put in their places
        total += copy_launches(self._sent_values)
        if self.own.receive_numel:
            total += 1
            flags = [sum(1 for slot, _ in batch.flags if slot == each) for batch in self.batches for each in range(batch.count)]
            total += 2 if max(flags, default=1) > 1 else 0
        return total

    def updated(self) -> int:
        """Launches from the owned matrices to their updates in the buffer that returns."""
        of_matrix: dict[int, list[int]] = {}
        for number, place in enumerate(self.own.received):
            of_matrix.setdefault(place.matrix, []).append(number)
        total = 0
        for batch in self.batches:
            places = [number for matrix in batch.numbers for number in of_matrix[matrix]]
            sizes = [self.own.received[number].within.numel for number in places]
            values = copy_launches(self._values(places, sent=False))
            total += values + in_update(self.call, batch) + values
            total += 1 if batch.start >= 0 else 2 * copy_launches(sizes)
        return total

    def applied(self) -> int:
        """Launches from the returned updates to the weights."""
        total = copy_launches(self._sent_values)
        if self.own.send_numel:
            total += 1 + (self.call.wire_bytes < 4)
        for portion in self.portions:
            runs = _runs(portion)
            total += copy_launches(portion.sizes) + in_apply(self.call.settings, runs)
        return total


def _runs(portion: Portion) -> list[int]:
    """Elements of each run of equal items that lie side by side: see `ds_optforge.rules.flat.side_by_side`."""
    places: list[tuple[int, int]] = []  # (start, numel) of each item
    for span in portion.spans:
        start = span.within.start
        for numel in span.sizes:
            places.append((start, numel))
            start += numel
    runs = [places[0][1]]
    for (start, numel), (after, following) in pairwise(places):
        if start + numel == after and numel == following:
            runs[-1] += numel
        else:
            runs.append(following)
    return runs
