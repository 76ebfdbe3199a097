"""The tensors of one call of ``step()``: how they are cut into runs, buckets and chunks, and where their state is.

Under ZeRO a call steps one flat slice; elsewhere a tensor per parameter. Offsets of the plan count through all of them.
"""

import logging
import math
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ds_optforge.config import THIN_ROWS, ShardingSettings
from ds_optforge.placement import Placement
from ds_optforge.roles import Route
from ds_optforge.rules.base import Buffer, ElementwiseRule, MatrixRule, Rule, State, row_buffer_of
from ds_optforge.settings import RuleSettings
from ds_optforge.state import EightBit, Extent, Plain, StateFormat, chunks
from ds_optforge.zero.exchange import BucketExchange, require_agreement
from ds_optforge.zero.layout import Binding, bind
from ds_optforge.zero.plan import (
    ExchangePlan,
    Fragment,
    Matrix,
    PartitionLayout,
    RankBucket,
    exchange_buckets,
    local_buckets,
    make_plan,
    shard_buckets,
)

logger = logging.getLogger("ds_optforge")

# Elements that are read and updated at a time wherever that makes temporary tensors: bounds them. On a CPU they fit its
# cache (half the time of whole buckets was measured); elsewhere fewer kernels count.
_CHUNK_NUMEL = {"cpu": 2**18}
_CHUNK_NUMEL_ELSEWHERE = 2**22


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
class Part:
    """Stretches that are read and updated at a time: ``runs``, made of parts of fragments.

    ``fragments`` (parts,) are the fragments' numbers within the bucket, ``positions`` the parts' places in the exchange's
    send buffer.
    """

    runs: tuple[Run, ...]
    fragments: Tensor
    positions: tuple[int, ...]

    def views(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """One view per run of flat tensors that are laid out like the slices."""
        return [run.of(pieces) for run in self.runs]

    def split(self, views: Sequence[Tensor]) -> list[Tensor]:
        """``views`` cut at the ends of fragments."""
        return [part for view, run in zip(views, self.runs, strict=True) for part in torch.split(view, run.sizes)]

    def places(self, buffer: Tensor) -> list[Tensor]:
        """The same elements in the send buffer."""
        sizes = [size for run in self.runs for size in run.sizes]
        return [buffer.narrow(0, at, size) for at, size in zip(self.positions, sizes, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Matrices that travel, or are stepped, together.

    Attributes:
        exchange: their way to their owners and back.
        fragments: (piece, start, numel) of each fragment in the slices.
        parts: the same elements, a bounded number at a time.
        rows: (piece, start, count) of each fragment's output rows in the row buffers.
        norms: (fragments,) that updates are scaled to; None where matrices are orthogonalized whole.
    """

    exchange: BucketExchange
    fragments: tuple[tuple[int, int, int], ...]
    parts: tuple[Part, ...]
    rows: tuple[tuple[int, int, int], ...]
    norms: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Slices:
    """One call's tensors, bound to their places.

    Attributes:
        tensors: ``group["params"]``.
        placement: where the parameters lie in them.
        formats: of each tensor's elementwise state.
        row_counts: output rows that begin in each tensor.
        travelling, local: buckets of a matrix rule's matrices that lie on several ranks, and on this one alone.
        shards: this rank's fragments of the former, to be orthogonalized alone; empty where that is never done.
        chunks: runs that an elementwise rule updates at a time.
    """

    binding: Binding
    sharding: ShardingSettings
    tensors: tuple[Tensor, ...]
    placement: Placement
    formats: tuple[StateFormat, ...]
    row_counts: tuple[int, ...]
    travelling: tuple[Bucket, ...]
    local: tuple[Bucket, ...]
    shards: tuple[Bucket, ...]
    chunks: tuple[tuple[Run, ...], ...]

    def allocate(self, rule: Rule, states: Sequence[MutableMapping[str, Any]]) -> None:
        """Enter what is missing of the rule's state."""
        for index, (piece, state) in enumerate(zip(self.tensors, states, strict=True)):
            if "step" in state:
                continue
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for buffer in rule.buffers:
                self.format_of(index, buffer).allocate(state, buffer, piece.detach())
                if buffer.copies_weight:
                    state[buffer.name].copy_(piece.detach())
            if row_buffer := row_buffer_of(rule):
                state[row_buffer] = torch.zeros(self.row_counts[index], dtype=torch.float32, device=piece.device)

    @contextmanager
    def opened(self, rule: Rule, states: Sequence[MutableMapping[str, Any]], runs: Sequence[Run]) -> Iterator[State]:
        """The runs' state in the tensors' dtype, by buffer; changes are stored at the end."""
        values: dict[str, list[Tensor]] = {buffer.name: [] for buffer in rule.buffers}
        for buffer in rule.buffers:
            for r in runs:
                value = self.format_of(r.piece, buffer).read(states[r.piece], buffer, r.start, r.numel)
                values[buffer.name].append(value.to(self.tensors[r.piece].dtype))
        yield values
        for buffer in rule.buffers:
            for run, value in zip(runs, values[buffer.name], strict=True):
                self.format_of(run.piece, buffer).write(states[run.piece], buffer, run.start, value)

    def format_of(self, piece: int, buffer: Buffer) -> StateFormat:
        """How one tensor keeps one buffer."""
        return Plain(self.tensors[piece].dtype) if buffer.copies_weight else self.formats[piece]


def bind_slices(members: Members, tensors: Sequence[Tensor], sharding: ShardingSettings, routing: str) -> Slices:
    """Find the tensors' layout, make the plan and agree on it with the other ranks. Raises LayoutError."""
    binding = bind(members.parameters, [route.name for route in members.routes], tensors)
    routes = [members.routes[i] for i in binding.indices]
    layout = PartitionLayout(binding.world_size, tuple(r.name for r in routes), binding.cuts, tuple(_matrices(routes)))
    starts = tuple(accumulate((piece.numel() for piece in tensors), initial=0))[:-1]
    placement = Placement(layout, binding.rank, starts)
    extents = placement.extents()
    state_dtype = members.settings.state_dtype
    formats = tuple(_format(state_dtype, tensor, extent) for tensor, extent in zip(tensors, extents, strict=True))
    travelling: tuple[Bucket, ...] = ()
    local: tuple[Bucket, ...] = ()
    shards: tuple[Bucket, ...] = ()
    rule = members.rule
    if isinstance(rule, MatrixRule):
        cost = rule.cost
        plan = make_plan(layout, lambda matrix: cost(matrix.rows, matrix.cols), sharding.bucket_numel)
        builder = _BucketBuilder(plan, rule, binding, sharding, placement, state_dtype == "8bit")
        if sharding.travels:
            travelling = builder.build(exchange_buckets(plan, binding.rank, builder.row_words))
        local = builder.build(local_buckets(plan, binding.rank, builder.row_words))
        if sharding.mode == "shard_local":
            found = shard_buckets(plan, binding.rank, builder.row_words)
            shards = builder.build(found, alone=True)
            warn_of_thin_shards(layout, [fragment for bucket in found for fragment in bucket.fragments], binding.rank)
    else:
        plan = make_plan(layout, lambda matrix: 0, sharding.bucket_numel)
    require_agreement(plan, f"sharding {sharding}\n{routing}", binding)
    parts = _chunks(extents, tensors, members)
    row_counts = tuple(placement.row_counts())
    return Slices(binding, sharding, tuple(tensors), placement, formats, row_counts, travelling, local, shards, parts)


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


def warn_of_thin_shards(layout: PartitionLayout, fragments: Sequence[Fragment], rank: int) -> None:
    """One line on the first rank: orthogonalizing few rows alone is little more than normalising them."""
    rows = {f.matrix: f.numel // layout.matrices[f.matrix].cols for f in fragments}
    thin = [matrix for matrix, count in rows.items() if count < min(THIN_ROWS, layout.matrices[matrix].rows)]
    if thin and rank == 0:
        least = min(thin, key=lambda matrix: rows[matrix])
        logger.warning(
            "shard_local: %d of %d matrices have fewer than %d whole rows on this rank (%s: %d), which makes their update "
            "row normalisation rather than Muon; mode 'gather', or gather_every, or fewer ranks, avoid it",
            len(thin),
            len(rows),
            THIN_ROWS,
            layout.describe(least),
            rows[least],
        )


class _BucketBuilder:
    """Turns one rank's buckets of the plan into buckets of its tensors."""

    def __init__(
        self,
        plan: ExchangePlan,
        rule: MatrixRule,
        binding: Binding,
        sharding: ShardingSettings,
        placement: Placement,
        in_blocks: bool,
    ) -> None:
        self._plan, self._rule, self._binding, self._placement = plan, rule, binding, placement
        self._wire: torch.dtype = getattr(torch, sharding.wire_dtype)
        self.row_words = 4 // self._wire.itemsize if rule.row_buffer else 0
        self._row_places = placement.row_places()
        self._in_blocks = in_blocks

    def build(self, buckets: Sequence[RankBucket], alone: bool = False) -> tuple[Bucket, ...]:
        """``alone``: the buckets' fragments are orthogonalized each for itself."""
        batch_numel = self._plan.local_numel  # as in buckets that do not travel
        return tuple(
            Bucket(
                BucketExchange(self._plan.layout, bucket, self._binding, self._wire, batch_numel),
                tuple((*self._placement.place(f.offset), f.numel) for f in bucket.fragments),
                self._parts(bucket),
                tuple(self._row_places[f.matrix] for f in bucket.fragments) if bucket.row_words else (),
                self._norms(bucket) if alone else None,
            )
            for bucket in buckets
        )

    def _norms(self, bucket: RankBucket) -> Tensor:
        """So that a fragment's update has the root mean square that its whole matrix's would have."""
        norms = []
        for fragment in bucket.fragments:
            matrix = self._plan.layout.matrices[fragment.matrix]
            norms.append(self._rule.rms(matrix.rows, matrix.cols, matrix.transposed) * math.sqrt(fragment.numel))
        return torch.tensor(norms, dtype=torch.float32, device=self._binding.device)

    def _parts(self, bucket: RankBucket) -> tuple[Part, ...]:
        """Cut the bucket's fragments into parts."""
        limit = chunk_numel(self._binding.device)
        parts: list[list[tuple[int, int, int, int]]] = []
        room = 0
        for index, (fragment, section) in enumerate(zip(bucket.fragments, bucket.sent, strict=True)):
            begin = self._plan.layout.matrices[fragment.matrix].start + fragment.start if self._in_blocks else 0
            extent = Extent(fragment.offset, fragment.numel, begin)
            for offset, numel in (run for chunk in chunks([extent], limit) for run in chunk):
                if numel > room:
                    parts.append([])
                    room = limit
                parts[-1].append((offset, numel, index, section.position + offset - fragment.offset))
                room -= numel
        return tuple(self._part(items) for items in parts)

    def _part(self, items: Sequence[tuple[int, int, int, int]]) -> Part:
        """Merge what lies side by side in one tensor into runs. items: (offset, numel, fragment, position)."""
        runs: list[Run] = []
        for offset, numel, _, _ in items:
            piece, start = self._placement.place(offset)
            if runs and runs[-1].piece == piece and runs[-1].start + runs[-1].numel == start:
                runs[-1].sizes.append(numel)
            else:
                runs.append(Run(piece, start, [numel]))
        fragments = torch.tensor([index for _, _, index, _ in items], device=self._binding.device)
        return Part(tuple(runs), fragments, tuple(position for _, _, _, position in items))


def chunk_numel(device: torch.device) -> int:
    """The most elements that are read and updated at a time."""
    return _CHUNK_NUMEL.get(device.type, _CHUNK_NUMEL_ELSEWHERE)


def _chunks(extents: Sequence[Sequence[Extent]], tensors: Sequence[Tensor], members: Members) -> tuple[tuple[Run, ...], ...]:
    """A kernel that works in place on full-precision state takes everything in one call; others a bounded part at a time."""
    rule = members.rule
    if not isinstance(rule, ElementwiseRule):
        return ()
    if members.settings.state_dtype == "float32" and rule.in_place:
        return (tuple(Run(piece, 0, [tensor.numel()]) for piece, tensor in enumerate(tensors)),)
    parts: list[list[Run]] = []
    room = 0
    limit = chunk_numel(tensors[0].device)
    for piece, extent in enumerate(extents):
        for offset, numel in (run for chunk in chunks(extent, limit) for run in chunk):
            if numel > room:
                parts.append([])
                room = limit
            parts[-1].append(Run(piece, offset, [numel]))
            room -= numel
    return tuple(map(tuple, parts))
