"""Sums over whole matrices and whole output rows of which ranks hold fragments.

Each rank adds up its fragments in float64, one all-reduce per bucket adds up the ranks, and the result is rounded to
float32: it does not depend on ZeRO's cuts. Nothing is sent for matrices that do not travel.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_optforge.rules.base import Choice, Sum
from ds_optforge.step.chooser import Chooser
from ds_optforge.zero.agreement import sum_over_ranks
from ds_optforge.zero.buckets import RankBucket
from ds_optforge.zero.layout import Binding
from ds_optforge.zero.partition import Matrix, PartitionLayout, Range


class BucketSums:
    """The sums of one bucket. There are two kinds: of the gradients, and of the updates (``of_update``).

    For each kind `begin` comes first, then `add` for everything that this rank holds, then `finish`.

    Args:
        sums: of the rule.
        layout: of the group.
        bucket: this rank's share of the bucket.
        binding: tells the process group and the device.
        choice: of the rule: what is found for its sum is whether a row is chosen, 1 or 0.
    """

    def __init__(
        self,
        sums: Sequence[Sum],
        layout: PartitionLayout,
        bucket: RankBucket,
        binding: Binding,
        choice: Choice | None = None,
    ) -> None:
        self._layout, self._binding, self._travels = layout, binding, bucket.travels
        self.sums = tuple(sums)
        self._starts: dict[str, dict[int, int]] = {}  # by sum and matrix: where its values begin in the kind's vector
        self._numel = {False: 0, True: 0}  # of the vector, by kind
        for item in sums:
            self._starts[item.name] = {}
            for index in bucket.matrices:
                self._starts[item.name][index] = self._numel[item.of_update]
                self._numel[item.of_update] += layout.matrices[index].values(item.per)
        self._chooser = Chooser(choice, layout, self._starts[choice.by], binding.device) if choice else None
        self._totals = torch.empty(0, dtype=torch.float64)
        self._found: dict[bool, Tensor] = {}

    def of(self, of_update: bool) -> tuple[Sum, ...]:
        """Return the sums of the updates (``of_update``), or those of the gradients."""
        return tuple(item for item in self.sums if item.of_update == of_update)

    def begin(self, of_update: bool) -> None:
        """Set all sums of the kind ``of_update`` to zero."""
        self._totals = torch.zeros(self._numel[of_update], dtype=torch.float64, device=self._binding.device)

    def add(self, item: Sum, places: Sequence[tuple[int, int]], terms: Sequence[Tensor]) -> None:
        """Add terms to one of the sums that were begun.

        Args:
            item: the sum.
            places: (matrix, start in the matrix) of each of the terms.
            terms: (elements,) each: terms of consecutive elements of a matrix.
        """
        for (index, start), term in zip(places, terms, strict=True):
            matrix = self._layout.matrices[index]
            first = self._starts[item.name][index]
            if self._counted_elsewhere(matrix):
                continue
            if item.per == "matrix":
                self._totals[first] += term.sum(dtype=torch.float64)
                continue
            rows, low = _in_rows(matrix, start, term)
            if matrix.transposed:
                self._totals[first : first + matrix.cols] += rows.sum(0).to(self._totals.device)
            else:
                self._totals[first + low : first + low + len(rows)] += rows.sum(1).to(self._totals.device)

    def _counted_elsewhere(self, matrix: Matrix) -> bool:
        """Whether the first tensor rank has the same elements, and counts them."""
        tensor_ranks = self._layout.tensor_ranks
        return self._travels and matrix.shards < tensor_ranks and self._binding.rank % tensor_ranks > 0

    def finish(self, of_update: bool) -> None:
        """Add up the ranks' sums of the kind ``of_update``. Collective if the bucket travels."""
        if self._travels:
            sum_over_ranks(self._totals, self._binding)
        self._found[of_update] = self._totals.float()
        if self._chooser and not of_update:
            self._chooser.choose(self._found[False])

    def given(
        self, places: Sequence[tuple[int, int]], sizes: Sequence[int], device: torch.device, of_update: Sequence[bool]
    ) -> dict[str, list[Tensor]]:
        """Return finished sums as tensors that broadcast with elements of matrices.

        Args:
            places: (matrix, start in the matrix) of each range of elements.
            sizes: elements of each range.
            device: of the result.
            of_update: the kinds to return.

        Returns:
            By sum, one float32 tensor per place: (1,) for a sum per matrix, (elements,) for one per row.
        """
        found: dict[str, list[Tensor]] = {}
        for item in self.sums:
            if item.of_update in of_update:
                values = self._found[item.of_update].to(device)
                found[item.name] = [
                    self._of_elements(item, values, index, start, numel)
                    for (index, start), numel in zip(places, sizes, strict=True)
                ]
        return found

    def of_matrices(self, matrices: Sequence[int]) -> Mapping[str, Tensor]:
        """Return, by sum of the gradients, (n, outputs) or (n, 1) in float32 for these ``matrices`` of one shape."""
        found = {}
        for item in self.of(False):
            count = self._layout.matrices[matrices[0]].values(item.per)
            starts = [self._starts[item.name][index] for index in matrices]
            found[item.name] = torch.stack([self._found[False].narrow(0, start, count) for start in starts])
        return found

    def release(self) -> None:
        """Free the values."""
        self._found.clear()

    def _of_elements(self, item: Sum, values: Tensor, index: int, start: int, numel: int) -> Tensor:
        matrix = self._layout.matrices[index]
        first = self._starts[item.name][index]
        if item.per == "matrix":
            return values.narrow(0, first, 1)
        touched = matrix.rows_touched(Range(start, numel))
        if matrix.transposed:
            by_element = values.narrow(0, first, matrix.cols).repeat(touched.numel)
        else:
            by_element = values.narrow(0, first + touched.start, touched.numel).repeat_interleave(matrix.width)
        return by_element.narrow(0, start % matrix.width, numel)


def _in_rows(matrix: Matrix, start: int, term: Tensor) -> tuple[Tensor, int]:
    """Spread the elements of a matrix from ``start`` on over the stored rows that they touch.

    Returns:
        (rows touched, width) in float64, zeros elsewhere; and the number of the first row.
    """
    touched = matrix.rows_touched(Range(start, term.numel()))
    rows = term.new_zeros(touched.numel * matrix.width, dtype=torch.float64)
    rows.narrow(0, start % matrix.width, term.numel()).copy_(term)
    return rows.view(touched.numel, matrix.width), touched.start
