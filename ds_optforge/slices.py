"""The tensors of one call of ``step()``: how they are cut into runs, buckets and chunks, and where their state is.

Under ZeRO a call steps one flat slice; elsewhere a tensor per parameter. Offsets of the plan count through all of them.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ds_optforge.config import ShardingSettings
from ds_optforge.roles import Route
from ds_optforge.rules.base import Buffer, ElementwiseRule, MatrixRule, Rule, State
from ds_optforge.settings import RuleSettings
from ds_optforge.state import EightBit, Extent, Plain, StateFormat, chunks
from ds_optforge.zero.exchange import BucketExchange, require_agreement
from ds_optforge.zero.layout import Binding, bind
from ds_optforge.zero.plan import Matrix, PartitionLayout, RankBucket, exchange_buckets, local_buckets, make_plan

# Elements that an elementwise rule updates at a time where its state is not float32: bounds the float32 copies.
_CHUNK_NUMEL = 2**22


@dataclass(frozen=True, slots=True)
class Members:
    """What a parameter group stands for. The group's dict holds only what a schedule may change."""

    parameters: tuple[Tensor, ...]
    routes: tuple[Route, ...]
    settings: RuleSettings
    rule: Rule


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A contiguous stretch of one of the tensors, made of parts of the given sizes."""

    piece: int
    start: int
    sizes: list[int]

    @property
    def numel(self) -> int:
        return sum(self.sizes)

    def of(self, pieces: Sequence[Tensor]) -> Tensor:
        return pieces[self.piece].narrow(0, self.start, self.numel)


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Matrices that travel, or are stepped, together.

    ``runs`` cover its fragments; ``rows`` are the (piece, start, count) of each fragment's output rows in the row buffers.
    """

    exchange: BucketExchange
    runs: tuple[Run, ...]
    rows: tuple[tuple[int, int, int], ...]

    def views(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """The bucket's part of flat tensors that are laid out like the slices."""
        return [run.of(pieces) for run in self.runs]

    def fragments(self, views: Sequence[Tensor]) -> list[Tensor]:
        """``views`` cut into fragments."""
        return [part for view, run in zip(views, self.runs, strict=True) for part in torch.split(view, run.sizes)]


@dataclass(frozen=True, slots=True, eq=False)
class Slices:
    """One call's tensors, bound to their places.

    Attributes:
        tensors: ``group["params"]``.
        formats: of each tensor's elementwise state.
        row_counts: output rows that begin in each tensor.
        travelling, local: buckets of a matrix rule's matrices that do and do not travel between ranks.
        chunks: runs that an elementwise rule updates at a time.
    """

    binding: Binding
    tensors: tuple[Tensor, ...]
    formats: tuple[StateFormat, ...]
    row_counts: tuple[int, ...]
    travelling: tuple[Bucket, ...]
    local: tuple[Bucket, ...]
    chunks: tuple[tuple[Run, ...], ...]

    def allocate(self, rule: Rule, states: Sequence[MutableMapping[str, Any]]) -> None:
        """Enter what is missing of the rule's state."""
        for index, (piece, state) in enumerate(zip(self.tensors, states, strict=True)):
            if "step" in state:
                continue
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for buffer in rule.buffers:
                self._format(index, buffer).allocate(state, buffer, piece.detach())
                if buffer.copies_weight:
                    state[buffer.name].copy_(piece.detach())
            if isinstance(rule, MatrixRule) and rule.row_buffer:
                state[rule.row_buffer] = torch.zeros(self.row_counts[index], dtype=torch.float32, device=piece.device)

    @contextmanager
    def opened(self, rule: Rule, states: Sequence[MutableMapping[str, Any]], runs: Sequence[Run]) -> Iterator[State]:
        """The runs' state in the tensors' dtype, by buffer; changes are stored at the end."""
        values: dict[str, list[Tensor]] = {buffer.name: [] for buffer in rule.buffers}
        for buffer in rule.buffers:
            for r in runs:
                value = self._format(r.piece, buffer).read(states[r.piece], buffer, r.start, r.numel)
                values[buffer.name].append(value.to(self.tensors[r.piece].dtype))
        yield values
        for buffer in rule.buffers:
            for run, value in zip(runs, values[buffer.name], strict=True):
                self._format(run.piece, buffer).write(states[run.piece], buffer, run.start, value)

    def _format(self, piece: int, buffer: Buffer) -> StateFormat:
        return Plain(self.tensors[piece].dtype) if buffer.copies_weight else self.formats[piece]


def bind_slices(members: Members, tensors: Sequence[Tensor], sharding: ShardingSettings, routing: str) -> Slices:
    """Find the tensors' layout, make the plan and agree on it with the other ranks. Raises LayoutError."""
    binding = bind(members.parameters, [route.name for route in members.routes], tensors)
    routes = [members.routes[i] for i in binding.indices]
    layout = PartitionLayout(binding.world_size, tuple(r.name for r in routes), binding.cuts, tuple(_matrices(routes)))
    starts = list(accumulate((piece.numel() for piece in tensors), initial=0))[:-1]
    extents = _extents(layout, binding.rank, starts)
    state_dtype = members.settings.state_dtype
    formats = tuple(_format(state_dtype, tensor, extent) for tensor, extent in zip(tensors, extents, strict=True))
    travelling: tuple[Bucket, ...] = ()
    local: tuple[Bucket, ...] = ()
    rule = members.rule
    row_counts = [0] * len(tensors)
    if isinstance(rule, MatrixRule):
        cost = rule.cost
        plan = make_plan(layout, lambda matrix: cost(matrix.rows, matrix.cols), sharding.bucket_numel)
        wire = getattr(torch, sharding.wire_dtype)
        row_words = 4 // wire.itemsize if rule.row_buffer else 0
        row_places = _row_places(layout, binding.rank, starts, row_counts)

        def build(buckets: Sequence[RankBucket]) -> tuple[Bucket, ...]:
            return tuple(_bucket(layout, bucket, binding, wire, starts, row_places) for bucket in buckets)

        travelling = build(exchange_buckets(plan, binding.rank, row_words))
        local = build(local_buckets(plan, binding.rank, row_words))
    else:
        plan = make_plan(layout, lambda matrix: 0, sharding.bucket_numel)
    require_agreement(plan, routing, binding)
    parts = _chunks(extents, tensors, members)
    return Slices(binding, tuple(tensors), formats, tuple(row_counts), travelling, local, parts)


def _matrices(routes: Sequence[Route]) -> Iterator[Matrix]:
    """The matrices of a matrix rule; for an elementwise rule each parameter as one row."""
    for index, route in enumerate(routes):
        if not route.matrices:
            yield Matrix(index, 0, 1, route.numel)
        for start, rows, cols in route.matrices:
            yield Matrix(index, start, rows, cols, route.transposed)


def buffer_dtype(state_dtype: str, buffer: Buffer, tensor: Tensor) -> torch.dtype:
    """The dtype in which a tensor's buffer is kept."""
    if buffer.copies_weight or state_dtype == "float32":
        return tensor.dtype
    return torch.uint8 if state_dtype == "8bit" else torch.bfloat16


def _format(name: str, tensor: Tensor, extents: Sequence[Extent]) -> StateFormat:
    """float32 is what ZeRO's slices have; in plain PyTorch full precision is that of the parameter, as in torch.optim."""
    if name == "8bit":
        return EightBit(extents)
    return Plain(tensor.dtype if name == "float32" else getattr(torch, name))


def _place(starts: Sequence[int], offset: int) -> tuple[int, int]:
    """(tensor, offset in it) of an offset that counts through all tensors."""
    piece = bisect_right(starts, offset) - 1
    return piece, offset - starts[piece]


def _extents(layout: PartitionLayout, rank: int, starts: Sequence[int]) -> list[list[Extent]]:
    extents: list[list[Extent]] = [[] for _ in starts]
    for fragment in layout.fragments(rank):
        piece, offset = _place(starts, fragment.offset)
        begin = layout.matrices[fragment.matrix].start + fragment.start
        extents[piece].append(Extent(offset, fragment.numel, begin))
    return extents


def _row_places(
    layout: PartitionLayout, rank: int, starts: Sequence[int], row_counts: list[int]
) -> dict[int, tuple[int, int, int]]:
    """(piece, start, count) of each held matrix's output rows in the pieces' row buffers; adds up ``row_counts``."""
    places = {}
    for fragment in layout.fragments(rank):
        piece, _ = _place(starts, fragment.offset)
        _, count = layout.matrices[fragment.matrix].outputs_in(fragment.start, fragment.numel)
        places[fragment.matrix] = (piece, row_counts[piece], count)
        row_counts[piece] += count
    return places


def _bucket(
    layout: PartitionLayout,
    bucket: RankBucket,
    binding: Binding,
    wire: torch.dtype,
    starts: Sequence[int],
    row_places: Mapping[int, tuple[int, int, int]],
) -> Bucket:
    rows = tuple(row_places[fragment.matrix] for fragment in bucket.fragments) if bucket.row_words else ()
    return Bucket(BucketExchange(layout, bucket, binding, wire), _runs(bucket, starts), rows)


def _runs(bucket: RankBucket, starts: Sequence[int]) -> tuple[Run, ...]:
    """Merge fragments that lie side by side in one tensor."""
    runs: list[Run] = []
    end = -1
    for fragment in bucket.fragments:
        piece, start = _place(starts, fragment.offset)
        if runs and runs[-1].piece == piece and end == fragment.offset:
            runs[-1].sizes.append(fragment.numel)
        else:
            runs.append(Run(piece, start, [fragment.numel]))
        end = fragment.offset + fragment.numel
    return tuple(runs)


def _chunks(extents: Sequence[Sequence[Extent]], tensors: Sequence[Tensor], members: Members) -> tuple[tuple[Run, ...], ...]:
    """A kernel that works in place on full-precision state takes everything in one call; others a bounded part at a time."""
    rule = members.rule
    if not isinstance(rule, ElementwiseRule):
        return ()
    if members.settings.state_dtype == "float32" and rule.in_place:
        return (tuple(Run(piece, 0, [tensor.numel()]) for piece, tensor in enumerate(tensors)),)
    parts: list[list[Run]] = []
    room = 0
    for piece, extent in enumerate(extents):
        for offset, numel in (run for chunk in chunks(extent, _CHUNK_NUMEL) for run in chunk):
            if numel > room:
                parts.append([])
                room = _CHUNK_NUMEL
            parts[-1].append(Run(piece, offset, [numel]))
            room -= numel
    return tuple(map(tuple, parts))
