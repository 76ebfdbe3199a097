"""Moves fragments to the owners of their matrices and updates back, one bucket at a time.

Every fragment is rounded to the wire dtype on its way in and on its way out, also when it does not travel: so an update
depends on its matrix alone, not on stage or world size.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optforge.zero.layout import Binding, LayoutError
from ds_optforge.zero.plan import ExchangePlan, PartitionLayout, RankBucket, Section


@dataclass(frozen=True, slots=True, eq=False)
class MatrixBatch:
    """Owned matrices of one shape.

    Attributes:
        matrices: (n, rows, cols) in the wire dtype.
        active: (n,) 1 for a matrix with any gradient that is not zero, else 0; in the wire dtype.
        rows: (n, outputs) row statistics in float32; (n, 0) when the rule has none.
        transposed: the matrices are stored (in, out).
    """

    matrices: Tensor
    active: Tensor
    rows: Tensor
    transposed: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Shape:
    """Which sections make up the owned matrices of one shape, and each section's matrix's place in the batch."""

    rows: int
    cols: int
    transposed: bool
    count: int
    sections: tuple[Section, ...]
    slots: tuple[int, ...]
    slot_index: Tensor
    flag_index: Tensor


class BucketExchange:
    """One bucket's way out and back: ``collect`` -> ``matrices`` -> ``give_back`` -> ``updates`` -> ``release``.

    Built once, used every step. The collectives are asynchronous; their buffers are referenced from ``collect`` until
    ``release``, so they outlive both.
    """

    def __init__(self, layout: PartitionLayout, bucket: RankBucket, binding: Binding, wire: torch.dtype) -> None:
        self.bucket = bucket
        self._binding = binding
        self._wire = wire
        self._flag_index = _index([section.flag for section in bucket.sent], binding.device)
        self._shapes = _shapes(layout, bucket, binding.device)
        self._work: dist.Work | None = None
        self.release()

    def collect(self, fragments: Sequence[Tensor], active: Tensor, rows: Sequence[Tensor]) -> None:
        """Start sending every fragment to the owner of its matrix.

        Args:
            fragments: flat, in the order of ``bucket.fragments``; rounded to the wire dtype.
            active: (fragments,) 1 where any element of the fragment's gradient is not zero, else 0.
            rows: float32 statistics of the output rows that begin in each fragment; empty when the rule has none.
        """
        bucket, device = self.bucket, self._binding.device
        self._send = torch.empty(bucket.send_numel, dtype=self._wire, device=device)
        if fragments:
            torch._foreach_copy_(self._elements(self._send, bucket.sent), list(fragments))
            self._send[self._flag_index] = active.to(self._send)
        if rows:
            torch._foreach_copy_(self._statistics(self._send, bucket.sent), [row.view(self._wire) for row in rows])
        if bucket.travels:
            self._receive = torch.empty(bucket.receive_numel, dtype=self._wire, device=device)
            self._work = self._all_to_all(self._receive, self._send, bucket.receives, bucket.sends)
        else:
            self._receive = self._send

    def matrices(self) -> list[MatrixBatch]:
        """Wait for the fragments; return the owned matrices, one batch per shape."""
        self._wait()
        batches = []
        for shape in self._shapes:
            matrices = self._receive.new_empty(shape.count, shape.rows, shape.cols)
            torch._foreach_copy_(_element_places(shape, matrices), self._elements(self._receive, shape.sections))
            active = self._receive.new_zeros(shape.count)
            active.scatter_reduce_(0, shape.slot_index, self._receive[shape.flag_index], "amax")
            outputs = (shape.cols if shape.transposed else shape.rows) if self.bucket.row_words else 0
            rows = torch.empty(shape.count, outputs, dtype=torch.float32, device=matrices.device)
            if outputs:
                places = _statistic_places(shape, rows, self._wire)
                torch._foreach_copy_(places, self._statistics(self._receive, shape.sections))
            batches.append(MatrixBatch(matrices, active, rows, shape.transposed))
        return batches

    def give_back(self, batches: Sequence[MatrixBatch]) -> None:
        """Start returning ``matrices()`` with the updates in place of the matrices, and their statistics."""
        for shape, batch in zip(self._shapes, batches, strict=True):
            torch._foreach_copy_(self._elements(self._receive, shape.sections), _element_places(shape, batch.matrices))
            self._receive[shape.flag_index] = batch.active[shape.slot_index]
            if self.bucket.row_words:
                places = _statistic_places(shape, batch.rows, self._wire)
                torch._foreach_copy_(self._statistics(self._receive, shape.sections), places)
        if self.bucket.travels:
            self._work = self._all_to_all(self._send, self._receive, self.bucket.sends, self.bucket.receives)

    def updates(self) -> tuple[list[Tensor], Tensor]:
        """Wait for the updates; return one flat view per fragment and the (fragments,) flags of their matrices."""
        self._wait()
        return self._elements(self._send, self.bucket.sent), self._send[self._flag_index]

    def returned_rows(self, into: Sequence[Tensor]) -> None:
        """Write the returned statistics of each fragment's rows into float32 tensors, after ``updates``."""
        if into:
            torch._foreach_copy_([row.view(self._wire) for row in into], self._statistics(self._send, self.bucket.sent))

    def release(self) -> None:
        """Free the buffers."""
        self._send = self._receive = torch.empty(0, dtype=self._wire, device=self._binding.device)

    def _all_to_all(self, out: Tensor, into: Tensor, out_splits: Sequence[int], in_splits: Sequence[int]) -> dist.Work:
        group = self._binding.process_group
        work: dist.Work | None = dist.all_to_all_single(
            out, into, list(out_splits), list(in_splits), group=group, async_op=True
        )
        assert work is not None  # asynchronous, and this rank belongs to the group
        return work

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None

    def _elements(self, buffer: Tensor, sections: Sequence[Section]) -> list[Tensor]:
        return [buffer.narrow(0, section.position, section.numel) for section in sections]

    def _statistics(self, buffer: Tensor, sections: Sequence[Section]) -> list[Tensor]:
        """Bit patterns: a float32 statistic is two elements of a bfloat16 buffer."""
        words = self.bucket.row_words
        return [buffer.narrow(0, section.row_position, section.rows * words) for section in sections]


