"""The tensors of one call of ``step()`` as data: where their state is, and what is read and updated at a time.

Under ZeRO a call steps one flat slice; elsewhere a tensor per parameter. Offsets of the plan count through all of them.
"""

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_optforge.config.sections import ShardingSettings
from ds_optforge.routing.roles import Route
from ds_optforge.rules.base import Buffer, ElementwiseRule, MatrixRule, State, statistics_of
from ds_optforge.rules.settings import RuleSettings
from ds_optforge.state import Plain, StateFormat
from ds_optforge.step.sums import BucketSums
from ds_optforge.zero.exchange import BucketExchange
from ds_optforge.zero.layout import Binding
from ds_optforge.zero.partition import Range
from ds_optforge.zero.placement import Placement, TensorRange

# Elements that are read and updated at a time wherever that makes temporary tensors: bounds them. On a CPU they fit its
# cache (half the time of whole buckets was measured); elsewhere fewer kernels count.
_CHUNK_NUMEL = {"cpu": 2**18}
_CHUNK_NUMEL_ELSEWHERE = 2**22


def chunk_numel(device: torch.device) -> int:
    """The most elements that are read and updated at a time."""
    return _CHUNK_NUMEL.get(device.type, _CHUNK_NUMEL_ELSEWHERE)


@dataclass(frozen=True, slots=True)
class Members:
    """Parameters, routes, settings and rule of a parameter group. Its dict holds only what a schedule may change."""

    parameters: tuple[Tensor, ...]
    routes: tuple[Route, ...]
    settings: RuleSettings
    rule: ElementwiseRule | MatrixRule


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Elements ``within`` the tensor of that number: fragments, or parts of them, of the given sizes one behind the other."""

    tensor: int
    within: Range
    sizes: tuple[int, ...]

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """A view of the span in flat tensors that are laid out like the slices."""
        return tensors[self.tensor].narrow(0, self.within.start, self.within.numel)


def view_of(tensors: Sequence[Tensor], place: TensorRange) -> Tensor:
    """A view of a range in flat tensors."""
    return tensors[place.tensor].narrow(0, place.within.start, place.within.numel)


@dataclass(frozen=True, slots=True, eq=False)
class Portion:
    """Spans that are read and updated at a time, made of fragments or parts of them ("items").

    Attributes:
        spans: the ranges of the tensors.
        fragments: (items,) the number of each item's fragment within the bucket.
        positions: each item's place in the exchange's send buffer.
        places: (matrix, start in the matrix) of each item.
    """

    spans: tuple[Span, ...]
    fragments: Tensor
    positions: tuple[int, ...]
    places: tuple[tuple[int, int], ...]

    def views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """One view per span of flat tensors that are laid out like the slices."""
        return [span.of(tensors) for span in self.spans]

    def split(self, views: Sequence[Tensor]) -> list[Tensor]:
        """``views`` cut into items."""
        return [item for view, span in zip(views, self.spans, strict=True) for item in torch.split(view, list(span.sizes))]

    def in_buffer(self, buffer: Tensor) -> list[Tensor]:
        """The items in the send buffer."""
        sizes = [size for span in self.spans for size in span.sizes]
        return [buffer.narrow(0, at, size) for at, size in zip(self.positions, sizes, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Matrices that travel, or are stepped, together.

    Attributes:
        exchange: their way to their owners and back.
        fragments: where each fragment lies in the tensors.
        portions: the same elements, a bounded number at a time.
        kept: (statistic, its values) of the values that are kept with each fragment, statistic by statistic.
        norms: (fragments,) that updates are scaled to; None where matrices are orthogonalized whole.
        sums: of the rule; None where it has none.
    """

    exchange: BucketExchange
    fragments: tuple[TensorRange, ...]
    portions: tuple[Portion, ...]
    kept: tuple[tuple[str, TensorRange], ...]
    norms: Tensor | None
    sums: BucketSums | None


@dataclass(frozen=True, slots=True, eq=False)
class Slices:
    """One call's tensors, bound to their places.

    Attributes:
        tensors: ``group["params"]``.
        placement: where the parameters lie in them.
        formats: of each tensor's elementwise state.
        value_counts: by statistic, the values that are kept with each tensor.
        travelling, local: buckets of a matrix rule's matrices that lie on several ranks, and on this one alone.
        alone: this rank's fragments of the former, to be orthogonalized by themselves; empty where that is never done.
        spans: what an elementwise rule updates at a time.
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

    def allocate(self, rule: ElementwiseRule | MatrixRule, states: Sequence[MutableMapping[str, Any]]) -> None:
        """Enter the state that is missing."""
        for index, (tensor, state) in enumerate(zip(self.tensors, states, strict=True)):
            if "step" in state:
                continue
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for buffer in rule.buffers:
                self.format_of(index, buffer).allocate(state, buffer, tensor.detach())
            for statistic in statistics_of(rule):
                count = self.value_counts[statistic.name][index]
                state[statistic.name] = torch.zeros(count, dtype=torch.float32, device=tensor.device)

    @contextmanager
    def opened(
        self, buffers: Sequence[Buffer], states: Sequence[MutableMapping[str, Any]], spans: Sequence[Span], store: bool = True
    ) -> Iterator[State]:
        """The spans' state in the tensors' dtype, by buffer; changes are stored at the end, unless ``store`` is False."""
        values: dict[str, list[Tensor]] = {buffer.name: [] for buffer in buffers}
        for buffer in buffers:
            for span in spans:
                style, state, within = self.format_of(span.tensor, buffer), states[span.tensor], span.within
                value = style.read(state, buffer, within.start, within.numel)
                values[buffer.name].append(value.to(self.tensors[span.tensor].dtype))
        yield values
        if not store:
            return
        for buffer in buffers:
            for span, value in zip(spans, values[buffer.name], strict=True):
                self.format_of(span.tensor, buffer).write(states[span.tensor], buffer, span.within.start, value)

    def format_of(self, tensor: int, buffer: Buffer) -> StateFormat:
        """How one tensor keeps one buffer."""
        return Plain(self.tensors[tensor].dtype) if buffer.full_precision else self.formats[tensor]


def buffer_dtype(state_dtype: str, buffer: Buffer, tensor: Tensor) -> torch.dtype:
    """The dtype in which a tensor's buffer is kept."""
    if buffer.full_precision or state_dtype == "float32":
        return tensor.dtype
    return torch.uint8 if state_dtype == "8bit" else torch.bfloat16
