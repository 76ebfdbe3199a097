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
from ds_optforge.zero.plan import ExchangePlan, PartitionLayout, Piece, RankBucket


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """The owned matrices of one shape: which pieces make them up, and where.

    ``slots`` are the matrices' places in the batch, ``flags`` the pieces' flags in the receive buffer; one entry a piece.
    """

    rows: int
    cols: int
    count: int
    pieces: tuple[Piece, ...]
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
        self._flag_index = torch.tensor(bucket.flags, dtype=torch.long, device=binding.device)
        self._batches = _batches(layout, bucket, binding.device)
        self._work: dist.Work | None = None
        self.release()

    def collect(self, fragments: Sequence[Tensor], active: Tensor) -> None:
        """Start sending every fragment to the owner of its matrix.

        Args:
            fragments: flat, in the order of ``bucket.fragments``; rounded to the wire dtype.
            active: (fragments,) 1 where any element of the fragment's gradient is not zero, else 0.
        """
        bucket, device = self.bucket, self._binding.device
        self._send = torch.empty(bucket.send_numel, dtype=self._wire, device=device)
        if fragments:
            torch._foreach_copy_(self._fragment_views(), list(fragments))
            self._send[self._flag_index] = active.to(self._send)
        if bucket.travels:
            self._receive = torch.empty(bucket.receive_numel, dtype=self._wire, device=device)
            self._work = self._all_to_all(self._receive, self._send, bucket.receives, bucket.sends)
        else:
            self._receive = self._send

    def matrices(self) -> list[tuple[Tensor, Tensor]]:
        """Wait for the fragments; return the owned matrices, one batch per shape.

        Returns:
            Pairs of (n, rows, cols) in the wire dtype and (n,) flags: 1 for a matrix with any gradient that is not zero.
        """
        self._wait()
        batches = []
        for batch in self._batches:
            matrices = self._receive.new_empty(batch.count, batch.rows, batch.cols)
            torch._foreach_copy_(_piece_views(batch, matrices), self._received(batch))
            active = self._receive.new_zeros(batch.count)
            active.scatter_reduce_(0, batch.slot_index, self._receive[batch.flag_index], "amax")
            batches.append((matrices, active))
        return batches

    def give_back(self, updates: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Start returning (update, flags) pairs, in the order and shapes of ``matrices()``."""
        for batch, (update, active) in zip(self._batches, updates, strict=True):
            torch._foreach_copy_(self._received(batch), _piece_views(batch, update))
            self._receive[batch.flag_index] = active[batch.slot_index].to(self._receive)
        if self.bucket.travels:
            self._work = self._all_to_all(self._send, self._receive, self.bucket.sends, self.bucket.receives)

    def updates(self) -> tuple[list[Tensor], Tensor]:
        """Wait for the updates; return one flat view per fragment and the (fragments,) flags of their matrices."""
        self._wait()
        return self._fragment_views(), self._send[self._flag_index]

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

    def _fragment_views(self) -> list[Tensor]:
        places = zip(self.bucket.positions, self.bucket.fragments, strict=True)
        return [self._send.narrow(0, position, fragment.numel) for position, fragment in places]

    def _received(self, batch: _Batch) -> list[Tensor]:
        return [self._receive.narrow(0, piece.position, piece.numel) for piece in batch.pieces]


def _piece_views(batch: _Batch, matrices: Tensor) -> list[Tensor]:
    """The pieces' places in (n, rows, cols) matrices."""
    flat = matrices.reshape(batch.count, -1)
    return [flat[slot].narrow(0, p.start, p.numel) for slot, p in zip(batch.slots, batch.pieces, strict=True)]


def _batches(layout: PartitionLayout, bucket: RankBucket, device: torch.device) -> list[_Batch]:
    """Group a bucket's owned matrices by shape."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, piece in enumerate(bucket.pieces):
        matrix = layout.matrices[piece.matrix]
        by_shape.setdefault((matrix.rows, matrix.cols), []).append(index)
    batches = []
    for (rows, cols), indices in by_shape.items():
        place: dict[int, int] = {}
        slots = [place.setdefault(bucket.pieces[i].matrix, len(place)) for i in indices]
        flags = [bucket.piece_flags[i] for i in indices]
        batches.append(
            _Batch(
                rows=rows,
                cols=cols,
                count=len(place),
                pieces=tuple(bucket.pieces[i] for i in indices),
                slots=tuple(slots),
                slot_index=torch.tensor(slots, dtype=torch.long, device=device),
                flag_index=torch.tensor(flags, dtype=torch.long, device=device),
            )
        )
    return batches


def require_agreement(plan: ExchangePlan, routing: str, binding: Binding) -> None:
    """Raise on every rank unless all ranks of the group made the same plan from the same configuration.

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
        return
    digest = int(hashlib.sha256((plan.fingerprint + routing).encode()).hexdigest()[:15], 16)
    extremes = torch.tensor([digest, -digest], dtype=torch.long, device=binding.device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MIN, group=group)
    lowest, highest = extremes[0].item(), -extremes[1].item()
    if lowest != highest:
        raise LayoutError(_first_difference(plan, routing, binding))


def _first_difference(plan: ExchangePlan, routing: str, binding: Binding) -> str:
    table = routing.splitlines()
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
