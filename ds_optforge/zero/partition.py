"""Matrices, ZeRO's cuts and the fragments they make. Pure Python on integers: no tensors, no process groups.

A parameter is row-major, so every matrix is a contiguous range of the flattened parameter, and ZeRO's cuts turn it into
contiguous fragments.

Under tensor parallelism a parameter has one shard per tensor rank, and each shard is cut by ZeRO over the data ranks. The
elements of a sharded matrix are counted through its shards, one after the other. Ranks are counted with the tensor ranks
innermost: rank ``data_rank * tensor_ranks + tensor_rank``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias

Per: TypeAlias = Literal["row", "matrix"]  # output row
Of: TypeAlias = Literal["rows", "cols", "matrix"]  # stored rows and columns


@dataclass(frozen=True, slots=True)
class Range:
    """The half-open range [start, start + numel) of elements, rows or values; the field that holds it says of what."""

    start: int
    numel: int

    @property
    def end(self) -> int:
        """The first number behind the range."""
        return self.start + self.numel

    def common(self, other: "Range") -> "Range | None":
        """Return the range that both have; None if they have none."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return Range(start, end - start) if start < end else None


@dataclass(frozen=True, slots=True)
class Joined:
    """Matrices of one shape in one stored matrix, whose outputs take turns: ``block`` of each, then the next ``block`` of each.

    Attributes:
        parts: number of matrices.
        block: outputs of one of them that follow each other: all of them where the matrices are halves, thirds, ... of columns.
    """

    parts: int
    block: int


