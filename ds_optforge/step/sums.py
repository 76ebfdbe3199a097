"""Sums over whole matrices and whole output rows of which ranks hold fragments, and statistics that all of these ranks get.

Each rank adds up its fragments in float64, one all-reduce per bucket and kind adds up the ranks, and the result is rounded to
float32: it does not depend on ZeRO's cuts. A statistic travels with them: the rank that keeps it adds it, the others add zero,
so that it arrives as it is. Nothing is sent for matrices that do not travel.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress, pairwise
from typing import Any

import torch
from torch import Tensor

from ds_optforge.rules.base import Choice, Hyperparameters, MatrixRule, Per, Statistic, Sum, settles, statistics_of
from ds_optforge.step.chooser import Chooser
from ds_optforge.step.items import Bounds, Items, Place
from ds_optforge.zero.agreement import sum_over_ranks
from ds_optforge.zero.buckets import RankBucket
from ds_optforge.zero.layout import Binding
from ds_optforge.zero.partition import PartitionLayout
from ds_optforge.zero.placement import TensorRange
from ds_optforge.zero.views import Views


@dataclass(frozen=True, slots=True)
class Summed:
    """What is summed of a bucket, and what is kept beside it.

    Attributes:
        portions: places and sizes of the items of each of its portions.
        flags: place of the flag of each of its fragments in the exchange's send buffer.
        kept: by statistic that is given to ``direction`` or ``apply``, where each fragment's values lie in the state.
    """

    portions: Sequence[tuple[Sequence[Place], Sequence[int]]]
    flags: Sequence[int]
    kept: Mapping[str, Sequence[TensorRange]]


class BucketSums:
    """The sums of one bucket. There are two kinds: of the gradients, and of the updates (``of_update``).

    For each kind `begin` comes first, then `add` for everything that this rank holds, then `finish`. Of the sum by which a rule
    chooses rows, only whether a row is chosen is found, 1 or 0: see `ds_optforge.rules.base.Choice`.

    Args:
        rule: of the group.
        layout: of the group.
        bucket: this rank's share of the bucket.
        binding: tells the process group and the device.
        summed: the bucket's items, and what is kept beside them.
        near: device of the stepped tensors, on which sums are made and given; of those that travel, on the binding's.
    """

    def __init__(
        self,
        rule: MatrixRule,
        layout: PartitionLayout,
        bucket: RankBucket,
        binding: Binding,
        summed: Summed,
        near: torch.device,
    ) -> None:
        self._rule, self._layout, self._binding, self._travels, self._near = rule, layout, binding, bucket.travels, near
        named: tuple[Sum | Statistic, ...] = (*rule.sums, *statistics_of(rule, "direction", "apply"))
        self._pers: dict[str, Per] = {item.name: item.per for item in named}
        matrices, pers = bucket.matrices, sorted(set(self._pers.values()))
        self._bounds = {per: Bounds.of(layout, matrices, per) for per in pers}
        uncounted = {index for index in matrices if self._is_counted_elsewhere(index)}
        self._items = [Items(layout, self._bounds, *portion, uncounted, near) for portion in summed.portions]
        self._kinds = {kind: self._ranges(self._named(kind)) for kind in (False, True)}
        self._kept = {
            name: _Kept.of(ranges, bucket, layout, self._pers[name], self._bounds[self._pers[name]], uncounted)
            for name, ranges in summed.kept.items()
        }
        self._means = {
            kind: [(ranges[item.name], self._terms(item)) for item in self.of(kind) if item.mean]
            for kind, (ranges, _) in self._kinds.items()
        }
        self._settles = settles(rule)
        if self._settles:
            self._active = _Active(layout, bucket, summed.flags, pers[0], near)
        self._chosen_by = rule.choice.by if rule.choice else ""
        self._chooser = self._make_chooser(rule.choice) if rule.choice else None
        self._totals = torch.empty(0, dtype=torch.float64)
        self._found: dict[str, Tensor] = {}  # in float64
        self._given: dict[bool, dict[str, Tensor]] = {}  # in float32

    def has(self, of_update: bool) -> bool:
        """Whether there is anything to be added up, or to be settled, of the kind ``of_update``."""
        return bool(self._kinds[of_update][0]) or (of_update and self._settles)

    def of(self, of_update: bool) -> tuple[Sum, ...]:
        """Return the sums of the updates (``of_update``), or those of the gradients."""
        return tuple(item for item in self._rule.sums if item.of_update == of_update)

    def begin(self, of_update: bool, states: Sequence[Mapping[str, Any]]) -> None:
        """Set all sums of the kind ``of_update`` to zero, and the statistics to what is kept in ``states``, by tensor."""
        ranges, numel = self._kinds[of_update]
        self._totals = torch.zeros(numel, dtype=torch.float64, device=self._near)
        for name in self._statistics(of_update):
            self._kept[name].read(self._totals[ranges[name]], [state[name] for state in states])

    def add(self, item: Sum, portion: int, terms: Sequence[Tensor]) -> None:
        """Add terms to one of the sums that were begun.

        Args:
            item: the sum.
            portion: number of the portion.
            terms: (elements,) for each of its items.
        """
        ranges, _ = self._kinds[item.of_update]
        self._items[portion].add(item.per, self._totals[ranges[item.name]], terms)

    def finish(self, of_update: bool) -> None:
        """Add up the ranks' sums of the kind ``of_update``. Collective if the bucket travels."""
        ranges, numel = self._kinds[of_update]
        if self._travels and numel:
            totals = self._totals.to(self._binding.device)
            sum_over_ranks(totals, self._binding)
            self._totals = totals.to(self._near)
        for within, terms in self._means[of_update]:
            self._totals[within].div_(terms)
        self._found |= {name: self._totals[within] for name, within in ranges.items()}
        if not self._settles:
            rounded = self._totals.float()
            self._given[of_update] = {name: rounded[within] for name, within in ranges.items()}
            if self._chooser and not of_update:
                self._chooser.choose(rounded)
                self._found[self._chosen_by] = self._given[False][self._chosen_by]

    def settle(self, of_update: bool, outgoing: Tensor, states: Sequence[Mapping[str, Any]], now: Hyperparameters) -> None:
        """Let the rule settle the finished sums, and keep the statistics that it advances.

        Args:
            of_update: the kind that was finished last.
            outgoing: for updates, the exchange's send buffer with the flags that came back.
            states: the optimizer's state of each tensor; statistics are changed in place.
            now: hyperparameters of the step.

        Raises:
            TypeError: what the rule returns does not have the shape of what it is given.
        """
        if not self._settles:
            return
        values = dict(self._found)
        if of_update:
            values["active"] = self._active.of(outgoing)
        found = self._rule.settle(of_update, values, now)
        count = next(iter(self._bounds.values())).count
        wrong = [name for name, value in found.items() if value.shape != (count,)]
        if wrong:
            raise TypeError(f"{type(self._rule).__name__}.settle: '{wrong[0]}' is not ({count},), as what it is given")
        for name in self._kept.keys() & found.keys():
            self._kept[name].write(found[name].float(), [state[name] for state in states])
        self._given[of_update] = {name: value.float() for name, value in found.items() if name not in self._kept}

    def given(self, portion: int, of_update: bool) -> dict[str, list[Tensor]]:
        """Return what ``direction``, or ``apply`` (``of_update``), gets for each item of a portion.

        Returns:
            By name, one float32 tensor per item: (1,) for a value per matrix, (elements,) for one per row.
        """
        found = self._given.get(of_update, {})  # there may be none of this kind
        if of_update and not self._settles:
            found = {**self._given.get(False, {}), **found}
            found.pop(self._chosen_by, None)
        return {name: self._items[portion].spread(self._per(name), value) for name, value in found.items()}

    def of_matrices(self, matrices: Sequence[int]) -> Mapping[str, Tensor]:
        """Return, by sum of the gradients, (n, outputs) or (n, 1) in float32 for these ``matrices`` of one shape.

        A rule that settles them gets none.
        """
        found = {}
        for item in () if self._settles else self.of(False):
            count = self._layout.matrices[matrices[0]].values(item.per)
            values = self._found[item.name].to(self._binding.device)
            starts = [self._bounds[item.per].starts[index] for index in matrices]
            found[item.name] = torch.stack([values.narrow(0, start, count) for start in starts]).float()
        return found

    def release(self) -> None:
        """Free the values."""
        self._found.clear()
        self._given.clear()
        self._totals = torch.empty(0, dtype=torch.float64)

    def _per(self, name: str) -> Per:
        """What a value is for that `settle` returned, whose values are all alike, or a sum."""
        return self._pers[name] if name in self._pers else next(iter(self._bounds))

    def _statistics(self, of_update: bool) -> list[str]:
        return [found.name for found in statistics_of(self._rule, "apply" if of_update else "direction")]

    def _named(self, of_update: bool) -> list[str]:
        return [item.name for item in self.of(of_update)] + self._statistics(of_update)

    def _ranges(self, names: Sequence[str]) -> tuple[dict[str, slice], int]:
        """Lay the values of all names out in one vector; return where each lies, and its length."""
        edges = list(accumulate((self._bounds[self._pers[name]].count for name in names), initial=0))
        return {name: slice(*edge) for name, edge in zip(names, pairwise(edges), strict=True)}, edges[-1]

    def _make_chooser(self, choice: Choice) -> Chooser:
        """Return what turns the values of the choice's sum into flags, in the vector of the gradients' sums."""
        first = self._kinds[False][0][choice.by].start
        starts = {index: first + start for index, start in self._bounds["row"].starts.items()}
        return Chooser(choice, self._layout, starts, self._near)

    def _terms(self, item: Sum) -> Tensor:
        """Return how many elements each value of a sum is the mean of."""
        terms = []
        for index in self._bounds[item.per].starts:
            matrix = self._layout.matrices[index]
            values = matrix.values(item.per)
            terms += [matrix.numel / values] * values
        return torch.tensor(terms, dtype=torch.float64).to(self._near)

    def _is_counted_elsewhere(self, index: int) -> bool:
        """Whether the first tensor rank has the same elements, and counts them."""
        tensor_ranks = self._layout.tensor_ranks
        replicated = self._layout.matrices[index].shards < tensor_ranks
        return self._travels and replicated and self._binding.rank % tensor_ranks > 0


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """Where the values of a statistic lie that this rank keeps for one bucket.

    Attributes:
        in_state, inside: views of each fragment's values in the state, and in the vector of the bucket's values.
        counted_in_state, counted: the same without those that another tensor rank keeps too.
    """

    in_state: Views
    inside: Views
    counted_in_state: Views
    counted: Views

    @classmethod
    def of(
        cls,
        found: Sequence[TensorRange],
        bucket: RankBucket,
        layout: PartitionLayout,
        per: Per,
        bounds: Bounds,
        uncounted: Collection[int],
    ) -> "_Kept":
        """Pair the ranges ``found`` of the state, one per fragment, with those of the vector that ``bounds`` tells."""
        in_state: list[tuple[int, int, int]] = []
        inside: list[tuple[int, int, int]] = []
        for fragment, lies in zip(bucket.fragments, found, strict=True):
            values = layout.matrices[fragment.matrix].values_in(per, fragment.within)
            start = bounds.starts[fragment.matrix] + values.start
            in_state.append((lies.tensor, lies.within.start, values.numel))
            inside.append((0, start, values.numel))
        counted = [fragment.matrix not in uncounted for fragment in bucket.fragments]
        chosen = [Views(list(compress(ranges, counted))) for ranges in (in_state, inside)]
        return cls(Views(in_state), Views(inside), *chosen)

    def read(self, into: Tensor, states: Sequence[Tensor]) -> None:
        """Copy what is kept ``into`` a vector."""
        if sources := self.counted_in_state.of(states):
            torch._foreach_copy_(self.counted.of([into]), sources)

    def write(self, values: Tensor, states: Sequence[Tensor]) -> None:
        """Keep the ``values`` of a vector."""
        if targets := self.in_state.of(states):
            torch._foreach_copy_(targets, self.inside.of([values]))


