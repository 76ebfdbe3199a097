"""Formats of state buffers: full precision, bfloat16, or 8-bit blocks. `read` returns values, `write` stores them.

8-bit state is bitsandbytes' blockwise dynamic quantization (Dettmers et al. 2022, arXiv 2110.02861) in blocks of 256 values
with one float32 absmax each. Blocks restart at each fragment and are aligned to multiples of 256 within the parameter, so
that another partition requantizes only the blocks at its cuts.
"""

from bisect import bisect_right
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_optforge.rules.base import Buffer
from ds_optforge.zero.placement import Held

BLOCK = 256


class StateFormat(Protocol):
    """The format in which one slice keeps its state buffers. ``state`` is the slice's entry in the optimizer's state."""

    def allocate(self, state: MutableMapping[str, Any], buffer: Buffer, tensor: Tensor) -> None:
        """Enter the buffer into ``state``: zeros, or a copy of the weight, as it is declared.

        Args:
            state: changed in place.
            buffer: declaration of the buffer.
            tensor: the slice, of any shape.
        """

    def read(self, state: MutableMapping[str, Any], buffer: Buffer, offset: int, numel: int) -> Tensor:
        """Return elements [offset, offset + numel) of the flattened buffer, (numel,); a view if the format allows it.

        Args:
            state: of the slice.
            buffer: declaration of the buffer.
            offset: of the first element in the flattened slice.
            numel: number of elements.
        """

    def write(self, state: MutableMapping[str, Any], buffer: Buffer, offset: int, values: Tensor) -> None:
        """Store elements that `read` returned, changed or not.

        Args:
            state: changed in place.
            buffer: declaration of the buffer.
            offset: of the first element in the flattened slice.
            values: (numel,).
        """


@dataclass(frozen=True, slots=True)
class Plain:
    """Format with one tensor of the slice's shape. `read` returns a view, so that changes in place need no storing.

    Attributes:
        dtype: of the tensor.
    """

    dtype: torch.dtype

    def allocate(self, state: MutableMapping[str, Any], buffer: Buffer, tensor: Tensor) -> None:
        """Enter a tensor of this dtype; arguments as in `StateFormat.allocate`."""
        copied = buffer.copies_weight
        state[buffer.name] = tensor.to(self.dtype, copy=True) if copied else torch.zeros_like(tensor, dtype=self.dtype)

    def read(self, state: MutableMapping[str, Any], buffer: Buffer, offset: int, numel: int) -> Tensor:
        """Return a view, (numel,), in this dtype; arguments as in `StateFormat.read`."""
        stored: Tensor = state[buffer.name]
        return stored.view(-1).narrow(0, offset, numel)

    def write(self, state: MutableMapping[str, Any], buffer: Buffer, offset: int, values: Tensor) -> None:
        """Store values of another dtype; those of this dtype are taken for changed views; as in `StateFormat.write`."""
        if values.dtype != self.dtype:
            state[buffer.name].view(-1).narrow(0, offset, values.numel()).copy_(values)


