"""Binds the tensors of one call of ``step()``: makes buckets, portions and spans from the plan, once per call."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ds_optforge.config.sections import THIN_ROWS, ShardingSettings
from ds_optforge.rules.base import ElementwiseRule, MatrixRule, factors_of, statistics_of, works_in_teams
from ds_optforge.state import EightBit, Plain, StateFormat, portions
from ds_optforge.step.factors import BucketFactors
from ds_optforge.step.rows import ChosenRows
from ds_optforge.step.slices import Bucket, Members, Portion, Slices, Span, chunk_numel
from ds_optforge.step.sums import BucketSums, Summed
from ds_optforge.zero.buckets import RankBucket
from ds_optforge.zero.group_plan import GroupPlan, PlannedBucket, Wanted, plan_group
from ds_optforge.zero.partition import Fragment, PartitionLayout, Range
from ds_optforge.zero.placement import Held, TensorRange
from ds_optforge.zero.views import Views

logger = logging.getLogger("ds_optforge")


def bind_slices(members: Members, tensors: Sequence[Tensor], sharding: ShardingSettings, routing: str) -> Slices:
    """Plan with the other ranks, and cut the tensors accordingly. Collective.

    Args:
        members: of the parameter group.
        tensors: ``group["params"]``.
        sharding: of the optimizer.
        routing: a text with a line per parameter of the whole optimizer, on which ranks must agree.

    Raises:
        LayoutError: see `plan_group`.
    """
    rule, state_dtype = members.rule, members.settings.state_dtype
    agreed = f"sharding {sharding}\n{routing}"
    found = plan_group(members.parameters, members.routes, tensors, _wanted(rule, sharding), agreed)
    formats = tuple(_format(state_dtype, tensor, held) for tensor, held in zip(tensors, found.held, strict=True))
    counts = {statistic.name: tuple(found.placement.value_counts(statistic.per)) for statistic in statistics_of(rule)}
    counts |= {factor.name: tuple(found.placement.owned_counts(factor.of)) for factor in factors_of(rule)}
    travelling: tuple[Bucket, ...] = ()
    local: tuple[Bucket, ...] = ()
    alone: tuple[Bucket, ...] = ()
    spans: tuple[tuple[Span, ...], ...] = ()
    if isinstance(rule, MatrixRule):
        builder = _BucketBuilder(found, rule, state_dtype == "8bit", tensors[0].device)
        travelling, local = builder.build(found.travelling), builder.build(found.local)
        alone = builder.build(found.alone, alone=True)
        fragments = [fragment for bucket in found.alone for fragment in bucket.exchange.bucket.fragments]
        warn_of_thin_fragments(found.placement.layout, fragments, found.binding.rank)
    else:
        spans = elementwise_spans(found.held, [t.numel() for t in tensors], tensors[0].device, rule, state_dtype)
    return Slices(found.binding, sharding, tuple(tensors), found.placement, formats, counts, travelling, local, alone, spans)


def _wanted(rule: ElementwiseRule | MatrixRule, sharding: ShardingSettings) -> Wanted:
    if not isinstance(rule, MatrixRule):
        return Wanted(sharding.bucket_numel)
    return Wanted(
        sharding.bucket_numel,
        rule.cost_on,
        getattr(torch, sharding.wire_dtype),
        tuple(statistic.per for statistic in statistics_of(rule, "update")),
        gathers=sharding.travels,
        alone=sharding.mode == "shard_local",
        keeps=bool(rule.factors),
        team_cost=rule.team_cost if works_in_teams(rule) else None,
        rows=rule.choice.count if rule.choice else None,
    )


def _format(name: str, tensor: Tensor, fragments: Sequence[Held]) -> StateFormat:
    """Return the format of a tensor's state; "float32" is the tensor's own dtype, which differs in plain PyTorch only."""
    if name == "8bit":
        return EightBit(fragments)
    return Plain(tensor.dtype if name == "float32" else getattr(torch, name))


def elementwise_spans(
    held: Sequence[Sequence[Held]], numels: Sequence[int], device: torch.device, rule: ElementwiseRule, state_dtype: str
) -> tuple[tuple[Span, ...], ...]:
    """Cut tensors into the spans of each call of the rule.

    A rule that works in place on full-precision state takes everything in one call, others a bounded number of elements.

    Args:
        held: the fragments in each tensor.
        numels: elements of each tensor.
        device: of the tensors.
        rule: of the group.
        state_dtype: of its state.
    """
    if state_dtype == "float32" and rule.in_place:
        return (tuple(Span(index, Range(0, numel), (numel,)) for index, numel in enumerate(numels)),)
    calls: list[list[tuple[int, int, int]]] = []  # (tensor, start, numel)
    room = 0
    limit = chunk_numel(device)
    for index, fragments in enumerate(held):
        for start, numel in chain.from_iterable(portions(fragments, limit)):
            if numel > room:
                calls.append([])
                room = limit
            calls[-1].append((index, start, numel))
            room -= numel
    return tuple(map(_merged, calls))


def warn_of_thin_fragments(layout: PartitionLayout, fragments: Sequence[Fragment], rank: int) -> None:
    """Log a warning on the first rank if few rows would be orthogonalized alone, which is little more than normalising them.

    Args:
        layout: of the group.
        fragments: those that ``rank`` orthogonalizes alone.
        rank: this rank.
    """
    rows = {f.matrix: f.numel // layout.matrices[f.matrix].width for f in fragments}
    thin = [matrix for matrix, count in rows.items() if count < min(THIN_ROWS, layout.matrices[matrix].rows)]
    if thin and rank == 0:
        least = min(thin, key=lambda matrix: rows[matrix])
        logger.warning(
            "shard_local: %d of %d matrices have fewer than %d whole rows on this rank (%s: %d), which makes their update "
            "row normalisation rather than Muon; mode 'gather', or gather_every, or fewer ranks, avoid it",
            len(thin),
            len(rows),
            THIN_ROWS,
            layout.describe(least),
            rows[least],
        )


class _BucketBuilder:
    """Builder of buckets of one rank's tensors from planned buckets."""

    def __init__(self, found: GroupPlan, rule: MatrixRule, in_blocks: bool, near: torch.device) -> None:
        self._rule, self._layout, self._binding = rule, found.placement.layout, found.binding
        self._in_blocks, self._near = in_blocks, near
        self._factors = [(factor, found.placement.owned_places(factor.of)) for factor in rule.factors]
        beside = statistics_of(rule, "direction", "apply")
        self._beside = {statistic.name: found.placement.value_places(statistic.per) for statistic in beside}

    def build(self, buckets: Sequence[PlannedBucket], alone: bool = False) -> tuple[Bucket, ...]:
        """Build a bucket from each of the plan's; ``alone`` tells that fragments are orthogonalized separately."""
        return tuple(self._bucket(bucket, alone) for bucket in buckets)

    def _bucket(self, bucket: PlannedBucket, alone: bool) -> Bucket:
        own = bucket.exchange.bucket
        packed = pack(self._layout, own, bucket.fragments, chunk_numel(self._near), self._in_blocks)
        flags = [own.sent[item.fragment].flag for portion in packed for item in portion]
        portions, choice = tuple(map(portion_of, packed)), self._rule.choice
        sums = self._sums(own, portions) if self._rule.sums else None
        return Bucket(
            bucket.exchange,
            Views([(lies.tensor, lies.within.start, lies.within.numel) for lies in bucket.fragments]),
            portions,
            torch.tensor(flags, dtype=torch.long, device=self._near),
            self._kept(bucket),
            self._norms(own) if alone else None,
            sums,
            BucketFactors(self._factors, self._layout, bucket.exchange, self._binding.device) if self._factors else None,
            ChosenRows(choice, bucket.exchange, sums) if choice and sums else None,
        )

    def _sums(self, own: RankBucket, portions: Sequence[Portion]) -> BucketSums:
        summed = Summed(
            [(portion.places, portion.sizes) for portion in portions],
            [place.flag for place in own.sent],
            {name: [places[fragment.matrix] for fragment in own.fragments] for name, places in self._beside.items()},
        )
        return BucketSums(self._rule, self._layout, own, self._binding, summed, self._near)

    def _kept(self, bucket: PlannedBucket) -> tuple[tuple[str, Views], ...]:
        words = bucket.exchange.bucket.kept.words
        found = []
        for number, statistic in enumerate(statistics_of(self._rule, "update")):
            places = [of_fragment[number] for of_fragment in bucket.kept]
            ranges = [(place.tensor, place.within.start * words, place.within.numel * words) for place in places]
            found.append((statistic.name, Views(ranges)))
        return tuple(found)

    def _norms(self, bucket: RankBucket) -> Tensor:
        """Return the norm of each fragment's update, (fragments,), that gives it the root mean square of a whole matrix's."""
        norms = []
        for fragment in bucket.fragments:
            matrix = self._layout.matrices[fragment.matrix]
            norms.append(self._rule.rms(matrix.rows, matrix.cols, matrix.transposed) * math.sqrt(fragment.numel))
        return torch.tensor(norms, dtype=torch.float32, device=self._near)


