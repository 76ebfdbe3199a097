"""Moves fragments to the owners of their matrices and updates back, one bucket at a time.

Every fragment is rounded to the wire dtype before orthogonalization and every update after it, even when nothing travels.
An update thus depends on its matrix alone, not on the stage or the world size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optforge.zero.batches import OwnedBatch, batches_of, values_in_buffer
from ds_optforge.zero.buckets import RankBucket
from ds_optforge.zero.gather import TeamGather
from ds_optforge.zero.layout import Binding
from ds_optforge.zero.packing import Packing, positions_beside
from ds_optforge.zero.partition import PartitionLayout
from ds_optforge.zero.views import Views

# Stands for a statistic that another rank keeps: the first row of a fragment that is stepped alone may begin there.
NO_STATISTIC = -1.0

# float32 values travel as integers of the wire's size, which no copy rounds: a kernel that copies bfloat16 may go through
# float32, and half of a value may be the pattern of a NaN.
_PATTERNS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, slots=True, eq=False)
class MatrixBatch:
    """Owned matrices of one shape, or one that a team owns.

    Attributes:
        matrices: (n, rows, cols) in the wire dtype.
        active: (n,) 1 for a matrix with any gradient that is not zero, else 0; in the wire dtype.
        statistics: one for each of the rule's: (n, outputs) or (n, 1) in float32, negative where another rank keeps a value.
        transposed: whether the matrices are stored (in, out).
        has_all: whether no statistic is another rank's.
        team: with which this rank orthogonalizes the one matrix, and puts its own rows of the update; None if it is alone.
    """

    matrices: Tensor
    active: Tensor
    statistics: tuple[Tensor, ...]
    transposed: bool
    has_all: bool
    team: TeamGather | None = None

    @property
    def shape_of_update(self) -> torch.Size:
        """(n, rows, cols) of what is to be `put`: with a team, this rank's rows."""
        count, rows, cols = self.matrices.shape
        return torch.Size((count, self.team.own[1] if self.team else rows, cols))


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
        by_rows: whether only rows travel that are chosen anew in each step, by `choose` before `collect`.

    Attributes:
        pattern: the integer dtype of the wire's size, in which the bits of statistics travel.
        packing: what travels of the buffers, if not all of them.
    """

    def __init__(
        self,
        layout: PartitionLayout,
        bucket: RankBucket,
        binding: Binding,
        wire: torch.dtype,
        batch_numel: int,
        near: torch.device,
        by_rows: bool = False,
    ) -> None:
        self.bucket = bucket
        self._near, self._staged = near, is_staged(near, binding.device)
        self._binding = binding
        self._wire = wire
        self.pattern = _PATTERNS[wire.itemsize]
        self._flag_index = _index([place.flag for place in bucket.sent], near)
        self._sent = Views([(0, place.position, place.within.numel) for place in bucket.sent])
        self._values_sent = values_in_buffer(bucket, bucket.sent)
        self._batches = batches_of(layout, bucket, batch_numel)
        self._teams = [TeamGather(batch.team, binding) if batch.team else None for batch in self._batches]
        flags: dict[int, list[int]] = {}
        for batch in self._batches:
            for slot, flag in batch.flags:
                flags.setdefault(batch.first + slot, []).append(flag)
        # A matrix with fewer fragments than others counts its last flag more than once.
        most = max(map(len, flags.values()), default=1)
        filled = [places + places[-1:] * (most - len(places)) for places in flags.values()]
        self._owned_flags = _index(filled, binding.device).view(len(filled), most)
        self.packing: Packing | None = None
        if by_rows and bucket.travels:
            self.packing = Packing(bucket.sends, bucket.receives, binding.device, self.pattern)
            self._beside_sent = _index(positions_beside(bucket.sent, bucket.kept.words), near)
            self._beside_received = _index(positions_beside(bucket.received, bucket.kept.words), binding.device)
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

    def stored(self, index: int) -> tuple[int, ...]:
        """Return the numbers in the layout of the stored matrices of batch ``index``, in order, whatever they join."""
        return self._batches[index].numbers

    def nothing_chosen(self) -> Tensor:
        """Return for `choose`, (send_numel,) bool, that no row is chosen: statistics and flags travel all the same."""
        return torch.zeros_like(self._outgoing, dtype=torch.bool).index_fill_(0, self._beside_sent, True)

    def choose(self, sent: Tensor, rows: Sequence[Tensor]) -> None:
        """Let the elements of chosen output rows travel alone, in a bucket that travels. Waits for the device.

        Args:
            sent: (send_numel,) bool, laid out like ``outgoing``: which elements of this rank's fragments are in such rows;
                true where there are statistics and flags, and false in the gaps between fragments.
            rows: for each batch, (n, outputs) that is not 0 for the chosen output rows of `stored` matrices.
        """
        assert self.packing is not None  # the bucket travels
        received = torch.zeros(self.bucket.receive_numel, dtype=torch.bool, device=self._binding.device)
        received.index_fill_(0, self._beside_received, True)
        for batch, flags in zip(self._batches, rows, strict=True):
            elements = batch.unfolded(batch.rows_wide(flags != 0)).reshape(-1)
            torch._foreach_copy_(batch.received.of([received]), batch.inside.of([elements]))
        self.packing.choose(sent.to(self._binding.device), received)

    def rows_of_parts(self, index: int, values: Tensor) -> Tensor:
        """Return values of the matrices of batch ``index``, (parts, outputs), from those of the stored ones, (n, outputs)."""
        return self._batches[index].parted_values(values)

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
        """Return batch ``index`` of the owned matrices after ``arrive``; the caller may overwrite it.

        Collective over the team, if the batch has one: members take their batches in one order.
        """
        batch, team = self._batches[index], self._teams[index]
        if batch.start >= 0:
            matrices = self._receive.narrow(0, batch.start, batch.numel).view(batch.count, batch.rows, batch.cols)
        else:
            fill = self._receive.new_zeros if batch.partial else self._receive.new_empty
            matrices = fill(batch.count, batch.rows, batch.cols)
            torch._foreach_copy_(batch.inside.of([matrices.view(-1)]), batch.received.of([self._receive]))
        matrices = batch.folded(matrices)
        active = self._active.narrow(0, batch.first, batch.count)
        if team:
            matrices = self._gathered(batch, matrices, team)
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
        return MatrixBatch(matrices, active, statistics, batch.transposed, not batch.lacks_values, team)

    def _gathered(self, batch: OwnedBatch, block: Tensor, team: TeamGather) -> Tensor:
        """Return the whole matrix, (1, rows, cols), of which the ``block`` has arrived here; tell whether any is active."""
        flags = self._active.narrow(0, batch.first, 1)
        whole, found = block.new_empty(1, sum(team.rows), batch.cols), flags.new_empty(1, len(team.rows), 1)
        whole.narrow(1, *team.own).copy_(block)
        found.narrow(1, team.place, 1).copy_(flags.view(1, 1, 1))
        team.gather_all([(whole, team.rows), (found, (1,) * len(team.rows))])
        flags.copy_(found.amax(1).view(1))
        self._receive[self._owned_flags[batch.first]] = flags
        return whole

    def put(self, index: int, updates: Tensor, given: MatrixBatch) -> None:
        """Put updates in the place of a batch of matrices.

        Args:
            index: number of the batch.
            updates: (n, rows, cols), of any dtype; rounded to the wire's. Of a team's matrix this rank's rows.
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
        if self.packing:
            out, into, out_splits, in_splits = self.packing.packed(out, into, back=out is self._send)
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
            if self.packing:
                self.packing.unpack()


def is_staged(near: torch.device, device: torch.device) -> bool:
    """Whether tensors ``near`` are sent through a buffer of their own, since matrices are orthogonalized on ``device``."""
    return near != device


def _index(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)
