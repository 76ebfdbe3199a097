"""Where the parameters of one call of ``step()`` lie in its tensors, element by element, output row by output row.

Pure Python on integers, and so a function of the layout alone: a step is cut by it, and a checkpoint names by it what the
tensors hold, on every rank and without a model.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ds_optforge.zero.partition import Cut, Fragment, Matrix, PartitionLayout, Per, Range


@dataclass(frozen=True, slots=True)
class TensorRange:
    """Elements ``within`` the tensor of that number."""

    tensor: int
    within: Range


@dataclass(frozen=True, slots=True)
class Held:
    """Elements ``within`` a flattened parameter, at ``tensor_start`` and following of the tensor of that number."""

    tensor: int
    tensor_start: int
    within: Range

    @property
    def numel(self) -> int:
        """Elements of the range."""
        return self.within.numel


@dataclass(frozen=True, slots=True)
class Placement:
    """One rank's view of a `PartitionLayout`. ``starts``: where each tensor begins, counted through all of them."""

    layout: PartitionLayout
    rank: int
    starts: tuple[int, ...]

    def place(self, offset: int) -> tuple[int, int]:
        """(tensor, offset in it) of an offset that counts through all tensors."""
        tensor = bisect_right(self.starts, offset) - 1
        return tensor, offset - self.starts[tensor]

    def range_of(self, fragment: Fragment) -> TensorRange:
        """Where a fragment of this rank lies in the tensors."""
        tensor, start = self.place(fragment.slice_start)
        return TensorRange(tensor, Range(start, fragment.numel))

    def numel(self, parameter: int) -> int:
        """Elements of a parameter, which its matrices cover."""
        return sum(self.layout.matrices[index].numel for index in self.matrices_of(parameter))

    def held(self, parameter: int) -> Held | None:
        """What this rank holds of a parameter, which is one range; None if it holds nothing."""
        cut = self.layout.cuts[parameter]
        low = max(cut.base, self.rank * cut.size)
        numel = min(cut.base + self.numel(parameter), (self.rank + 1) * cut.size) - low
        if numel <= 0:
            return None
        return Held(*self.place(cut.offset + low - self.rank * cut.size), Range(low - cut.base, numel))

    def held_fragments(self) -> list[list[Held]]:
        """The fragments in each tensor."""
        held: list[list[Held]] = [[] for _ in self.starts]
        for fragment in self.layout.fragments(self.rank):
            tensor, start = self.place(fragment.slice_start)
            begin = self.layout.matrices[fragment.matrix].start + fragment.within.start
            held[tensor].append(Held(tensor, start, Range(begin, fragment.numel)))
        return held

    def value_places(self, per: Per) -> dict[int, TensorRange]:
        """By held matrix, the values of a statistic in a tensor's buffer of it."""
        filled = [0] * len(self.starts)
        places = {}
        for fragment in self.layout.fragments(self.rank):
            tensor, _ = self.place(fragment.slice_start)
            count = self.layout.matrices[fragment.matrix].values_in(per, fragment.within).numel
            places[fragment.matrix] = TensorRange(tensor, Range(filled[tensor], count))
            filled[tensor] += count
        return places

    def value_counts(self, per: Per) -> list[int]:
        """Values of a statistic that are kept with each tensor."""
        counts = [0] * len(self.starts)
        for place in self.value_places(per).values():
            counts[place.tensor] += place.within.numel
        return counts

    def values(self, parameter: int, per: Per) -> int:
        """Values of a statistic for all of a parameter's matrices."""
        return sum(self.layout.matrices[index].values(per) for index in self.matrices_of(parameter))

    def held_values(self, parameter: int, per: Per, places: Mapping[int, TensorRange]) -> Held | None:
        """What this rank keeps of a parameter's statistic, counted through its matrices. ``places``: `value_places`."""
        before, found = 0, []
        for index in self.matrices_of(parameter):
            matrix = self.layout.matrices[index]
            fragment = self.layout.fragment(index, self.rank)
            if fragment is not None and places[index].within.numel:
                values = matrix.values_in(per, fragment.within)
                found.append((places[index], before + values.start, values.numel))
            before += matrix.values(per)
        if not found:
            return None
        place, start, _ = found[0]
        return Held(place.tensor, place.within.start, Range(start, sum(numel for *_, numel in found)))

    def matrices_of(self, parameter: int) -> range:
        """The numbers of a parameter's matrices, which follow each other."""
        matrices = self.layout.matrices
        first = bisect_left(matrices, parameter, key=lambda matrix: matrix.parameter)
        return range(first, bisect_right(matrices, parameter, lo=first, key=lambda matrix: matrix.parameter))

    def to_plain(self) -> dict[str, Any]:
        """As numbers, strings, lists and dicts, for a checkpoint. `from_plain` reads it."""
        layout = self.layout
        return {
            "rank": self.rank,
            "world_size": layout.world_size,
            "starts": list(self.starts),
            "names": list(layout.names),
            "cuts": [asdict(cut) for cut in layout.cuts],
            "matrices": [asdict(matrix) for matrix in layout.matrices],
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Placement":
        """Raises KeyError or TypeError for what `to_plain` did not write."""
        cuts: Sequence[Cut] = [Cut(**cut) for cut in plain["cuts"]]
        matrices = [Matrix(**matrix) for matrix in plain["matrices"]]
        layout = PartitionLayout(plain["world_size"], tuple(plain["names"]), tuple(cuts), tuple(matrices))
        return cls(layout, plain["rank"], tuple(plain["starts"]))
