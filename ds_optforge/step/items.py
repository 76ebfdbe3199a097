"""The items of a portion, laid out so that few operators add up, or spread, the values of many matrices or rows.

Items of matrices with rows of one width are copied into one grid of whole rows, zeros around them; so the number of operators
is that of the widths, not of the items.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ds_optforge.zero.partition import Matrix, PartitionLayout, Per, Range
from ds_optforge.zero.views import Views

Place = tuple[int, int]  # number of the matrix, start of the item in it

_FEW = 3  # items that are added up one by one in fewer operators than through a table
_TABLE_WIDTH = 1024  # elements of a table's row


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where the values of a bucket's matrices begin in a vector of one value per row, or per matrix.

    Attributes:
        starts: by matrix.
        count: length of the vector.
    """

    starts: Mapping[int, int]
    count: int

    @classmethod
    def of(cls, layout: PartitionLayout, matrices: Sequence[int], per: Per) -> "Bounds":
        """Lay the values of ``matrices`` out in their order."""
        edges = list(accumulate((layout.matrices[index].values(per) for index in matrices), initial=0))
        return cls(dict(zip(matrices, edges, strict=False)), edges[-1])


class Items:
    """The items of one portion.

    Args:
        layout: of the group.
        bounds: by ``per`` of the values that are needed, where each matrix's begin.
        places: of the items.
        sizes: elements of each.
        uncounted: matrices of which another rank adds up the same elements.
        near: device of the items.
    """

    def __init__(
        self,
        layout: PartitionLayout,
        bounds: Mapping[Per, Bounds],
        places: Sequence[Place],
        sizes: Sequence[int],
        uncounted: Collection[int],
        near: torch.device,
    ) -> None:
        self._count = len(places)
        every = range(len(places))
        counted = [number for number in every if places[number][0] not in uncounted]
        self._grids: tuple[_Grid, ...] = ()
        self._added: tuple[_Grid | _Table, ...] = ()
        self._whole = Views([])
        self._tables: tuple[_Table, ...] = ()
        if "row" in bounds:
            given = layout, bounds["row"], places, sizes, near
            self._grids = _grids(every, *given)
            self._added = self._grids if len(counted) == len(places) else _grids(counted, *given)
        if "matrix" in bounds:
            starts = bounds["matrix"].starts
            self._whole = Views([(0, starts[index], 1) for index, _ in places])
            if counted:
                self._tables = (_Table.of(counted, [starts[places[number][0]] for number in counted], sizes, near),)

    def add(self, per: Per, into: Tensor, terms: Sequence[Tensor]) -> None:
        """Add terms up into the values of their rows or matrices.

        Args:
            per: what ``into`` has a value for.
            into: (values,) in float64, changed in place.
            terms: (elements,) for each item, of one dtype.
        """
        for part in self._added if per == "row" else self._tables:
            part.add(into, [terms[number] for number in part.items])

    def spread(self, per: Per, values: Tensor) -> list[Tensor]:
        """Return, for each item, the values of its matrix, (1,), or of the rows of its elements, (elements,).

        Args:
            per: what ``values`` has a value for.
            values: (values,).
        """
        if per == "matrix":
            return self._whole.of([values])
        found: dict[int, Tensor] = {}
        for grid in self._grids:
            found |= zip(grid.items, grid.spread(values), strict=True)
        return [found[number] for number in range(self._count)]


@dataclass(frozen=True, slots=True, eq=False)
class _Grid:
    """Items of matrices with rows of one width, over the stored rows that they touch.

    Attributes:
        items: numbers of the items.
        width: elements of a row.
        rows: number of rows.
        inside: views of the items in the flat grid.
        index: (rows,) place of each row's value; None where columns are output rows.
        columns: first row, rows, and place of the first column's value of each item; empty where rows are output rows.
        is_full: whether it is one item, and nothing is around it.
    """

    items: tuple[int, ...]
    width: int
    rows: int
    inside: Views
    index: Tensor | None
    columns: tuple[tuple[int, int, int], ...]
    is_full: bool

    def add(self, into: Tensor, terms: Sequence[Tensor]) -> None:
        flat = terms[0]
        if not self.is_full:
            flat = terms[0].new_zeros(self.rows * self.width)
            torch._foreach_copy_(self.inside.of([flat]), list(terms))
        grid = flat.reshape(self.rows, self.width)
        if self.index is not None:
            into.index_add_(0, self.index, grid.sum(1, dtype=torch.float64))
        for first, count, start in self.columns:
            into.narrow(0, start, self.width).add_(grid.narrow(0, first, count).sum(0, dtype=torch.float64))

    def spread(self, values: Tensor) -> list[Tensor]:
        if self.index is not None:
            flat = values.index_select(0, self.index).view(-1, 1).expand(-1, self.width).reshape(-1)
        else:
            flat = torch.cat([values.narrow(0, start, self.width).repeat(count) for _, count, start in self.columns])
        return self.inside.of([flat])