def _element_places(shape: _Shape, matrices: Tensor) -> list[Tensor]:
    """The sections' elements in (n, rows, cols) matrices."""
    flat = matrices.reshape(shape.count, -1)
    return [flat[slot].narrow(0, s.start, s.numel) for slot, s in zip(shape.slots, shape.sections, strict=True)]


def _statistic_places(shape: _Shape, rows: Tensor, wire: torch.dtype) -> list[Tensor]:
    """The sections' statistics in (n, outputs) float32 rows, seen as elements of the wire dtype."""
    places = zip(shape.slots, shape.sections, strict=True)
    return [rows[slot].narrow(0, section.first_row, section.rows).view(wire) for slot, section in places]


def _index(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)


def _shapes(layout: PartitionLayout, bucket: RankBucket, device: torch.device) -> list[_Shape]:
    """Group the sections of a bucket's owned matrices by shape."""
    by_shape: dict[tuple[int, int, bool], list[Section]] = {}
    for section in bucket.received:
        matrix = layout.matrices[section.matrix]
        by_shape.setdefault((matrix.rows, matrix.cols, matrix.transposed), []).append(section)
    shapes = []
    for (rows, cols, transposed), sections in by_shape.items():
        place: dict[int, int] = {}
        slots = tuple(place.setdefault(section.matrix, len(place)) for section in sections)
        slot_index, flag_index = _index(slots, device), _index([section.flag for section in sections], device)
        shapes.append(_Shape(rows, cols, transposed, len(place), tuple(sections), slots, slot_index, flag_index))
    return shapes


def require_agreement(plan: ExchangePlan, routing: str, binding: Binding) -> None:
    """Raise on every rank unless all made the same plan from the same configuration, and none has a problem.

    One small all-reduce; tables travel only to name a difference.

    Args:
        plan: this rank's.
        routing: a text with a line per parameter of the whole optimizer: which rule it gets, with which settings.
        binding: tells the process group.

    Raises:
        LayoutError: names the first line of the routing, or the first matrix, that differs between ranks.
    """
    group = binding.process_group
    if group is None or binding.world_size == 1:
        if binding.problem:
            raise LayoutError(binding.problem)
        return
    digest = int(hashlib.sha256((plan.fingerprint + routing + binding.problem).encode()).hexdigest()[:15], 16)
    extremes = torch.tensor([digest, -digest], dtype=torch.long, device=binding.device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MIN, group=group)
    lowest, highest = extremes[0].item(), -extremes[1].item()
    if lowest != highest:
        raise LayoutError(_first_difference(plan, routing, binding))


def _first_difference(plan: ExchangePlan, routing: str, binding: Binding) -> str:
    table = [binding.problem or "nothing wrong", *routing.splitlines()]
    for matrix, owner in enumerate(plan.owners):
        table.append(f"{plan.layout.describe(matrix)}, orthogonalized by rank {owner}")
    table.append(f"exchanges {plan.exchanges}, bucket_numel {plan.bucket_numel}")
    tables: list[list[str]] = [[] for _ in range(binding.world_size)]
    dist.all_gather_object(tables, table, group=binding.process_group)
    for line in range(max(map(len, tables))):
        lines = [other[line] if line < len(other) else "nothing" for other in tables]
        for rank, text in enumerate(lines):
            if text != lines[0]:
                return f"ranks disagree on the plan: rank 0 has '{lines[0]}', rank {rank} has '{text}'"
    return "ranks disagree on the layout of the group's parameters"
