"""Batches of a bucket's owned matrices: where their fragments lie in the receive buffer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ds_optforge.zero.buckets import BufferPlace, RankBucket
from ds_optforge.zero.partition import Joined, PartitionLayout
from ds_optforge.zero.plan import Team
from ds_optforge.zero.views import Views


@dataclass(frozen=True, slots=True, eq=False)
class OwnedBatch:
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
        team: of the one matrix of which the batch is this rank's block of rows; None for whole matrices.
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
    team: Team | None = None

    @property
    def numel(self) -> int:
        return self.count * self.rows * self.cols

    def folded(self, elements: Tensor) -> Tensor:
        """Return (n, rows, cols) matrices from their elements as these are counted, in the same shape."""
        if self.folds == 1:
            return elements
        blocks = elements.view(self.count, self.folds, self.rows, self.cols // self.folds)
        return blocks.transpose(1, 2).reshape(self.count, self.rows, self.cols)

    def rows_wide(self, values: Tensor) -> Tensor:
        """Return a view, (n, rows, cols), of values of the output rows, (n, outputs)."""
        return values.unsqueeze(1 if self.transposed else 2).expand(self.count, self.rows, self.cols)

    def parted(self, matrices: Tensor) -> Tensor:
        """Return the (n parts, rows, cols) matrices that (n, rows, cols) ones join, those of one matrix after each other."""
        if self.joins is None or not self.transposed:
            return self.parted_values(matrices)
        return self.parted_values(matrices.mT).mT.contiguous()

    def together(self, parts: Tensor) -> Tensor:
        """Undo `parted`."""
        return self.values_together(parts.mT).mT if self.joins and self.transposed else self.values_together(parts)

    def parted_values(self, values: Tensor) -> Tensor:
        """Return what there is of each output of the parts, (n parts, outputs, ...), from (n, outputs, ...) of the matrices."""
        if self.joins is None:
            return values
        parts, each = self.joins.parts, values.shape[2:]
        turns = values.reshape(self.count, -1, parts, self.joins.block, *each).transpose(1, 2)
        return turns.reshape(self.count * parts, -1, *each)

    def values_together(self, values: Tensor) -> Tensor:
        """Undo `parted_values`."""
        if self.joins is None:
            return values
        parts, each = self.joins.parts, values.shape[2:]
        apart = values.reshape(self.count, parts, -1, self.joins.block, *each).transpose(1, 2)
        return apart.reshape(self.count, -1, *each)

    def unfolded(self, matrices: Tensor) -> Tensor:
        """Undo `folded`."""
        if self.folds == 1:
            return matrices
        blocks = matrices.reshape(self.count, self.rows, self.folds, self.cols // self.folds)
        return blocks.transpose(1, 2).reshape(self.count, self.rows, self.cols)


def batches_of(layout: PartitionLayout, bucket: RankBucket, batch_numel: int) -> list[OwnedBatch]:
    """Group a bucket's owned matrices by shape, at most ``batch_numel`` elements (or one matrix) at a time.

    Those with a team come first and are batches of their own, in the order that all members have.
    """
    places: dict[int, list[BufferPlace]] = {}
    for place in bucket.received:
        places.setdefault(place.matrix, []).append(place)
    teams = {team.matrix: team for team in bucket.teams}
    by_shape: dict[tuple[int, int, bool, int, Joined | None, Team | None], list[int]] = {}
    for index, team in teams.items():
        rows, cols = bucket.shapes[bucket.owned.index(index)]
        by_shape[(rows, cols, layout.matrices[index].transposed, 1, None, team)] = [index]
    for index, shape, folds in zip(bucket.owned, bucket.shapes, bucket.folds, strict=True):
        matrix = layout.matrices[index]
        if index not in teams:
            by_shape.setdefault((*shape, matrix.transposed, folds, matrix.joins, None), []).append(index)
    batches: list[OwnedBatch] = []
    before = 0
    for (rows, cols, transposed, folds, joins, of_team), matrices in by_shape.items():
        size = max(1, batch_numel // (rows * cols))
        for first in range(0, len(matrices), size):
            members = matrices[first : first + size]
            found = [places[matrix] for matrix in members]
            batch = _batch(bucket, (rows, cols), transposed, found, before, folds, joins)
            batches.append(replace(batch, team=of_team) if of_team else batch)
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
) -> OwnedBatch:
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
    return OwnedBatch(
        *shape,
        transposed,
        len(members),
        tuple(member[0].matrix for member in members),
        received=Views([(0, place.position, place.within.numel) for place in places]),
        inside=Views([(0, slot * numel + place.within.start, place.within.numel) for slot, place in placed]),
        values_received=values_in_buffer(bucket, places),
        values_inside=Views(values_inside),
        first=before,
        flags=tuple((slot, place.flag) for slot, place in placed),
        start=first if whole and not partial else -1,
        partial=partial,
        lacks_values=sum(numel for *_, numel in set(values_inside)) < wanted,
        folds=folds,
        joins=joins,
    )


def values_in_buffer(bucket: RankBucket, places: Sequence[BufferPlace]) -> Views:
    """Return views of the statistics' bit patterns in a buffer: a float32 value is two elements of a bfloat16 buffer."""
    words = bucket.kept.words
    values = [place.statistics[number] for number in range(len(bucket.kept.per)) for place in places]
    return Views([(0, found.position, found.within.numel * words) for found in values])