def part_shape(rows: int, cols: int, transposed: bool, joins: Joined | None) -> tuple[int, int]:
    """Return (rows, cols) of each matrix that a stored (rows, cols) matrix ``joins``."""
    if joins is None:
        return rows, cols
    return (rows, cols // joins.parts) if transposed else (rows // joins.parts, cols)


def chosen_shape(rows: int, cols: int, transposed: bool, count: Callable[[int], int] | None) -> tuple[int, int]:
    """Return (rows, cols) of the chosen output rows of a (rows, cols) matrix.

    Args:
        rows: stored rows.
        cols: stored columns.
        transposed: whether the columns are the output rows.
        count: of the chosen output rows among so many; None if all are.
    """
    if count is None:
        return rows, cols
    return (rows, count(cols)) if transposed else (count(rows), cols)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A (rows, cols) matrix: ``local_numel`` elements of a flattened parameter, or as many of each of its shards.

    Attributes:
        parameter: number of the parameter in the layout.
        start: of the matrix in the flattened parameter, or in its shard.
        rows: stored rows.
        cols: stored columns.
        transposed: whether it is stored (in, out), so that its output rows are the columns.
        shards: number of tensor ranks among which it is cut; 1 if each of them has all of it.
        dim: what a shard has some of: 0 for rows, 1 for columns.
        joins: the matrices of one shape that it joins though they are no ranges of it; None if it is one itself.
    """

    parameter: int
    start: int
    rows: int
    cols: int
    transposed: bool = False
    shards: int = 1
    dim: int = 0
    joins: Joined | None = None

    @property
    def parts(self) -> int:
        """Number of matrices that are orthogonalized in its place."""
        return self.joins.parts if self.joins else 1

    @property
    def part_shape(self) -> tuple[int, int]:
        """(rows, cols) of each of them."""
        return part_shape(self.rows, self.cols, self.transposed, self.joins)

    @property
    def numel(self) -> int:
        """Elements of the matrix."""
        return self.rows * self.cols

    @property
    def local_numel(self) -> int:
        """Elements of one shard."""
        return self.numel // self.shards

    @property
    def folds(self) -> int:
        """Number of blocks of columns, one behind the other, in which its elements are counted."""
        return self.shards if self.dim == 1 else 1

    @property
    def width(self) -> int:
        """Elements of a stored row that follow each other."""
        return self.cols // self.folds

    @property
    def outputs(self) -> int:
        """Number of output rows."""
        return self.cols if self.transposed else self.rows

    def outputs_in(self, elements: Range) -> Range:
        """Return the output rows whose first element is one of these ``elements`` of the matrix."""
        step = 1 if self.transposed else self.width
        first, end = -(-elements.start // step), -(-elements.end // step)
        return Range(min(first, self.outputs), min(end, self.outputs) - min(first, self.outputs))

    def values(self, per: Per) -> int:
        """Return the number of values of a statistic or sum ``per`` output row, or ``per`` matrix."""
        return self.outputs if per == "row" else 1

    def values_in(self, per: Per, elements: Range) -> Range:
        """Return the values (``per`` row or matrix) whose row's or matrix's first element is one of these ``elements``."""
        if per == "row":
            return self.outputs_in(elements)
        return Range(min(elements.start, 1), int(elements.start == 0 and elements.numel > 0))

    def factor(self, of: Of) -> tuple[int, int, int]:
        """Return the shape of what its owner keeps of it: (parts, rows, rows), (parts, cols, cols) or (parts, rows, cols)."""
        rows, cols = self.part_shape
        return self.parts, cols if of == "cols" else rows, rows if of == "rows" else cols

    def rows_touched(self, elements: Range) -> Range:
        """Return the stored rows that hold any of these ``elements`` of the matrix, which lie in one shard."""
        first = elements.start // self.width
        return Range(first % self.rows, -(-elements.end // self.width) - first)


@dataclass(frozen=True, slots=True)
class Cut:
    """ZeRO's cut of one flattened parameter, as three numbers.

    Element e lives on rank ``(base + e) // size``, at position ``offset + (base + e) % size`` of that rank's slice.
    ZeRO-1/2 cut the flat group (base: the parameter's position in it; size: the partition); ZeRO-3 cuts each parameter
    (base 0; offset: its place in the slice); a replicated parameter is not cut (size: its numel).
    """

    base: int
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class Fragment:
    """The part of a matrix in one rank's slice.

    Attributes:
        matrix: number of the matrix in the layout.
        within: elements of the matrix.
        slice_start: place of the first of them in the slice.
    """

    matrix: int
    within: Range
    slice_start: int

    @property
    def numel(self) -> int:
        """Elements of the fragment."""
        return self.within.numel


@dataclass(frozen=True, slots=True)
class PartitionLayout:
    """Places of all matrices of one optimizer group: an equal object on every rank of the process group.

    Attributes:
        world_size: number of ranks in the process group.
        names: of the parameters, in the order in which they lie in the slices.
        cuts: of the parameters, in the same order.
        matrices: in the same order, so that a rank's fragments have increasing offsets.
        tensor_ranks: number of ranks among which tensor parallelism cuts parameters; what it does not cut, each has whole.
    """

    world_size: int
    names: tuple[str, ...]
    cuts: tuple[Cut, ...]
    matrices: tuple[Matrix, ...]
    tensor_ranks: int = 1

    def holders(self, matrix: int) -> range:
        """Return the ranks that hold at least one element of the matrix of that number."""
        found = self.matrices[matrix]
        cut = self.cuts[found.parameter]
        first = cut.base + found.start
        last = (first + found.local_numel - 1) // cut.size
        return range(first // cut.size * self.tensor_ranks, (last + 1) * self.tensor_ranks)

    def fragment(self, matrix: int, rank: int) -> Fragment | None:
        """Return the fragment of ``matrix`` that ``rank`` holds; None if it holds nothing."""
        found = self.matrices[matrix]
        cut = self.cuts[found.parameter]
        begin = cut.base + found.start
        data_rank, tensor_rank = divmod(rank, self.tensor_ranks)
        low = max(begin, data_rank * cut.size)
        numel = min(begin + found.local_numel, (data_rank + 1) * cut.size) - low
        if numel <= 0:
            return None
        before = tensor_rank * found.local_numel if found.shards > 1 else 0
        return Fragment(matrix, Range(before + low - begin, numel), cut.offset + low - data_rank * cut.size)

    def fragments(self, rank: int) -> Iterator[Fragment]:
        """Yield all fragments of ``rank``, with increasing offsets."""
        for matrix in range(len(self.matrices)):
            fragment = self.fragment(matrix, rank)
            if fragment is not None:
                yield fragment

    def start_in_parameter(self, fragment: Fragment) -> int:
        """Return the place of a fragment's first element in its flattened parameter, or in the rank's shard of it."""
        found = self.matrices[fragment.matrix]
        return found.start + fragment.within.start % found.local_numel

    def describe(self, matrix: int) -> str:
        """Describe ``matrix`` in one line, for error messages."""
        found = self.matrices[matrix]
        cut = f", cut into {found.shards} by {'columns' if found.dim else 'rows'}" if found.shards > 1 else ""
        return f"{self.names[found.parameter]}[{found.start}:{found.start + found.numel}] {found.rows}x{found.cols}{cut}"


def cuts_of_group(numels: Sequence[int], world_size: int) -> tuple[list[Cut], int]:
    """Cut a parameter group as ZeRO-1 and ZeRO-2 do: its flat buffer evenly over the ranks.

    Args:
        numels: elements of each parameter, in the order of the flat buffer.
        world_size: number of ranks.

    Returns:
        Each parameter's cut, and the elements of a rank's slice, padding included: DeepSpeed aligns the group to two
        elements per rank.
    """
    *bases, numel = accumulate(numels, initial=0)
    size = 2 * -(-numel // (2 * world_size))
    return [Cut(base, size, 0) for base in bases], size


def cuts_of_parameters(numels: Sequence[int], world_size: int) -> tuple[list[Cut], int]:
    """Cut a sub-group as ZeRO-3 does: each parameter evenly over the ranks, the partitions in a row in a rank's slice.

    Args:
        numels: elements of each parameter, in the order of the sub-group.
        world_size: number of ranks.

    Returns:
        Each parameter's cut, and the elements of a rank's slice, padding included.
    """
    sizes = [-(-numel // world_size) for numel in numels]
    *offsets, total = accumulate(sizes, initial=0)
    return [Cut(0, size, offset) for size, offset in zip(sizes, offsets, strict=True)], total
