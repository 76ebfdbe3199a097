"""The rows of a bucket's matrices that a step updates, where a rule chooses some of them (see `ds_optforge.rules.base.Choice`).

The sum by which they are chosen is the same on all ranks, so that each rank makes the same choice by itself, whatever it holds.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ds_optforge.rules.base import Choice
from ds_optforge.step.sums import BucketSums
from ds_optforge.zero.exchange import BucketExchange, MatrixBatch
from ds_optforge.zero.views import Views


class ChosenRows:
    """The chosen rows of one bucket. In each step `mark` comes for all portions, then `send`, then `take` and `spread`.

    Args:
        choice: of the rule.
        exchange: of the bucket.
        sums: of the bucket; the rule's choice is made in it.
    """

    def __init__(self, choice: Choice, exchange: BucketExchange, sums: BucketSums) -> None:
        self._choice, self._exchange, self._sums = choice, exchange, sums
        self._sent: Tensor | None = None

    def mark(self, places: Views, flags: Sequence[Tensor]) -> None:
        """Note which elements of the send buffer are in chosen rows, if the bucket travels.

        Args:
            places: of the elements in the send buffer.
            flags: (elements,) each, not 0 in a chosen row.
        """
        if self._exchange.packing is None:
            return
        if self._sent is None:
            self._sent = self._exchange.nothing_chosen()
        torch._foreach_copy_(places.of([self._sent]), list(flags))

    def send(self) -> None:
        """Let the chosen rows alone travel, if the bucket travels. Waits for the device then."""
        if self._exchange.packing is None:
            return
        sent = self._exchange.nothing_chosen() if self._sent is None else self._sent
        self._exchange.choose(sent, [self._flags(index) for index in self._exchange.batches])
        self._sent = None

    def _flags(self, index: int) -> Tensor:
        return self._sums.of_matrices(self._exchange.stored(index))[self._choice.by]

    def take(self, index: int, whole: MatrixBatch) -> tuple[MatrixBatch, Tensor]:
        """Return the chosen rows of batch ``index``, and their numbers, (n, count), in order."""
        flags = self._exchange.rows_of_parts(index, self._flags(index))
        numbers = flags.sort(dim=1, descending=True, stable=True).indices[:, : self._choice.count(flags.shape[1])]
        dim, places = _places(numbers, whole)
        statistics = tuple(values.gather(1, numbers) if values.shape[1] > 1 else values for values in whole.statistics)
        return replace(whole, matrices=whole.matrices.gather(dim, places), statistics=statistics), numbers

    def spread(self, updates: Tensor, numbers: Tensor, chosen: MatrixBatch, whole: MatrixBatch) -> Tensor:
        """Return the updates of the whole matrices, zeros but for the chosen rows; writes these rows' statistics back."""
        for values, advanced in zip(whole.statistics, chosen.statistics, strict=True):
            if advanced is not values:
                values.scatter_(1, numbers, advanced)
        dim, places = _places(numbers, whole)
        return updates.new_zeros(whole.matrices.shape).scatter_(dim, places, updates)


def _places(numbers: Tensor, whole: MatrixBatch) -> tuple[int, Tensor]:
    """Return the dimension of the output rows, and their numbers for each element that is gathered along it."""
    count, rows, cols = whole.matrices.shape
    if whole.transposed:
        return 2, numbers.unsqueeze(1).expand(count, rows, numbers.shape[1])
    return 1, numbers.unsqueeze(2).expand(count, numbers.shape[1], cols)