def _grids(
    numbers: Sequence[int],
    layout: PartitionLayout,
    bounds: Bounds,
    places: Sequence[Place],
    sizes: Sequence[int],
    near: torch.device,
) -> tuple[_Grid, ...]:
    """Sort items into grids."""
    alike: dict[tuple[int, bool], list[int]] = {}
    for number in numbers:
        matrix = layout.matrices[places[number][0]]
        alike.setdefault((matrix.width, matrix.transposed), []).append(number)
    return tuple(_grid(found, layout, bounds, places, sizes, near) for found in alike.values())


def _grid(
    numbers: Sequence[int],
    layout: PartitionLayout,
    bounds: Bounds,
    places: Sequence[Place],
    sizes: Sequence[int],
    near: torch.device,
) -> _Grid:
    rows, inside, values = 0, [], []
    columns: list[tuple[int, int, int]] = []
    matrix = layout.matrices[places[numbers[0]][0]]
    for number in numbers:
        index, start = places[number]
        matrix = layout.matrices[index]
        touched, first = matrix.rows_touched(Range(start, sizes[number])), bounds.starts[index]
        inside.append((0, rows * matrix.width + start % matrix.width, sizes[number]))
        if matrix.transposed:
            columns.append((rows, touched.numel, first + _columns_before(matrix, start)))
        else:
            values.append(torch.arange(first + touched.start, first + touched.end))
        rows += touched.numel
    of_rows = torch.cat(values).to(near) if values else None
    is_full = len(numbers) == 1 and sizes[numbers[0]] == rows * matrix.width
    return _Grid(tuple(numbers), matrix.width, rows, Views(inside), of_rows, tuple(columns), is_full)


def _columns_before(matrix: Matrix, start: int) -> int:
    """Columns before those that the tensor rank has which holds the element ``start``."""
    return start // matrix.width // matrix.rows * matrix.width


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Items over rows of one width, whatever their matrices' shapes, to be added up item by item.

    An item's sum is made of the sums of its rows, in one order: adding all rows up by their matrix's number would do so in
    any order on an accelerator.

    Attributes:
        items: numbers of the items.
        index: (items,) place of each item's value.
        rows: rows of the table.
        inside: views of the items in the flat table.
        most: rows of the largest item.
        slots: (rows,) place of each row's sum in ``most`` sums per item.
    """

    items: tuple[int, ...]
    index: Tensor
    rows: int
    inside: Views
    most: int
    slots: Tensor

    @classmethod
    def of(cls, numbers: Sequence[int], values: Sequence[int], sizes: Sequence[int], near: torch.device) -> "_Table":
        lengths = [-(-sizes[number] // _TABLE_WIDTH) for number in numbers]
        starts, most = list(accumulate(lengths, initial=0)), max(lengths)
        inside = [(0, start * _TABLE_WIDTH, sizes[number]) for start, number in zip(starts, numbers, strict=False)]
        slots = torch.cat([torch.arange(length) + number * most for number, length in enumerate(lengths)])
        index = torch.tensor(values, dtype=torch.long)
        return cls(tuple(numbers), index.to(near), starts[-1], Views(inside), most, slots.to(near))

    def add(self, into: Tensor, terms: Sequence[Tensor]) -> None:
        into.index_add_(0, self.index, self._summed(terms))

    def _summed(self, terms: Sequence[Tensor]) -> Tensor:
        if len(terms) <= _FEW:
            return torch.stack([term.sum(dtype=torch.float64) for term in terms])
        flat = terms[0].new_zeros(self.rows * _TABLE_WIDTH)
        torch._foreach_copy_(self.inside.of([flat]), list(terms))
        of_items = flat.new_zeros(len(terms) * self.most, dtype=torch.float64)
        of_items.index_copy_(0, self.slots, flat.view(-1, _TABLE_WIDTH).sum(1, dtype=torch.float64))
        return of_items.view(len(terms), self.most).sum(1)
