"""Moves fragments to the owners of their matrices and updates back, one bucket at a time.

Every fragment is rounded to the wire dtype before orthogonalization and every update after it, even when nothing travels.
An update thus depends on its matrix alone, not on the stage or the world size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optforge.zero.buckets import BufferPlace, RankBucket
from ds_optforge.zero.layout import Binding
from ds_optforge.zero.partition import Joined, PartitionLayout
from ds_optforge.zero.views import Views

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
        has_all: whether no statistic is another rank's.
    """

    matrices: Tensor
    active: Tensor
    statistics: tuple[Tensor, ...]
    transposed: bool
    has_all: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Owned matrices of one shape: the places of their fragments in the receive buffer.

    Attributes:
        count: number of matrices.
        numbers: of each matrix in the layout.
        received: views of all of their fragments in the receive buffer.
        inside: views of the same elements in the flat matrices.
        values_received: views of the fragments' values in the receive buffer, by statistic.
        values_inside: views of the same values in the flat statistics.
        first: number of the first matrix among all that the rank owns of the bucket, in the order of the batches.
        flags: for each fragment, its matrix's number in the batch and the place of its flag in the receive buffer.
        start: of the batch in the receive buffer if its elements lie there in order, else -1.
        partial: whether fragments of a matrix are missing, so that the rest is zeros.
        lacks_values: whether another rank keeps some of the statistics' values.
        folds: number of blocks of columns in which the elements of a matrix are counted.
        joins: the matrices that each of them joins; None if it is one itself.
    """

    rows: int
    cols: int
    transposed: bool
    count: int
    numbers: tuple[int, ...]
    received: Views
    inside: Views
    values_received: Views
    values_inside: Views
    first: int
    flags: tuple[tuple[int, int], ...]
    start: int
    partial: bool
    lacks_values: bool
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
    ``await_updates``, ``returned_statistics``, ``release``. The caller fills ``outgoing`` between ``open`` and ``collect``. The
    collectives are asynchronous; their buffers stay referenced until they are waited for. The object is built once and used
    in every step; a bucket that does not travel takes the same steps without collectives.

    Args:
        layout: of the group.
        bucket: this rank's share of the bucket.
        binding: tells the process group and the device.
        wire: dtype in which fragments and updates travel.
        batch_numel: most elements of a batch of matrices (or one matrix); bounds the workspace of orthogonalization.
        near: device of the stepped tensors: with CPU offload not that of the weights. What is sent then goes through a buffer
            there, by one copy each way.

    Attributes:
        pattern: the integer dtype of the wire's size, in which the bits of statistics travel.
    """

    def __init__(
        self,
        layout: PartitionLayout,
        bucket: RankBucket,
        binding: Binding,
        wire: torch.dtype,
        batch_numel: int,
        near: torch.device,
    ) -> None:
        self.bucket = bucket
        self._near, self._staged = near, is_staged(near, binding.device)
        self._binding = binding
        self._wire = wire
        self.pattern = _PATTERNS[wire.itemsize]
        self._flag_index = _index([place.flag for place in bucket.sent], near)
        self._sent = Views([(0, place.position, place.within.numel) for place in bucket.sent])
        self._values_sent = _values_in_buffer(bucket, bucket.sent)
        self._batches = _batches(layout, bucket, batch_numel)
        flags: dict[int, list[int]] = {}
        for batch in self._batches:
            for slot, flag in batch.flags:
                flags.setdefault(batch.first + slot, []).append(flag)
        # A matrix with fewer fragments than others counts its last flag more than once.
        most = max(map(len, flags.values()), default=1)
        filled = [places + places[-1:] * (most - len(places)) for places in flags.values()]
        self._owned_flags = _index(filled, binding.device).view(len(filled), most)
        self._work: dist.Work | None = None
        self.release()

    @property
    def batches(self) -> range:
        """Numbers of the batches of owned matrices."""
        return range(len(self._batches))

    @property
    def outgoing(self) -> Tensor:
        """The send buffer, (send_numel,): fragment i lies at ``bucket.sent[i].position``, and its update returns there.

        It is on the device of the stepped tensors.
        """
        return self._outgoing

    def open(self) -> None:
        """Allocate the send buffer, uninitialized."""
        # From pinned memory a copy makes nobody wait; torch keeps it until that is done.
        pinned = self._staged and torch.accelerator.is_available()
        self._outgoing = torch.empty(self.bucket.send_numel, dtype=self._wire, device=self._near, pin_memory=pinned)

    def _empty(self, numel: int) -> Tensor:
        return torch.empty(numel, dtype=self._wire, device=self._binding.device)

    def collect(self, active: Tensor, statistics: Sequence[Tensor]) -> None:
        """Start sending the elements in ``outgoing`` to the owners of the matrices. Collective if the bucket travels.

        Args:
            active: (fragments,) in the wire dtype: 1 where the norm of the fragment's gradient is not zero, else 0.
            statistics: for each statistic of the rule, and each fragment in turn, the (values,) kept with it, as ``pattern``;
                without those that are empty.
        """
        bucket = self.bucket
        if bucket.sent:
            self._outgoing[self._flag_index] = active
        if statistics:
            torch._foreach_copy_(self._values_sent.of([self._outgoing.view(self.pattern)]), list(statistics))
        self._send = self._outgoing
        if self._staged:
            self._send = self._empty(bucket.send_numel).copy_(self._outgoing, non_blocking=True)
        if bucket.travels:
            self._receive = self._empty(bucket.receive_numel)
            self._work = self._all_to_all(self._receive, self._send, bucket.receives, bucket.sends)
        else:
            self._receive = self._send
            self._join_flags()

    def arrive(self) -> None:
        """Wait for the fragments, and free the send buffer, which is not needed until `give_back`."""
        if self._work is not None:
            self._wait()
            self._send = self._outgoing = self._empty(0)
            self._join_flags()

    def _join_flags(self) -> None:
        """Read which owned matrices are active, (matrices,): any of their fragments is. All fragments are to be told."""
        found = self._receive[self._owned_flags]
        if found.shape[1] == 1:
            self._active = found.view(-1)
        elif len(found):
            self._active = found.amax(1)
            self._receive[self._owned_flags] = self._active.view(-1, 1)

    def owned(self, index: int) -> tuple[int, ...]:
        """Return the numbers in the layout of the matrices of batch ``index``, in order; for parts that of what joins them."""
        batch = self._batches[index]
        return tuple(matrix for matrix in batch.numbers for _ in range(batch.joins.parts if batch.joins else 1))

    def matrices(self, index: int) -> MatrixBatch:
        """Return batch ``index`` of the owned matrices after ``arrive``; the caller may overwrite it."""
        batch = self._batches[index]
        if batch.start >= 0:
            matrices = self._receive.narrow(0, batch.start, batch.numel).view(batch.count, batch.rows, batch.cols)
        else:
            fill = self._receive.new_zeros if batch.partial else self._receive.new_empty
            matrices = fill(batch.count, batch.rows, batch.cols)
            torch._foreach_copy_(batch.inside.of([matrices.view(-1)]), batch.received.of([self._receive]))
        matrices = batch.folded(matrices)
        active = self._active.narrow(0, batch.first, batch.count)
        outputs = batch.cols if batch.transposed else batch.rows
        shapes = [(batch.count, outputs if per == "row" else 1) for per in self.bucket.kept.per]
        statistics = tuple(torch.empty(shape, dtype=torch.float32, device=matrices.device) for shape in shapes)
        if batch.lacks_values:
            for kept in statistics:
                kept.fill_(NO_STATISTIC)
        if statistics:
            inside = batch.values_inside.of([kept.view(self.pattern).view(-1) for kept in statistics])
            torch._foreach_copy_(inside, batch.values_received.of([self._receive.view(self.pattern)]))
        if batch.joins:
            active, matrices = active.repeat_interleave(batch.joins.parts), batch.parted(matrices)
            statistics = tuple(map(batch.parted_values, statistics))
        return MatrixBatch(matrices, active, statistics, batch.transposed, not batch.lacks_values)

    def put(self, index: int, updates: Tensor, given: MatrixBatch) -> None:
        """Put updates in the place of a batch of matrices.

        Args:
            index: number of the batch.
            updates: (n, rows, cols), of any dtype; rounded to the wire's.
            given: what `matrices` returned for it, with its statistics advanced.
        """
        batch = self._batches[index]
        elements = batch.unfolded(batch.together(updates)).reshape(-1)
        if batch.start >= 0:
            self._receive.narrow(0, batch.start, batch.numel).copy_(elements)
        else:
            torch._foreach_copy_(batch.received.of([self._receive]), batch.inside.of([elements]))
        if given.statistics:
            values = [batch.values_together(kept).contiguous().view(self.pattern).view(-1) for kept in given.statistics]
            received = batch.values_received.of([self._receive.view(self.pattern)])
            torch._foreach_copy_(received, batch.values_inside.of(values))

    def give_back(self) -> None:
        """Start returning the updates and statistics that were `put`. Collective if the bucket travels."""
        if self.bucket.travels:
            self._send = self._empty(self.bucket.send_numel)
            self._work = self._all_to_all(self._send, self._receive, self.bucket.sends, self.bucket.receives)

    def await_updates(self) -> None:
        """Wait for the updates, which are then in ``outgoing``; its flags tell which fragments' matrices are active."""
        self._wait()
        if self._staged:
            self.open()
            self._outgoing.copy_(self._send)  # and wait for it
        else:
            self._outgoing = self._send

    def elements(self) -> list[Tensor]:
        """Return one flat view of ``outgoing`` per fragment, (elements,) in the wire dtype."""
        return self._sent.of([self._outgoing])

    def returned_statistics(self, into: Sequence[Tensor]) -> None:
        """Write the statistics that came back, after ``await_updates``, ``into`` the tensors that `collect` took them from."""
        if into:
            torch._foreach_copy_(list(into), self._values_sent.of([self._outgoing.view(self.pattern)]))

    def release(self) -> None:
        """Free the buffers."""
        self._outgoing = self._send = self._receive = self._active = self._empty(0)

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


