"""The tensors of one call of ``step()`` as data: the places of their state, and the ranges that are updated together.

Under ZeRO a call steps one flat slice; elsewhere one tensor per parameter. Offsets of the plan count through all of them.
"""

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_optforge.config.sections import ShardingSettings
from ds_optforge.routing.roles import Route
from ds_optforge.rules.around import Around
from ds_optforge.rules.base import Buffer, ElementwiseRule, MatrixRule, State, kept_by
from ds_optforge.rules.settings import RuleSettings
from ds_optforge.state import Plain, StateFormat
from ds_optforge.step.factors import BucketFactors
from ds_optforge.step.rows import ChosenRows
from ds_optforge.step.sums import BucketSums
from ds_optforge.zero.exchange import BucketExchange
from ds_optforge.zero.layout import Binding
from ds_optforge.zero.partition import Range
from ds_optforge.zero.placement import Placement
from ds_optforge.zero.views import Views

# Elements that are read and updated together, which bounds temporary tensors. On a CPU they fit its cache (measured: half the
# time of whole buckets); on other devices the number of kernels counts more.
_CHUNK_NUMEL = {"cpu": 2**18}
_CHUNK_NUMEL_ELSEWHERE = 2**25


def chunk_numel(device: torch.device) -> int:
    """Return the most elements that are read and updated together on ``device``."""
    return _CHUNK_NUMEL.get(device.type, _CHUNK_NUMEL_ELSEWHERE)


