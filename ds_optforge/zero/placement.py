"""Places of parameters, and of their statistics, in the tensors of one call of ``step()`` on one rank.

Pure Python on integers, and a function of the layout alone. A step is cut by it, and a checkpoint describes by it what the
tensors hold, on every rank and without a model.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ds_optforge.zero.partition import Cut, Fragment, Joined, Matrix, Of, PartitionLayout, Per, Range


@dataclass(frozen=True, slots=True)
class TensorRange:
    """Elements ``within`` the tensor number ``tensor`` of a call."""

    tensor: int
    within: Range


@dataclass(frozen=True, slots=True)
class Held:
    """Elements or values ``within`` a flattened parameter, which lie in tensor number ``tensor`` from ``tensor_start`` on."""

    tensor: int
    tensor_start: int
    within: Range

    @property
    def numel(self) -> int:
        """Elements of the range."""
        return self.within.numel


@dataclass(frozen=True, slots=True)
class Placement:
    """A `PartitionLayout` as seen by one rank, with the tensors of its call of ``step()``.

    Attributes:
        layout: of the group.
        rank: this rank within the process group.
        starts: first element of each tensor, counted through all of them.
        owners: rank that keeps the factors of each matrix; empty where a rule has none.
    """

    layout: PartitionLayout
    rank: int
    starts: tuple[int, ...]
    owners: tuple[int, ...] = ()

    def place(self, offset: int) -> tuple[int, int]:
        """Turn an ``offset`` that counts through all tensors into (tensor, offset in it)."""
        tensor = bisect_right(self.starts, offset) - 1
        return tensor, offset - self.starts[tensor]

    def range_of(self, fragment: Fragment) -> TensorRange:
        """Where a fragment of this rank lies in the tensors."""
        tensor, start = self.place(fragment.slice_start)
        return TensorRange(tensor, Range(start, fragment.numel))

    def numel(self, parameter: int) -> int:
        """Return the elements of ``parameter``, or of this rank's shard of it, which its matrices cover."""
        return sum(self.layout.matrices[index].local_numel for index in self.matrices_of(parameter))

    def held(self, parameter: int) -> Held | None:
        """Return the one range of ``parameter`` that this rank holds; None if it holds nothing."""
        cut, data_rank = self.layout.cuts[parameter], self.rank // self.layout.tensor_ranks
        low = max(cut.base, data_rank * cut.size)
        numel = min(cut.base + self.numel(parameter), (data_rank + 1) * cut.size) - low
        if numel <= 0:
            return None
        return Held(*self.place(cut.offset + low - data_rank * cut.size), Range(low - cut.base, numel))

    def held_fragments(self, without: Container[int] = ()) -> list[list[Held]]:
        """Return, for each tensor, the fragments in it, as ranges of their parameters: all but those in ``without``."""
        held: list[list[Held]] = [[] for _ in self.starts]
        for fragment in self.layout.fragments(self.rank):
            if self.layout.matrices[fragment.matrix].parameter in without:
                continue
            tensor, start = self.place(fragment.slice_start)
            held[tensor].append(Held(tensor, start, Range(self.layout.start_in_parameter(fragment), fragment.numel)))
        return held

    def value_places(self, per: Per) -> dict[int, TensorRange]:
        """Return the place of each held matrix's values of a statistic, by the number of the matrix.

        Args:
            per: what the statistic has a value for.

        Returns:
            Ranges of the vector that holds the statistic's values of one tensor.
        """
        filled = [0] * len(self.starts)
        places = {}
        for fragment in self.layout.fragments(self.rank):
            tensor, _ = self.place(fragment.slice_start)
            count = self.layout.matrices[fragment.matrix].values_in(per, fragment.within).numel
            places[fragment.matrix] = TensorRange(tensor, Range(filled[tensor], count))
            filled[tensor] += count
        return places

    def value_counts(self, per: Per) -> list[int]:
        """Return the number of values of a statistic, ``per`` row or matrix, that are kept with each tensor."""
        counts = [0] * len(self.starts)
        for place in self.value_places(per).values():
            counts[place.tensor] += place.within.numel
        return counts

    def values(self, parameter: int, per: Per) -> int:
        """Return the number of values of a statistic, ``per`` row or matrix, for all matrices of ``parameter``."""
        return sum(self.layout.matrices[index].values(per) for index in self.matrices_of(parameter))

    def held_values(self, parameter: int, per: Per, places: Mapping[int, TensorRange]) -> Held | None:
        """Return the one range of a parameter's statistic that this rank keeps; None if it keeps nothing.

        Args:
            parameter: number of the parameter.
            per: what the statistic has a value for.
            places: what `value_places` returned for the same ``per``.

        Returns:
            A range of the parameter's values, counted through its matrices.
        """
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

    def owned_places(self, of: Of) -> dict[int, TensorRange]:
        """Return the place of a factor of each matrix that this rank owns, by the number of the matrix.

        An owner holds a fragment of its matrix; the factor lies beside the tensor that has it.

        Args:
            of: what the factor is of.

        Returns:
            Ranges of the vector that holds one tensor's factors of this name.
        """
        filled = [0] * len(self.starts)
        places = {}
        for fragment in self.layout.fragments(self.rank):
            if self.owners[fragment.matrix] == self.rank:
                tensor, _ = self.place(fragment.slice_start)
                numel = math.prod(self.layout.matrices[fragment.matrix].factor(of))
                places[fragment.matrix] = TensorRange(tensor, Range(filled[tensor], numel))
                filled[tensor] += numel
        return places

    def owned_counts(self, of: Of) -> list[int]:
        """Return the number of a factor's elements that are kept beside each tensor."""
        counts = [0] * len(self.starts)
        for place in self.owned_places(of).values():
            counts[place.tensor] += place.within.numel
        return counts

    def owned_matrices(self, of: Of) -> Iterator[tuple[int, Range, int, TensorRange]]:
        """Yield where this rank keeps a factor of each matrix that it owns.

        Args:
            of: what the factor is of.

        Yields:
            Number of the parameter; of the matrix among the parameter's, as a range of one; how many there are; the place.
        """
        for index, place in self.owned_places(of).items():
            parameter = self.layout.matrices[index].parameter
            matrices = self.matrices_of(parameter)
            yield parameter, Range(index - matrices.start, 1), len(matrices), place

    def matrices_of(self, parameter: int) -> range:
        """Return the numbers of the matrices of ``parameter``, which follow each other."""
        matrices = self.layout.matrices
        first = bisect_left(matrices, parameter, key=lambda matrix: matrix.parameter)
        return range(first, bisect_right(matrices, parameter, lo=first, key=lambda matrix: matrix.parameter))

    def to_plain(self) -> dict[str, Any]:
        """Return numbers, strings, lists and dicts for a checkpoint, which `from_plain` reads."""
        layout = self.layout
        return {
            "rank": self.rank,
            "world_size": layout.world_size,
            "tensor_ranks": layout.tensor_ranks,
            "starts": list(self.starts),
            "names": list(layout.names),
            "cuts": [asdict(cut) for cut in layout.cuts],
            "matrices": [asdict(matrix) for matrix in layout.matrices],
            **({"owners": list(self.owners)} if self.owners else {}),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Placement":
        """Make a placement from what `to_plain` returned.

        Raises:
            KeyError: a key that `to_plain` writes is missing.
            TypeError: a cut or a matrix has other fields.
        """
        cuts: Sequence[Cut] = [Cut(**cut) for cut in plain["cuts"]]
        joined = [matrix.get("joins") for matrix in plain["matrices"]]
        matrices = [
            Matrix(**{**matrix, "joins": Joined(**joins) if joins else None})
            for matrix, joins in zip(plain["matrices"], joined, strict=True)
        ]
        names, tensor_ranks = tuple(plain["names"]), plain.get("tensor_ranks", 1)
        layout = PartitionLayout(plain["world_size"], names, tuple(cuts), tuple(matrices), tensor_ranks)
        return cls(layout, plain["rank"], tuple(plain["starts"]), tuple(plain.get("owners", ())))