class _Active:
    """Reader of the flags that come back with the updates: which rows, or matrices, are active.

    Args:
        layout: of the group.
        bucket: this rank's share of the bucket. Matrices of which it holds nothing count as not active.
        flags: place of the flag of each fragment in the send buffer.
        per: whether a flag is wanted for each "row" or "matrix".
        near: device of the stepped tensors.
    """

    def __init__(self, layout: PartitionLayout, bucket: RankBucket, flags: Sequence[int], per: Per, near: torch.device) -> None:
        numbers = {index: number for number, index in enumerate(bucket.matrices)}
        self._count = len(numbers)
        self._flags = torch.tensor(flags, dtype=torch.long).to(near)
        self._places = torch.tensor([numbers[f.matrix] for f in bucket.fragments], dtype=torch.long).to(near)
        counts = [layout.matrices[index].values(per) for index in bucket.matrices]
        matrices = torch.arange(self._count).repeat_interleave(torch.tensor(counts, dtype=torch.long))
        self._of_values = None if per == "matrix" else matrices.to(near)

    def of(self, outgoing: Tensor) -> Tensor:
        """Return (values,) 0 or 1 in float64, of the send buffer that came back."""
        found = torch.zeros(self._count, dtype=torch.float64, device=outgoing.device)
        found.index_copy_(0, self._places, outgoing.index_select(0, self._flags).double())
        return found if self._of_values is None else found.index_select(0, self._of_values)