def is_staged(near: torch.device, device: torch.device) -> bool:
    """Whether tensors ``near`` are sent through a buffer of their own, since matrices are orthogonalized on ``device``."""
    return near != device


def _values_in_buffer(bucket: RankBucket, places: Sequence[BufferPlace]) -> Views:
    """Return views of the statistics' bit patterns in a buffer: a float32 value is two elements of a bfloat16 buffer."""
    words = bucket.kept.words
    values = [place.statistics[number] for number in range(len(bucket.kept.per)) for place in places]
    return Views([(0, found.position, found.within.numel * words) for found in values])


def _index(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)


def _batches(layout: PartitionLayout, bucket: RankBucket, batch_numel: int) -> list[_Batch]:
    """Group a bucket's owned matrices by shape, at most ``batch_numel`` elements (or one matrix) at a time."""
    places: dict[int, list[BufferPlace]] = {}
    for place in bucket.received:
        places.setdefault(place.matrix, []).append(place)
    by_shape: dict[tuple[int, int, bool, int, Joined | None], list[int]] = {}
    for index, shape, folds in zip(bucket.owned, bucket.shapes, bucket.folds, strict=True):
        matrix = layout.matrices[index]
        by_shape.setdefault((*shape, matrix.transposed, folds, matrix.joins), []).append(index)
    batches: list[_Batch] = []
    before = 0
    for (rows, cols, transposed, folds, joins), matrices in by_shape.items():
        size = max(1, batch_numel // (rows * cols))
        for first in range(0, len(matrices), size):
            members = matrices[first : first + size]
            found = [places[matrix] for matrix in members]
            batches.append(_batch(bucket, (rows, cols), transposed, found, before, folds, joins))
            before += len(members)
    return batches


def _batch(
    bucket: RankBucket,
    shape: tuple[int, int],
    transposed: bool,
    members: Sequence[Sequence[BufferPlace]],
    before: int,
    folds: int,
    joins: Joined | None,
) -> _Batch:
    numel = shape[0] * shape[1]
    placed = [(slot, place) for slot, member in enumerate(members) for place in member]
    places = [place for _, place in placed]
    # What tensor parallelism does not cut arrives from each tensor rank, alike.
    partial = any(sum(within.numel for within in {place.within for place in member}) < numel for member in members)
    first = places[0].position
    whole = [place.position for place in places] == [first + numel * slot for slot in range(len(members))]
    words, outputs = bucket.kept.words, shape[1] if transposed else shape[0]
    values_inside = [
        (number, words * (slot * (outputs if per == "row" else 1) + place.statistics[number].within.start), values * words)
        for number, per in enumerate(bucket.kept.per)
        for slot, place in placed
        if (values := place.statistics[number].within.numel)
    ]
    wanted = words * len(members) * sum(outputs if per == "row" else 1 for per in bucket.kept.per)
    return _Batch(
        *shape,
        transposed,
        len(members),
        tuple(member[0].matrix for member in members),
        received=Views([(0, place.position, place.within.numel) for place in places]),
        inside=Views([(0, slot * numel + place.within.start, place.within.numel) for slot, place in placed]),
        values_received=_values_in_buffer(bucket, places),
        values_inside=Views(values_inside),
        first=before,
        flags=tuple((slot, place.flag) for slot, place in placed),
        start=first if whole and not partial else -1,
        partial=partial,
        lacks_values=sum(numel for *_, numel in set(values_inside)) < wanted,
        folds=folds,
        joins=joins,
    )