class EightBit:
    """Format with uint8 codes of the slice's shape under the buffer's name, and ``<name>_absmax``, one float32 per block.

    Args:
        fragments: of the slice, in order.
    """

    def __init__(self, fragments: Sequence[Held]) -> None:
        self._blocks = _whole_blocks(fragments)
        self._starts = [block.offset for block in self._blocks]

    def allocate(self, state: MutableMapping[str, Any], buffer: Buffer, tensor: Tensor) -> None:
        """Enter codes and scales; arguments as in `StateFormat.allocate`."""
        blocks = self._blocks[-1].first_block + self._blocks[-1].blocks if self._blocks else 0
        state[buffer.name] = torch.full_like(tensor, _zero(buffer.signed), dtype=torch.uint8)
        state[f"{buffer.name}_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=tensor.device)
        if buffer.copies_weight:
            self.write(state, buffer, 0, tensor.reshape(-1))

    def read(self, state: MutableMapping[str, Any], buffer: Buffer, offset: int, numel: int) -> Tensor:
        """Return dequantized values, (numel,) in float32, of a range between block edges; as in `StateFormat.read`."""
        from bitsandbytes.functional import dequantize_blockwise

        codes = state[buffer.name].view(-1)
        values = torch.empty(numel, dtype=torch.float32, device=codes.device)
        for at, length, blocks in self._cut(offset, numel):
            absmax = state[f"{buffer.name}_absmax"][blocks]
            part = values.narrow(0, at - offset, length)
            how = {"absmax": absmax, "code": _code(buffer.signed, codes.device), "blocksize": BLOCK}
            if codes.device.type == "cpu":  # where bitsandbytes cannot write into a tensor that it is given
                part.copy_(dequantize_blockwise(codes.narrow(0, at, length), **how))
            else:
                dequantize_blockwise(codes.narrow(0, at, length), out=part, **how)
        return values

    def write(self, state: MutableMapping[str, Any], buffer: Buffer, offset: int, values: Tensor) -> None:
        """Quantize and store values of a range between block edges; arguments as in `StateFormat.write`."""
        codes = state[buffer.name].view(-1)
        for at, length, blocks in self._cut(offset, values.numel()):
            part = values.narrow(0, at - offset, length).float()
            quantized, state[f"{buffer.name}_absmax"][blocks] = _quantized(part, buffer.signed)
            codes.narrow(0, at, length).copy_(quantized)

    def blocks(self, offset: int, numel: int) -> slice:
        """Return the places in ``<name>_absmax`` of the blocks of [offset, offset + numel), whose ends are block edges."""
        cut = self._cut(offset, numel)
        return slice(cut[0][2].start, cut[-1][2].stop)

    def _cut(self, offset: int, numel: int) -> list[tuple[int, int, slice]]:
        """Cut [offset, offset + numel), whose ends are block edges, into (offset, numel, its blocks) that one call takes."""
        parts = []
        index = max(bisect_right(self._starts, offset) - 1, 0)
        while index < len(self._blocks) and self._blocks[index].offset < offset + numel:
            block = self._blocks[index]
            low = max(offset, block.offset)
            high = min(offset + numel, block.offset + block.numel)
            if low < high:
                first = block.first_block + (low - block.offset) // BLOCK
                last = block.first_block + -(-(high - block.offset) // BLOCK)
                parts.append((low, high - low, slice(first, last)))
            index += 1
        return parts


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Adjacent fragments with all blocks full but the last, so that one call quantizes them."""

    offset: int
    numel: int
    first_block: int

    @property
    def blocks(self) -> int:
        return -(-self.numel // BLOCK)


def _whole_blocks(fragments: Sequence[Held]) -> list[_Blocks]:
    blocks: list[_Blocks] = []
    for fragment in fragments:
        for offset, numel in _at_block_boundary(fragment):
            last = blocks[-1] if blocks else None
            if last and last.offset + last.numel == offset and last.numel % BLOCK == 0:
                blocks[-1] = _Blocks(last.offset, last.numel + numel, last.first_block)
            else:
                blocks.append(_Blocks(offset, numel, last.first_block + last.blocks if last else 0))
    return blocks


def _at_block_boundary(fragment: Held) -> list[tuple[int, int]]:
    """Cut a fragment at its parameter's first block boundary, into one or two (offset, numel)."""
    head = min(-fragment.within.start % BLOCK, fragment.numel)
    parts = [(fragment.tensor_start, head), (fragment.tensor_start + head, fragment.numel - head)]
    return [(offset, numel) for offset, numel in parts if numel]


def portions(fragments: Sequence[Held], limit: int) -> list[list[tuple[int, int]]]:
    """Cut fragments between blocks into lists of (offset, numel) with at most ``limit`` elements per list.

    Args:
        fragments: of one tensor, in order.
        limit: a multiple of 256.
    """
    result: list[list[tuple[int, int]]] = []
    room = 0
    for fragment in fragments:
        for offset, numel in _at_block_boundary(fragment):
            for start in range(0, numel, limit):
                length = min(limit, numel - start)
                if length > room:
                    result.append([])
                    room = limit
                result[-1].append((offset + start, length))
                room -= length
    return result


def block_edges(numel: int, cuts: Sequence[int]) -> Tensor:
    """Return the edges of the blocks of one parameter, (blocks + 1,) in int64 from 0 to ``numel``.

    Args:
        numel: elements of the parameter.
        cuts: positions inside it at which fragments meet, so that blocks restart.
    """
    edges = torch.cat([torch.arange(0, numel, BLOCK), torch.tensor([*cuts, numel], dtype=torch.int64)]).sort().values
    first = torch.ones_like(edges, dtype=torch.bool)
    first[1:] = edges.diff() > 0
    return edges[first]


def dequantize(codes: Tensor, absmax: Tensor, edges: Tensor, signed: bool) -> Tensor:
    """Turn 8-bit codes into values: (n,) in float32.

    Args:
        codes: (n,) in uint8.
        absmax: (blocks,) scale of each block.
        edges: (blocks + 1,): block i holds codes ``edges[i]`` to ``edges[i + 1]``. The first block may begin before the
            first code, and the last one end after the last.
        signed: whether the buffer takes negative values.
    """
    lengths = edges.clamp(0, codes.numel()).diff().to(codes.device)
    return _code(signed, codes.device)[codes.long()] * absmax.repeat_interleave(lengths)


def recut(codes: Tensor, absmax: Tensor, saved: Tensor, edges: Tensor, signed: bool) -> Tensor:
    """Change the block edges of 8-bit codes. Blocks with unchanged edges stay bit-equal; others are quantized anew.

    Args:
        codes: (n,) in uint8; changed in place.
        absmax: (saved blocks,) scale of each saved block.
        saved: (saved blocks + 1,) edges that the blocks had, from 0 to n.
        edges: (blocks + 1,) edges that the blocks get, from 0 to n.
        signed: whether the buffer takes negative values.

    Returns:
        (blocks,) scale of each new block.
    """
    first = torch.searchsorted(saved, edges[:-1], right=True) - 1  # the saved block in which each block begins
    intact = (saved[first] == edges[:-1]) & (saved[first + 1] == edges[1:])
    scales = absmax[first.to(absmax.device)]
    for block in intact.logical_not().nonzero().flatten().tolist():
        begin, end = int(edges[block]), int(edges[block + 1])
        covered = slice(int(first[block]), int(torch.searchsorted(saved, end)))
        part = codes.narrow(0, begin, end - begin)
        around = saved[covered.start : covered.stop + 1] - begin
        quantized, scales[block : block + 1] = _quantized(dequantize(part, absmax[covered], around, signed), signed)
        part.copy_(quantized)
    return scales


def _quantized(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantize (n,) float32 values that begin with a block, to (n,) codes and (blocks,) scales."""
    from bitsandbytes.functional import quantize_blockwise

    codes, how = quantize_blockwise(values, code=_code(signed, values.device), blocksize=BLOCK)
    # On a CPU bitsandbytes rounds zero to 2e-5 of the block's largest value, and Lion would step by its sign. Elsewhere it
    # finds the code that is nearest, which is that of zero.
    if values.device.type == "cpu":
        codes.masked_fill_(values == 0, _zero(signed))
    return codes, how.absmax


@cache
def _code(signed: bool, device: torch.device) -> Tensor:
    from bitsandbytes.functional import create_dynamic_map

    code: Tensor = create_dynamic_map(signed=signed)  # type: ignore[no-untyped-call]
    return code.to(device)


@cache
def _zero(signed: bool) -> int:
    """Return the code of zero."""
    return int(_code(signed, torch.device("cpu")).abs().argmin())