@dataclass(frozen=True, slots=True)
class Item:
    """A fragment, or a range of one, that a portion reads and updates.

    Attributes:
        tensor, tensor_start: place of its first element in the tensors.
        numel: its elements.
        fragment: number of the fragment within the bucket.
        position: place of its first element in the send buffer.
        matrix, matrix_start: number of the matrix in the layout, and place of its first element in it.
    """

    tensor: int
    tensor_start: int
    numel: int
    fragment: int
    position: int
    matrix: int
    matrix_start: int


def pack(
    layout: PartitionLayout, own: RankBucket, places: Sequence[TensorRange], limit: int, in_blocks: bool = False
) -> list[list[Item]]:
    """Cut a bucket's fragments into items, and pack these into lists of a bounded number of elements.

    Args:
        layout: of the group.
        own: this rank's share of the bucket.
        places: of its fragments in the tensors.
        limit: most elements of a list.
        in_blocks: whether a cut may only be where a block of 8-bit state begins.
    """
    found: list[list[Item]] = []
    room = 0
    for index, (fragment, place, lies) in enumerate(zip(own.fragments, own.sent, places, strict=True)):
        begin = layout.start_in_parameter(fragment) if in_blocks else 0
        held = Held(lies.tensor, lies.within.start, Range(begin, fragment.numel))
        for start, numel in chain.from_iterable(portions([held], limit)):
            if numel > room:
                found.append([])
                room = limit
            done = start - lies.within.start
            within = fragment.within.start + done
            found[-1].append(Item(lies.tensor, start, numel, index, place.position + done, fragment.matrix, within))
            room -= numel
    return found


def portion_of(items: Sequence[Item]) -> Portion:
    """Make a portion of items that are to be read and updated together."""
    return Portion(
        _merged([(item.tensor, item.tensor_start, item.numel) for item in items]),
        Views([(0, item.position, item.numel) for item in items]),
        tuple((item.matrix, item.matrix_start) for item in items),
    )


def _merged(items: Sequence[tuple[int, int, int]]) -> tuple[Span, ...]:
    """Merge what lies side by side in one tensor into spans; an item is (tensor, start, numel)."""
    spans: list[tuple[int, int, list[int]]] = []  # tensor, start, sizes
    end = (-1, -1)
    for tensor, start, numel in items:
        if (tensor, start) != end:
            spans.append((tensor, start, []))
        spans[-1][2].append(numel)
        end = tensor, start + numel
    return tuple(Span(tensor, Range(start, sum(sizes)), tuple(sizes)) for tensor, start, sizes in spans)
