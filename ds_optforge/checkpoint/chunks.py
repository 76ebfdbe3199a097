"""Ranges of logical tensors, to be written (`Chunk`) and to be read (`Request`)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FILE_BYTES = 2**28  # a file is made in memory before it is written: this, or the largest chunk of one tensor


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A chunk of a logical tensor, in the sense of torch.distributed.checkpoint: what one rank writes of it.

    Attributes:
        name, size: name and shape of the whole tensor.
        offsets, shape: where the chunk begins in it, and the chunk's own shape; one number per dimension.
        dtype: data type of the values.
        values: the chunk's values, or a function that makes them when the file is written.
    """

    name: str
    size: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor | Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def flat_chunk(name: str, size: int, start: int, values: Tensor) -> Chunk:
    """Make the chunk of elements [start, start + len(values)) of a flat logical tensor of ``size`` elements.

    Args:
        values: flat.
    """
    return Chunk(name, (size,), (start,), (values.numel(),), values.dtype, values)


def files_of(chunks: Iterable[Sequence[Chunk]]) -> dict[str, int]:
    """Number the file, from 1, that each tensor goes to, so that no rank's file is much larger than 256 MiB.

    Args:
        chunks: the chunks of each rank, a sequence per rank.
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
