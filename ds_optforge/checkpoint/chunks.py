"""Parts of logical tensors, to be written and to be read."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FILE_BYTES = 2**28  # a file is made in memory before it is written: this, or the largest piece of one tensor


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A part of a logical tensor, to be written.

    Attributes:
        name, size: the whole tensor's.
        offsets, shape: of the part within it.
        values: the part, or a function that makes it when its file is written.
    """

    name: str
    size: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor | Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def flat_chunk(name: str, size: int, start: int, values: Tensor) -> Chunk:
    """Elements [start, start + len(values)) of a flat logical tensor."""
    return Chunk(name, (size,), (start,), (values.numel(),), values.dtype, values)


def files_of(chunks: Iterable[Sequence[Chunk]]) -> dict[str, int]:
    """The number of the file (from 1) that each tensor goes to, so that no rank's file is much larger than 256 MiB.

    Args:
        chunks: of each rank.
    """
    largest: dict[str, int] = {}
    for of_rank in chunks:
        for chunk in of_rank:
            largest[chunk.name] = max(largest.get(chunk.name, 0), chunk.nbytes)
    number, filled, numbers = 1, 0, {}
    for name, nbytes in largest.items():
        if filled and filled + nbytes > _FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += nbytes
    return numbers


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Elements [start, start + len(values)) of a flat logical tensor, to be read into ``values`` (and cast to its dtype)."""

    name: str
    start: int
    values: Tensor