@dataclass(frozen=True, slots=True)
class Members:
    """Parameters, routes, settings and rule of a parameter group. The group's dict holds only what a schedule may change."""

    parameters: tuple[Tensor, ...]
    routes: tuple[Route, ...]
    settings: RuleSettings
    rule: ElementwiseRule | MatrixRule
    around: Around

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """The state buffers of the rule and of what is around it."""
        return (*self.rule.buffers, *self.around.buffers)

    @property
    def averages(self) -> tuple[str, ...]:
        """Names of the buffers from which the weights to evaluate are computed; empty if these are the trained ones."""
        return (*self.rule.averages, *(buffer.name for buffer in self.around.buffers))


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """A range of one tensor that is read and updated together: fragments, or ranges of them, side by side ("items").

    Attributes:
        tensor: number of the tensor.
        within: elements of the tensor.
        sizes: elements of each item.
    """

    tensor: int
    within: Range
    sizes: tuple[int, ...]

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return a view of the span, (elements,), in flat ``tensors`` that are laid out like the slices."""
        return tensors[self.tensor].narrow(0, self.within.start, self.within.numel)


@dataclass(frozen=True, slots=True, eq=False)
class Portion:
    """Spans of a bucket that are read and updated together.

    Attributes:
        spans: the ranges of the tensors, made of items.
        in_send: views of the items in the exchange's send buffer.
        places: (matrix, start in the matrix) of each item.
    """

    spans: tuple[Span, ...]
    in_send: Views
    places: tuple[tuple[int, int], ...]

    @property
    def sizes(self) -> list[int]:
        """Elements of each item."""
        return [size for span in self.spans for size in span.sizes]

    def views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return one view per span, (elements,) each, of flat ``tensors`` that are laid out like the slices."""
        return [span.of(tensors) for span in self.spans]

    def split(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Cut ``views``, one per span, into one view per item."""
        return [item for view, span in zip(views, self.spans, strict=True) for item in torch.split(view, list(span.sizes))]

    def in_buffer(self, buffer: Tensor) -> list[Tensor]:
        """Return one view per item, (elements,) each, of the send ``buffer``."""
        return self.in_send.of([buffer])


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Matrices that travel, or are stepped, together.

    Attributes:
        exchange: brings fragments to the owners of their matrices, and updates back.
        fragments: views of each fragment in the tensors.
        portions: the same elements, a bounded number in each portion.
        flags: (items of all portions,) place in the exchange's send buffer of the flag of each item's fragment.
        kept: by statistic, views of the values that are kept with each fragment, as the exchange's ``pattern``.
        norms: (fragments,) norms to which updates are scaled; None if matrices are orthogonalized whole.
        sums: of the rule; None if it has none.
        factors: of the owned matrices; None if the rule has none.
        rows: that are chosen; None if all are stepped.
    """

    exchange: BucketExchange
    fragments: Views
    portions: tuple[Portion, ...]
    flags: Tensor
    kept: tuple[tuple[str, Views], ...]
    norms: Tensor | None
    sums: BucketSums | None
    factors: BucketFactors | None
    rows: ChosenRows | None


@dataclass(frozen=True, slots=True, eq=False)
class Slices:
    """The tensors of one call of ``step()``, bound to their places.

    Attributes:
        binding: the places as DeepSpeed shows them, and the process group.
        sharding: of the optimizer.
        tensors: ``group["params"]``.
        placement: this rank's view of the layout.
        formats: state format of each tensor.
        value_counts: by statistic and factor, the number of values that are kept with each tensor.
        travelling: buckets of a matrix rule's straddling matrices.
        local: buckets of a matrix rule's matrices that lie whole on this rank.
        alone: buckets of this rank's fragments of straddling matrices, to be orthogonalized separately; empty if that is
            never done.
        spans: for each call of an elementwise rule, the spans that it updates.
    """

    binding: Binding
    sharding: ShardingSettings
    tensors: tuple[Tensor, ...]
    placement: Placement
    formats: tuple[StateFormat, ...]
    value_counts: dict[str, tuple[int, ...]]
    travelling: tuple[Bucket, ...]
    local: tuple[Bucket, ...]
    alone: tuple[Bucket, ...]
    spans: tuple[tuple[Span, ...], ...]

    def allocate(
        self,
        members: Members,
        states: Sequence[MutableMapping[str, Any]],
        indices: Iterable[int] | None = None,
    ) -> None:
        """Allocate missing state.

        Args:
            members: of the group.
            states: the optimizer's state of each tensor; entries are added in place.
            indices: numbers of the tensors that are to have state; None for all.
        """
        for index in range(len(self.tensors)) if indices is None else indices:
            tensor, state = self.tensors[index], states[index]
            if "step" in state:
                continue
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            values = tensor.detach().contiguous()  # state is row-major whatever the weight is
            for buffer in members.buffers:
                self.format_of(index, buffer).allocate(state, buffer, values)
            for name in (kept.name for kept in kept_by(members.rule)):
                count = self.value_counts[name][index]
                state[name] = torch.zeros(count, dtype=torch.float32, device=tensor.device)

    @contextmanager
    def opened(
        self, buffers: Sequence[Buffer], states: Sequence[MutableMapping[str, Any]], spans: Sequence[Span], store: bool = True
    ) -> Iterator[State]:
        """Open a context with the state of some spans, in the tensors' dtype or a wide one, and store it at the end.

        Args:
            buffers: those to open.
            states: the optimizer's state of each tensor.
            spans: the ranges to open.
            store: whether changes are stored.

        Yields:
            By buffer, one (elements,) tensor per span.
        """
        values: dict[str, list[Tensor]] = {buffer.name: [] for buffer in buffers}
        for buffer in buffers:
            for span in spans:
                style, state, within = self.format_of(span.tensor, buffer), states[span.tensor], span.within
                value = style.read(state, buffer, within.start, within.numel)
                values[buffer.name].append(value if buffer.wide else value.to(self.tensors[span.tensor].dtype))
        yield values
        if not store:
            return
        for buffer in buffers:
            for span, value in zip(spans, values.pop(buffer.name), strict=True):  # no longer held while the next is written
                self.format_of(span.tensor, buffer).write(states[span.tensor], buffer, span.within.start, value)

    def format_of(self, tensor: int, buffer: Buffer) -> StateFormat:
        """Return the format in which the tensor of that number keeps ``buffer``."""
        return Plain(_full_precision(buffer, self.tensors[tensor])) if buffer.full_precision else self.formats[tensor]


def buffer_dtype(state_dtype: str, buffer: Buffer, tensor: Tensor) -> torch.dtype:
    """Return the dtype in which ``tensor`` keeps ``buffer``, given the configured ``state_dtype``."""
    if buffer.full_precision or state_dtype == "float32":
        return _full_precision(buffer, tensor)
    return torch.uint8 if state_dtype == "8bit" else torch.bfloat16


def _full_precision(buffer: Buffer, tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32) if buffer.wide else tensor.dtype


def cut_spans(spans: Sequence[Span], limit: int) -> Iterator[tuple[Span, ...]]:
    """Cut spans, and yield them in tuples of at most ``limit`` elements."""
    packed: list[Span] = []
    room = limit
    for span in spans:
        for start in range(0, span.within.numel, limit):
            numel = min(limit, span.within.numel - start)
            if numel > room:
                yield tuple(packed)
                packed, room = [], limit
            packed.append(Span(span.tensor, Range(span.within.start + start, numel), (numel,)))
            room -= numel
    if packed:
        yield tuple(packed)
