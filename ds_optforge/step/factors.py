"""What the owners of matrices keep of them: read for a batch of `MatrixRule.update`, and stored again."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_optforge.rules.factor import Factor
from ds_optforge.zero.exchange import BucketExchange
from ds_optforge.zero.partition import PartitionLayout
from ds_optforge.zero.placement import TensorRange
from ds_optforge.zero.views import Views


class BucketFactors:
    """The factors of a bucket's owned matrices.

    They are kept on the device of the stepped tensors, which with CPU offload is not that of the products.

    Args:
        factors: each of the rule's, with the places of this rank's matrices: see `Placement.owned_places`.
        layout: of the group.
        exchange: of the bucket.
        device: on which matrices are orthogonalized.
    """

    def __init__(
        self,
        factors: Sequence[tuple[Factor, Mapping[int, TensorRange]]],
        layout: PartitionLayout,
        exchange: BucketExchange,
        device: torch.device,
    ) -> None:
        self._device = device
        self._batches: list[list[tuple[str, Views, tuple[int, int, int]]]] = []
        for index in exchange.batches:
            numbers = list(dict.fromkeys(exchange.owned(index)))  # those of parts are repeated
            found = []
            for factor, places in factors:
                ranges = [(places[n].tensor, places[n].within.start, places[n].within.numel) for n in numbers]
                parts, rows, cols = layout.matrices[numbers[0]].factor(factor.of)
                found.append((factor.name, Views(ranges), (len(numbers) * parts, rows, cols)))
            self._batches.append(found)

    def of(self, index: int, states: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the factors of a batch, by name.

        Args:
            index: number of the batch.
            states: the optimizer's state of each tensor.

        Returns:
            (n, rows, cols) each in float32: a view of the state if it is one matrix's, on the same device, and else a copy.
        """
        found = {}
        for name, views, shape in self._batches[index]:
            kept = views.of([state[name] for state in states])
            found[name] = (kept[0] if len(kept) == 1 else torch.cat(kept)).to(self._device).view(shape)
        return found

    def put(self, index: int, factors: Mapping[str, Tensor], states: Sequence[Mapping[str, Any]]) -> None:
        """Store the factors that `of` returned for a batch, which have been advanced; arguments as there."""
        for name, views, _ in self._batches[index]:
            kept, flat = views.of([state[name] for state in states]), factors[name].view(-1)
            if len(kept) > 1 or kept[0].data_ptr() != flat.data_ptr():
                torch._foreach_copy_(kept, torch.split(flat, [found.numel() for found in kept]))
