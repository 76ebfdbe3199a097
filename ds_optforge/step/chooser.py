"""Chooses rows by a sum that all ranks have: see `ds_optforge.rules.base.Choice`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ds_optforge.rules.base import Choice
from ds_optforge.zero.partition import PartitionLayout


class Chooser:
    """Chooser of the rows of one bucket's matrices: of those with as many outputs at a time.

    Args:
        choice: of the rule.
        layout: of the group.
        starts: by matrix, where the values of the choice's sum begin in the vector of sums.
        device: of that vector.
    """

    def __init__(self, choice: Choice, layout: PartitionLayout, starts: Mapping[int, int], device: torch.device) -> None:
        lines: dict[int, list[Tensor]] = {}
        for index, start in starts.items():
            matrix = layout.matrices[index]
            places = torch.arange(start, start + matrix.outputs)
            if matrix.joins:  # its outputs take turns
                places = places.view(-1, matrix.parts, matrix.joins.block).transpose(0, 1)
            lines.setdefault(matrix.outputs // matrix.parts, []).append(places.reshape(matrix.parts, -1))
        self._places = [(torch.cat(found).to(device), choice.count(outputs)) for outputs, found in lines.items()]

    def choose(self, values: Tensor) -> None:
        """Put 1 in the place of the largest values of each matrix in the vector of sums, and 0 in that of its others."""
        for places, count in self._places:
            sizes = values[places]
            largest = sizes.sort(dim=1, descending=True, stable=True).indices[:, :count]
            values[places] = torch.zeros_like(sizes).scatter_(1, largest, 1.0)
