"""State buffers in full precision, bfloat16 or 8-bit blocks, behind one pair: `read` gives values, `write` stores them.

8-bit: bitsandbytes' blockwise dynamic quantization (Dettmers et al. 2022, arXiv 2110.02861), blocks of 256 values with one
float32 absmax each. Blocks restart at each fragment and are aligned to multiples of 256 within the parameter, so that
another partition requantizes only the blocks at its cuts.
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
    """How one slice keeps its elementwise buffers. ``state`` is the slice's entry in the optimizer's state."""

    def allocate(self, state: MutableMapping[str, Any], buffer: Buffer, tensor: Tensor) -> None:
        """Enter the buffer, holding zeros or a copy of the weight, as it is declared."""

    def read(self, state: MutableMapping[str, Any], buffer: Buffer, offset: int, numel: int) -> Tensor:
        """(numel,): elements [offset, offset + numel) of the slice; a view where the format allows it."""

    def write(self, state: MutableMapping[str, Any], buffer: Buffer, offset: int, values: Tensor) -> None:
        """Store what `read` returned, changed or not."""


@dataclass(frozen=True, slots=True)
class Plain:
    """One tensor of the slice's shape. `read` is a view, so that storing what was changed in place does nothing."""

    dtype: torch.dtype

    def allocate(self, state: MutableMapping[str, Any], buffer: Buffer, tensor: Tensor) -> None:
        copied = buffer.copies_weight
        state[buffer.name] = tensor.to(self.dtype, copy=True) if copied else torch.zeros_like(tensor, dtype=self.dtype)

    def read(self, state: MutableMapping[str, Any], buffer: Buffer, offset: int, numel: int) -> Tensor:
        stored: Tensor = state[buffer.name]
        return stored.view(-1).narrow(0, offset, numel)

    def write(self, state: MutableMapping[str, Any], buffer: Buffer, offset: int, values: Tensor) -> None:
        if values.dtype != self.dtype:
            state[buffer.name].view(-1).narrow(0, offset, values.numel()).copy_(values)


class EightBit:
    """uint8 codes of the slice's shape under the buffer's name, and ``<name>_absmax``, one float32 per block."""

    def __init__(self, fragments: Sequence[Held]) -> None:
        self._blocks = _whole_blocks(fragments)
        self._starts = [block.offset for block in self._blocks]

    def allocate(self, state: MutableMapping[str, Any], buffer: Buffer, tensor: Tensor) -> None:
        blocks = self._blocks[-1].first_block + self._blocks[-1].blocks if self._blocks else 0
        state[buffer.name] = torch.full_like(tensor, _zero(buffer.signed), dtype=torch.uint8)
        state[f"{buffer.name}_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=tensor.device)
        if buffer.copies_weight:
            self.write(state, buffer, 0, tensor.reshape(-1))

    def read(self, state: MutableMapping[str, Any], buffer: Buffer, offset: int, numel: int) -> Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        codes = state[buffer.name].view(-1)
        values = torch.empty(numel, dtype=torch.float32, device=codes.device)
        for at, length, blocks in self._cut(offset, numel):
            absmax = state[f"{buffer.name}_absmax"][blocks]
            part = values.narrow(0, at - offset, length)
            code = _code(buffer.signed, codes.device)
            part.copy_(dequantize_blockwise(codes.narrow(0, at, length), absmax=absmax, code=code, blocksize=BLOCK))
        return values

    def write(self, state: MutableMapping[str, Any], buffer: Buffer, offset: int, values: Tensor) -> None:
        codes = state[buffer.name].view(-1)
        for at, length, blocks in self._cut(offset, values.numel()):
            part = values.narrow(0, at - offset, length).float()
            quantized, state[f"{buffer.name}_absmax"][blocks] = _quantized(part, buffer.signed)
            codes.narrow(0, at, length).copy_(quantized)

    def blocks(self, offset: int, numel: int) -> slice:
        """The blocks of a range that begins and ends between blocks, in ``<name>_absmax``."""
        cut = self._cut(offset, numel)
        return slice(cut[0][2].start, cut[-1][2].stop)

    def _cut(self, offset: int, numel: int) -> list[tuple[int, int, slice]]:
        """(offset, numel, blocks) of each block's part of a range that begins and ends between blocks."""
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
    """Adjacent fragments all of whose blocks are full but the last: one call quantizes them."""

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
    """(offset, numel) of the fragment's part before the parameter's next block boundary, and of the rest."""
    head = min(-fragment.within.start % BLOCK, fragment.numel)
    parts = [(fragment.tensor_start, head), (fragment.tensor_start + head, fragment.numel - head)]
    return [(offset, numel) for offset, numel in parts if numel]


def portions(fragments: Sequence[Held], limit: int) -> list[list[tuple[int, int]]]:
    """Cut fragments between blocks into lists of (offset, numel) with at most ``limit`` elements each (a multiple of 256)."""
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
    """(blocks + 1,): where the blocks of one parameter begin and end.

    ``cuts``: where fragments meet inside it, so that blocks restart.
    """
    edges = torch.cat([torch.arange(0, numel, BLOCK), torch.tensor([*cuts, numel], dtype=torch.int64)]).sort().values
    first = torch.ones_like(edges, dtype=torch.bool)
    first[1:] = edges.diff() > 0
    return edges[first]


def dequantize(codes: Tensor, absmax: Tensor, edges: Tensor, signed: bool) -> Tensor:
    """(n,) float32 values of ``codes`` (n,), whose block i, from ``edges[i]`` to ``edges[i + 1]``, has scale ``absmax[i]``.

    The first block may begin before the first code and the last one end after the last.
    """
    lengths = edges.clamp(0, codes.numel()).diff().to(codes.device)
    return _code(signed, codes.device)[codes.long()] * absmax.repeat_interleave(lengths)


def recut(codes: Tensor, absmax: Tensor, saved: Tensor, edges: Tensor, signed: bool) -> Tensor:
    """Take over codes (n,) whose blocks had the edges ``saved`` into blocks with ``edges``, from 0 to n.

    Blocks with the same edges stay as they are, bit for bit; the others are quantized anew, in place. Returns all scales.
    """
    first = torch.searchsorted(saved, edges[:-1], right=True) - 1  # the saved block that each block begins in
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
    """(codes, one scale per block) of float32 values that begin with a block."""
    from bitsandbytes.functional import quantize_blockwise

    codes, how = quantize_blockwise(values, code=_code(signed, values.device), blocksize=BLOCK)
    # On a CPU bitsandbytes rounds zero to 2e-5 of the block's largest value, and Lion would march on its sign.
    return codes.masked_fill_(values == 0, _zero(signed)), how.absmax


@cache
def _code(signed: bool, device: torch.device) -> Tensor:
    from bitsandbytes.functional import create_dynamic_map

    code: Tensor = create_dynamic_map(signed=signed)  # type: ignore[no-untyped-call]
    return code.to(device)


@cache
def _zero(signed: bool) -> int:
    """The code of zero."""
    return int(_code(signed, torch.device("cpu")).abs().argmin())
