"""Shards of tensor and expert parallelism in a checkpoint, which knows whole parameters only.

A checkpoint of a run with such parallelism is like one of any other run: its logical tensors are those of whole parameters. The
experts that a rank has of a bank are a range of the whole.
A range of a shard of rows is a range of the whole. Of a shard of columns it is a range of each row, so that the tensor ranks
exchange columns for rows before they write, and read whole rows of which they keep their columns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optforge.checkpoint.chunks import Chunk, Request, flat_chunk
from ds_optforge.errors import CheckpointError
from ds_optforge.zero.layout import LayoutError
from ds_optforge.zero.partition import Per, Range
from ds_optforge.zero.shards import Shard, experts_of, shard_of, tensor_group, tensor_rank


@dataclass(frozen=True, slots=True, eq=False)
class Shards:
    """The shards that this rank has of the model's parameters.

    Attributes:
        of: by name, the shard of each parameter that tensor or expert parallelism cuts.
        rank: number of this tensor rank.
        experts: by name, the number of this rank's shard of each bank of experts.
    """

    of: Mapping[str, Shard]
    rank: int
    experts: Mapping[str, int]

    def value_ranges(self, parameter: str, per: Per, within: Range, numel: int) -> Iterator[tuple[int, Range]]:
        """Yield (start in the whole parameter's values, values) of each range of the values ``within`` of a statistic.

        The owner of a weight that is cut part by part has its rows shard after shard, each with its rows of every part.

        Args:
            parameter: name of the parameter.
            per: what the statistic has a value for.
            within: of the values that this rank counts.
            numel: values that this rank counts.
        """
        shard = self.of.get(parameter)
        if shard is None or not shard.parts or per != "row":
            yield self.values(parameter, within, numel)[0], within
            return
        at, parts = 0, list(zip(accumulate(shard.parts, initial=0), shard.parts, strict=False))
        for rank, (before, rows) in product(range(shard.count), parts):
            own = rows // shard.count
            low, high = max(within.start, at), min(within.end, at + own)
            if low < high:
                yield before + rank * own + low - at, Range(low, high - low)
            at += own

    def values(self, parameter: str, within: Range, numel: int) -> tuple[int, int]:
        """Return (start, values) in the whole, of a statistic of which this rank counts ``numel`` values of a parameter.

        Experts alone have values of their own on each rank; tensor ranks count those of whole matrices.
        """
        if parameter not in self.experts:
            return within.start, numel
        return self.experts[parameter] * numel + within.start, self.of[parameter].count * numel

    def whole_chunks(self, parameter: str, chunk: Chunk) -> Iterator[Chunk]:
        """Turn a chunk of this rank's shard into chunks of the whole parameter. Collective over the tensor ranks.

        Args:
            parameter: name of the parameter.
            chunk: a range of elements; those of other parameters are yielded as they are.
        """
        shard = self.of.get(parameter)
        if shard is None:
            yield chunk
            return
        assert isinstance(chunk.values, Tensor)
        numel, values = torch.Size(shard.whole).numel(), chunk.values
        held = Range(chunk.offsets[0], chunk.shape[0])
        if shard.dim == 0:
            for start, within in self._ranges(parameter, held):
                yield flat_chunk(chunk.name, numel, start, values.narrow(0, within.start - held.start, within.numel))
            return
        cols = shard.whole[1]
        width = cols // shard.count
        middle = _whole_rows(held, width)
        for within in (Range(held.start, middle.start - held.start), Range(middle.end, held.end - middle.end)):
            if within.numel:  # less than a row
                row, col = divmod(within.start, width)
                start = row * cols + self.rank * width + col
                yield flat_chunk(chunk.name, numel, start, values.narrow(0, within.start - held.start, within.numel))
        if middle.numel:
            first, found = self._columns_for_rows(values.narrow(0, middle.start - held.start, middle.numel), width, shard.count)
            if found.numel():
                yield flat_chunk(chunk.name, numel, (middle.start // width + first) * cols, found)

    def _ranges(self, parameter: str, held: Range) -> Iterator[tuple[int, Range]]:
        """Yield (start in the whole parameter, elements of the shard) of each range of ``held``, in a shard of rows."""
        shard, rank = self.of[parameter], self.experts.get(parameter, self.rank)
        row = torch.Size(shard.whole[1:]).numel()
        parts = [rows * row for rows in shard.parts or shard.whole[:1]]
        for before, part in zip(accumulate(parts, initial=0), parts, strict=False):
            begin, numel = before // shard.count, part // shard.count
            low, high = max(held.start, begin), min(held.end, begin + numel)
            if low < high:
                yield before + rank * numel + low - begin, Range(low, high - low)

    def _columns_for_rows(self, values: Tensor, width: int, count: int) -> tuple[int, Tensor]:
        """Exchange some columns of all these rows for all columns of some rows, with the other tensor ranks.

        Returns:
            (number of the first row, the rows' elements, flat).
        """
        rows = values.numel() // width
        edges = [rows * rank // count for rank in range(count + 1)]
        own = edges[self.rank + 1] - edges[self.rank]
        sent = [(end - start) * width for start, end in pairwise(edges)]
        found = values.new_empty(count * own * width)
        dist.all_to_all_single(found, values.contiguous(), [own * width] * count, sent, group=tensor_group())
        return edges[self.rank], found.view(count, own, width).transpose(0, 1).reshape(-1)

    def requests(
        self, parameter: str, key: str, start: int, values: Tensor
    ) -> tuple[list[Request], Callable[[], object] | None]:
        """Request elements of this rank's shard of a parameter, or of a buffer that is like it.

        Args:
            parameter: name of the parameter.
            key: name of the logical tensor.
            start: of the elements in the shard.
            values: (elements,) to be filled.

        Returns:
            The requests, and what is to be called when they are filled; None if nothing.
        """
        shard = self.of.get(parameter)
        if shard is None:
            return [Request(key, start, values)], None
        held = Range(start, values.numel())
        if shard.dim == 0:
            ranges = self._ranges(parameter, held)
            return [Request(key, at, values.narrow(0, r.start - start, r.numel)) for at, r in ranges], None
        cols = shard.whole[1]
        width = cols // shard.count
        first = start // width
        touched = -(-held.end // width) - first
        around = torch.empty(touched, cols, dtype=values.dtype, device=values.device)

        def keep_columns() -> None:
            own = around.narrow(1, self.rank * width, width).reshape(-1)
            values.copy_(own.narrow(0, start - first * width, values.numel()))

        return [Request(key, first * cols, around.view(-1))], keep_columns


def _whole_rows(held: Range, width: int) -> Range:
    """Return the elements of ``held`` that lie in rows of which it has every element; rows have ``width`` elements."""
    first, end = -(-held.start // width) * width, held.end // width * width
    return Range(first, end - first) if first <= end else Range(held.end, 0)


WHOLE = Shards({}, 0, {})


def shards_of(named: Sequence[tuple[str, Tensor]]) -> Shards:
    """Return the shards of the parameters in ``named``: (name, parameter) pairs.

    Raises:
        CheckpointError: a parameter whose whole cannot be put together from its shards.
    """
    try:
        banks = {name: bank for name, parameter in named if (bank := experts_of(name, parameter)) is not None}
    except LayoutError as error:
        raise CheckpointError(f"{error} (engine.save_checkpoint saves the others)") from None
    found = {name: shard for name, parameter in named if (shard := shard_of(parameter)) is not None}
    for name, shard in found.items():
        if shard.problem or (shard.dim == 1 and len(shard.whole) != 2):
            what = shard.problem or f"columns of a parameter of shape {shard.whole}"
            raise CheckpointError(
                f"'{name}': tensor parallelism cuts it into {what}; allowed: even ranges of rows or columns "
                "(engine.save_checkpoint saves the others)"
            )
    experts = {name: bank for name, (bank, _) in banks.items()}
    return Shards(found | experts, tensor_rank() if found else 0, {name: number for name, (_, number) in banks.items()})
