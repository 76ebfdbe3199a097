"""Moves fragments to the owners of their matrices and updates back, one bucket at a time.

Every fragment is rounded to the wire dtype before orthogonalization and every update after it, even when nothing travels.
An update thus depends on its matrix alone, not on the stage or the world size.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optforge.zero.buckets import BufferPlace, RankBucket
from ds_optforge.zero.layout import Binding, LayoutError
from ds_optforge.zero.partition import Joined, PartitionLayout
from ds_optforge.zero.plan import ExchangePlan

# Stands for a statistic that another rank keeps: the first row of a fragment that is stepped alone may begin there.
NO_STATISTIC = -1.0

# float32 values travel as integers of the wire's size, which no copy rounds: a kernel that copies bfloat16 may go through
# float32, and half of a value may be the pattern of a NaN.
_PATTERNS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, slots=True, eq=False)
class MatrixBatch:
    """Owned matrices of one shape.

    Attributes:
        matrices: (n, rows, cols) in the wire dtype.
        active: (n,) 1 for a matrix with any gradient that is not zero, else 0; in the wire dtype.
        statistics: one for each of the rule's: (n, outputs) or (n, 1) in float32, negative where another rank keeps a value.
        transposed: whether the matrices are stored (in, out).
    """

    matrices: Tensor
    active: Tensor
    statistics: tuple[Tensor, ...]
    transposed: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Owned matrices of one shape: the places of their fragments in the receive buffer.

    Attributes:
        count: number of matrices.
        places: of all of their fragments.
        slots: for each fragment, its matrix's number in the batch; ``slot_index`` is the same as a tensor.
        flag_index: for each fragment, the place of its flag.
        start: of the batch in the receive buffer if its elements lie there in order, else -1.
        partial: whether fragments of a matrix are missing, so that the rest is zeros.
        folds: number of blocks of columns in which the elements of a matrix are counted.
        joins: the matrices that each of them joins; None if it is one itself.
    """

    rows: int
    cols: int
    transposed: bool
    count: int
    places: tuple[BufferPlace, ...]
    slots: tuple[int, ...]
    slot_index: Tensor
    flag_index: Tensor
    start: int
    partial: bool
    folds: int
    joins: Joined | None

    @property
    def numel(self) -> int:
        return self.count * self.rows * self.cols

    def folded(self, elements: Tensor) -> Tensor:
        """Return (n, rows, cols) matrices from their elements as these are counted, in the same shape."""
        if self.folds == 1:
            return elements
        blocks = elements.view(self.count, self.folds, self.rows, self.cols // self.folds)
        return blocks.transpose(1, 2).reshape(self.count, self.rows, self.cols)

    def parted(self, matrices: Tensor) -> Tensor:
        """Return the (n parts, rows, cols) matrices that (n, rows, cols) ones join, those of one matrix after each other."""
        if self.joins is None:
            return matrices
        turns = (self.count, -1, self.joins.parts, self.joins.block)
        if self.transposed:
            apart = matrices.mT.reshape(*turns, self.rows).transpose(1, 2)
            return apart.reshape(self.count * self.joins.parts, -1, self.rows).mT.contiguous()
        return matrices.reshape(*turns, self.cols).transpose(1, 2).reshape(self.count * self.joins.parts, -1, self.cols)

    def together(self, parts: Tensor) -> Tensor:
        """Undo `parted`."""
        if self.joins is None:
            return parts
        apart = (self.count, self.joins.parts, -1, self.joins.block)
        if self.transposed:
            turns = parts.mT.reshape(*apart, self.rows).transpose(1, 2)
            return turns.reshape(self.count, self.cols, self.rows).mT
        return parts.reshape(*apart, self.cols).transpose(1, 2).reshape(self.count, self.rows, self.cols)

    def parted_values(self, values: Tensor) -> Tensor:
        """Return (n parts, outputs) values of the outputs of the parts, from (n, outputs) of the matrices."""
        if self.joins is None:
            return values
        turns = values.reshape(self.count, -1, self.joins.parts, self.joins.block).transpose(1, 2)
        return turns.reshape(self.count * self.joins.parts, -1)

    def values_together(self, values: Tensor) -> Tensor:
        """Undo `parted_values`."""
        if self.joins is None:
            return values
        apart = values.reshape(self.count, self.joins.parts, -1, self.joins.block).transpose(1, 2)
        return apart.reshape(self.count, -1)

    def unfolded(self, matrices: Tensor) -> Tensor:
        """Undo `folded`."""
        if self.folds == 1:
            return matrices
        blocks = matrices.reshape(self.count, self.rows, self.folds, self.cols // self.folds)
        return blocks.transpose(1, 2).reshape(self.count, self.rows, self.cols)


class BucketExchange:
    """Exchange of one bucket: fragments travel to the owners of their matrices, and updates return.

    The order of a step is ``open``, ``collect``, ``arrive``, ``matrices`` and ``put`` for each batch, ``give_back``,
    ``updates``, ``returned_statistics``, ``release``. The caller fills ``outgoing`` between ``open`` and ``collect``. The
    collectives are asynchronous; their buffers stay referenced until they are waited for. The object is built once and used
    in every step; a bucket that does not travel takes the same steps without collectives.

    Args:
        layout: of the group.
        bucket: this rank's share of the bucket.
        binding: tells the process group and the device.
        wire: dtype in which fragments and updates travel.
        batch_numel: most elements of a batch of matrices (or one matrix); bounds the workspace of orthogonalization.
    """

    def __init__(
        self, layout: PartitionLayout, bucket: RankBucket, binding: Binding, wire: torch.dtype, batch_numel: int
    ) -> None:
        self.bucket = bucket
        self._binding = binding
        self._wire = wire
        self._pattern = _PATTERNS[wire.itemsize]
        self._flag_index = _index([place.flag for place in bucket.sent], binding.device)
        self._batches = _batches(layout, bucket, binding.device, batch_numel)
        self._work: dist.Work | None = None
        self.release()

    @property
    def batches(self) -> range:
        """Numbers of the batches of owned matrices."""
        return range(len(self._batches))

    @property
    def outgoing(self) -> Tensor:
        """The send buffer, (send_numel,): fragment i lies at ``bucket.sent[i].position``, and its update returns there."""
        return self._send

    def open(self) -> None:
        """Allocate the send buffer, uninitialized."""
        self._send = torch.empty(self.bucket.send_numel, dtype=self._wire, device=self._binding.device)

    def collect(self, active: Tensor, statistics: Sequence[Tensor]) -> None:
        """Start sending the elements in ``outgoing`` to the owners of the matrices. Collective if the bucket travels.

        Args:
            active: (fragments,) 1 where the norm of the fragment's gradient is not zero, else 0.
            statistics: for each fragment, and each statistic of the rule in turn, the (values,) kept with it in float32;
                empty without statistics.
        """
        bucket = self.bucket
        if bucket.sent:
            self._send[self._flag_index] = active.to(self._send)
        if statistics:
            into = self._statistics(self._send, bucket.sent)
            torch._foreach_copy_(into, [values.view(self._pattern) for values in statistics])
        if bucket.travels:
            self._receive = torch.empty(bucket.receive_numel, dtype=self._wire, device=self._binding.device)
            self._work = self._all_to_all(self._receive, self._send, bucket.receives, bucket.sends)
        else:
            self._receive = self._send

    def arrive(self) -> None:
        """Wait for the fragments, and free the send buffer, which is not needed until `give_back`."""
        if self._work is not None:
            self._wait()
            self._send = self._send.new_empty(0)

    def owned(self, index: int) -> tuple[int, ...]:
        """Return the numbers in the layout of the matrices of batch ``index``, in order; for parts that of what joins them."""
        batch = self._batches[index]
        matrices = dict(zip(batch.slots, (place.matrix for place in batch.places), strict=True)).values()
        return tuple(matrix for matrix in matrices for _ in range(batch.joins.parts if batch.joins else 1))

    def matrices(self, index: int) -> MatrixBatch:
        """Return batch ``index`` of the owned matrices after ``arrive``; the caller may overwrite it."""
        batch = self._batches[index]
        if batch.start >= 0:
            matrices = self._receive.narrow(0, batch.start, batch.numel).view(batch.count, batch.rows, batch.cols)
        else:
            fill = self._receive.new_zeros if batch.partial else self._receive.new_empty
            matrices = fill(batch.count, batch.rows, batch.cols)
            torch._foreach_copy_(_elements_within(batch, matrices), self._elements(self._receive, batch.places))
        matrices = batch.folded(matrices)
        active = self._receive.new_zeros(batch.count)
        active.scatter_reduce_(0, batch.slot_index, self._receive[batch.flag_index], "amax")
        outputs = batch.cols if batch.transposed else batch.rows
        statistics = tuple(
            torch.full((batch.count, outputs if per == "row" else 1), NO_STATISTIC, dtype=torch.float32, device=matrices.device)
            for per in self.bucket.kept.per
        )
        if statistics:
            inside = _values_within(batch, statistics, self._pattern)
            torch._foreach_copy_(inside, self._statistics(self._receive, batch.places))
        if batch.joins:
            active, matrices = active.repeat_interleave(batch.joins.parts), batch.parted(matrices)
            statistics = tuple(map(batch.parted_values, statistics))
        return MatrixBatch(matrices, active, statistics, batch.transposed)

    def put(self, index: int, updates: Tensor, given: MatrixBatch) -> None:
        """Put updates in the place of a batch of matrices.

        Args:
            index: number of the batch.
            updates: (n, rows, cols), of any dtype; rounded to the wire's.
            given: what `matrices` returned for it, with its statistics advanced.
        """
        batch = self._batches[index]
        elements = _elements_within(batch, batch.unfolded(batch.together(updates)))
        torch._foreach_copy_(self._elements(self._receive, batch.places), elements)
        active = given.active[:: batch.joins.parts] if batch.joins else given.active
        self._receive[batch.flag_index] = active[batch.slot_index]
        if given.statistics:
            places = _values_within(batch, tuple(map(batch.values_together, given.statistics)), self._pattern)
            torch._foreach_copy_(self._statistics(self._receive, batch.places), places)

    def give_back(self) -> None:
        """Start returning the updates and statistics that were `put`. Collective if the bucket travels."""
        if self.bucket.travels:
            self.open()
            self._work = self._all_to_all(self._send, self._receive, self.bucket.sends, self.bucket.receives)

    def updates(self) -> tuple[list[Tensor], Tensor]:
        """Wait for the updates.

        Returns:
            One flat view of the send buffer per fragment, (elements,) in the wire dtype; and (fragments,) flags, 1 where the
            fragment's matrix is active, else 0.
        """
        self._wait()
        return self._elements(self._send, self.bucket.sent), self._send[self._flag_index]

    def returned_statistics(self, into: Sequence[Tensor]) -> None:
        """Write the statistics that came back, after ``updates``, ``into`` the (values,) float32 tensors as in `collect`."""
        if into:
            patterns = [values.view(self._pattern) for values in into]
            torch._foreach_copy_(patterns, self._statistics(self._send, self.bucket.sent))

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

    def _elements(self, buffer: Tensor, places: Sequence[BufferPlace]) -> list[Tensor]:
        return [buffer.narrow(0, place.position, place.within.numel) for place in places]

    def _statistics(self, buffer: Tensor, places: Sequence[BufferPlace]) -> list[Tensor]:
        """Return views of the statistics' bit patterns: a float32 value is two elements of a bfloat16 buffer."""
        words, patterns = self.bucket.kept.words, buffer.view(self._pattern)
        return [patterns.narrow(0, v.position, v.within.numel * words) for place in places for v in place.statistics]


def _elements_within(batch: _Batch, matrices: Tensor) -> list[Tensor]:
    """Return flat views of the fragments' elements in (n, rows, cols) matrices."""
    flat = matrices.reshape(batch.count, -1)
    return [flat[slot].narrow(0, s.within.start, s.within.numel) for slot, s in zip(batch.slots, batch.places, strict=True)]


def _values_within(batch: _Batch, statistics: Sequence[Tensor], pattern: torch.dtype) -> list[Tensor]:
    """Return views of the fragments' values in (n, outputs) or (n, 1) float32 statistics, as integers of that dtype."""
    return [
        kept[slot].narrow(0, values.within.start, values.within.numel).view(pattern)
        for slot, place in zip(batch.slots, batch.places, strict=True)
        for kept, values in zip(statistics, place.statistics, strict=True)
    ]


def _index(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)


def _batches(layout: PartitionLayout, bucket: RankBucket, device: torch.device, batch_numel: int) -> list[_Batch]:
    """Group a bucket's owned matrices by shape, at most ``batch_numel`` elements (or one matrix) at a time."""
    places: dict[int, list[BufferPlace]] = {}
    for place in bucket.received:
        places.setdefault(place.matrix, []).append(place)
    by_shape: dict[tuple[int, int, bool, int, Joined | None], list[int]] = {}
    for index, shape, folds in zip(bucket.owned, bucket.shapes, bucket.folds, strict=True):
        matrix = layout.matrices[index]
        by_shape.setdefault((*shape, matrix.transposed, folds, matrix.joins), []).append(index)
    batches = []
    for (rows, cols, transposed, folds, joins), matrices in by_shape.items():
        size = max(1, batch_numel // (rows * cols))
        for first in range(0, len(matrices), size):
            members = matrices[first : first + size]
            batches.append(_batch((rows, cols), transposed, [places[matrix] for matrix in members], device, folds, joins))
    return batches


def _batch(
    shape: tuple[int, int],
    transposed: bool,
    members: Sequence[Sequence[BufferPlace]],
    device: torch.device,
    folds: int,
    joins: Joined | None,
) -> _Batch:
    numel = shape[0] * shape[1]
    places = tuple(place for member in members for place in member)
    slots = tuple(slot for slot, member in enumerate(members) for _ in member)
    # What tensor parallelism does not cut arrives from each tensor rank, alike.
    partial = any(sum(within.numel for within in {place.within for place in member}) < numel for member in members)
    first = places[0].position
    whole = [place.position for place in places] == [first + numel * slot for slot in range(len(members))]
    slot_index, flag_index = _index(slots, device), _index([place.flag for place in places], device)
    start = first if whole and not partial else -1
    return _Batch(*shape, transposed, len(members), places, slots, slot_index, flag_index, start, partial, folds, joins)


def sum_over_ranks(values: Tensor, binding: Binding) -> None:
    """Add up ``values``, of any shape, in place over the binding's process group. Collective."""
    if binding.process_group is not None and binding.world_size > 1:
        dist.all_reduce(values, group=binding.process_group)


def any_rank(found: bool, binding: Binding) -> bool:
    """Return whether any rank of the binding's process group has ``found`` something. Collective."""
    if binding.process_group is None or binding.world_size == 1:
        return found
    flag = torch.tensor(float(found), device=binding.device)
    dist.all_reduce(flag, group=binding.process_group)
    return bool(flag.item())


def require_agreement(plan: ExchangePlan, routing: str, binding: Binding) -> None:
    """Raise on every rank unless all made the same plan from the same configuration, and none has a problem. Collective.

    It costs one small all-reduce; tables travel only to name a difference.

    Args:
        plan: this rank's.
        routing: a text with a line per parameter of the whole optimizer: which rule it gets, with which settings.
        binding: tells the process group, and this rank's problem.

    Raises:
        LayoutError: a problem of any rank, or a difference; it names the first line of the routing, or the first matrix,
            that differs between ranks.
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
