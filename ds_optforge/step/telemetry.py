"""Per-group statistics of every k-th step, for the whole model.

Sums of squares are taken span by span while the step is processing a span, so that nothing of a slice's size is copied; one
small all-reduce adds them up over the ranks, and one copy brings them to the host, which does not wait for it: the first rank
sees in the next step whether they are healthy (on a CPU at once). Other steps, and optimizers without the setting, do no extra
work.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from itertools import chain
from typing import Any, Protocol
from zlib import crc32

import torch
from torch import Tensor

from ds_optforge.routing.roles import Route
from ds_optforge.rules.base import Hyperparameters, MatrixRule, State, Tensors
from ds_optforge.step.health import EXPECTED, Expected, Health, expected, healthy_ranges
from ds_optforge.step.host import onto, to_host
from ds_optforge.step.slices import Members, Slices, Span, chunk_numel, cut_spans
from ds_optforge.zero.agreement import on_first_rank, sum_over_ranks
from ds_optforge.zero.exchange import BucketExchange, MatrixBatch
from ds_optforge.zero.layout import Binding
from ds_optforge.zero.pipeline import Stage, replicated, sum_over_stages
from ds_optforge.zero.placement import Held
from ds_optforge.zero.shards import over_tensor_ranks, shard_of, tensor_rank

# Matrices that are sampled per group for the orthogonality error: the same ones in every step and layout.
SAMPLE = 8

_SUMS = ("elements", "change", "weight", "product", "momentum", "gradient", "defect", "matrices", "bytes")
# By device: sums of one group, (len(_SUMS),) in float64. With CPU offload some are the host's.
_Found = dict[torch.device, Tensor]
_SCALES = ("scaled_lr", "scaled")  # sum over the matrices of the learning rate times its factor, and their number


class Monitor(Protocol):
    """DeepSpeed's ``engine.monitor``."""

    enabled: bool

    def write_events(self, event_list: list[tuple[str, float, int]]) -> None:
        """Write the (tag, value, step) triples of ``event_list``."""


class Telemetry:
    """Collector of the sums of an optimizer's groups, which adds them up over the ranks once all groups have been stepped.

    ZeRO steps one group or sub-group at a time, so that a step has several calls of ``step()``. All ranks make the same
    calls in the same order, and count the parameters behind them to know the last one.

    Args:
        every: steps from one record to the next.
        members: of all groups, by identifier.
        stage: the stage of the pipeline that this rank trains; sums are then added up over the stages too.
    """

    def __init__(self, every: int, members: Mapping[str, Members], stage: Stage | None = None) -> None:
        self._every = every
        self._members, self._stage = members, stage
        parameters = chain.from_iterable(found.parameters for found in members.values())
        self._tensor_parallel = any(shard_of(parameter) for parameter in parameters)
        self._samples = {group: _sample(found.routes) for group, found in members.items()}
        self._expected: dict[str, Expected] = {}  # computed for the first record
        self._health = Health()
        self._monitor: Monitor | None = None
        self._last: dict[str, Any] = {}
        self._record: _Record | None = None  # on its way from the device
        self._skipped: Counter[str] = Counter()
        self._begin()

    def _begin(self) -> None:
        self._sums: dict[str, _Found] = {}
        self._now: dict[str, Hyperparameters] = {}
        self._steps: dict[str, int] = {}
        self._covered = dict.fromkeys(self._members, 0)
        self._widest: Binding | None = None

    @property
    def last(self) -> dict[str, Any]:
        """The last record: {"step": n, "groups": {group: {name: value}}}; empty before the first.

        Reading it first sends it to the monitor, and looks on the first rank whether it is healthy.
        """
        if self._record is not None:
            record, self._record = self._record, None
            self._last = {"step": record.step, "groups": self._read(record.step, record.rows())}
            self._write(self._last)
        return self._last

    def report(self) -> None:
        """Read a record that an earlier step has made, where anybody wants to see it; else it is read when asked for."""
        if on_first_rank() or (self._monitor and self._monitor.enabled):
            _ = self.last

    def _read(self, step: int, rows: Sequence[Sequence[float]]) -> dict[str, dict[str, float]]:
        """Make a record of the sums of each group, and look at it on the first rank."""
        groups = {}
        for group, row in zip(self._members, rows, strict=True):
            sums = dict(zip(_SUMS + _SCALES + EXPECTED, row, strict=True))
            if sums["elements"]:  # else none of its parameters had a gradient
                groups[group] = numbers = _numbers(sums)
                if on_first_rank():
                    self._health.look(step, group, numbers, healthy_ranges(numbers, sums))
        return groups

    def send_to(self, monitor: Monitor) -> None:
        """Write every later record to DeepSpeed's ``monitor`` as well."""
        self._monitor = monitor

    def skip(self, idle: Iterable[tuple[str, int]]) -> None:
        """Do not wait in this call of ``step()`` for (group, number of parameters): none of them has a gradient."""
        self._skipped = Counter()
        for group, count in idle:
            self._skipped[group] += count

    def watch(self, group: str, slices: Slices, states: Sequence[Mapping[str, Any]], step: int) -> "Watch | None":
        """Return a Watch for a call of ``step()``, or None if the step is not recorded.

        Args:
            group: identifier of the group.
            slices: its tensors.
            states: the optimizer's state of each tensor.
            step: number of the step.
        """
        if step % self._every:
            return None
        return Watch(self._members[group], slices, states, self._samples[group], self._tensor_parallel and tensor_rank() > 0)

    def add(self, group: str, watch: "Watch", now: Hyperparameters, step: int) -> None:
        """Add the sums of a finished call of ``step()``. Collective in the step's last call.

        Args:
            group: identifier of the group.
            watch: of the call.
            now: hyperparameters of the step.
            step: number of the step.
        """
        if self._steps.get(group) != step:  # else another sub-group of it was added in this step
            self._steps[group], self._covered[group] = step, 0
            self._sums.pop(group, None)
        found = self._sums.setdefault(group, {})
        for device, sums in watch.sums().items():
            found[device] = found[device] + sums if device in found else sums
        self._now[group] = now
        self._covered[group] += len(watch.slices.binding.indices)
        # Experts are cut over fewer ranks than the rest; the elements that a rank holds of them count in the sum over all.
        if self._widest is None or watch.slices.binding.world_size > self._widest.world_size:
            self._widest = watch.slices.binding
        waiting = {group: len(found.parameters) - self._skipped[group] for group, found in self._members.items()}
        if all(self._covered[group] == count or not count for group, count in waiting.items()):
            # A step may have no matrices that tensor parallelism has cut, which alone are bound over the tensor ranks.
            bound = self._tensor_parallel and not self._widest.tensor_parallel
            self._reduce(step, over_tensor_ranks(self._widest) if bound else self._widest)

    def _reduce(self, step: int, binding: Binding) -> None:
        sums = self._together(binding.device)
        sum_over_ranks(sums, binding)
        known = torch.tensor([self._known(group) for group in self._members], dtype=torch.float64)
        if self._stage:  # which other stages know for their groups
            sums = torch.cat([sums, onto(known, sums.device)], dim=1)
            sum_over_stages(sums, self._stage)
            known = known[:, :0]
        self._record = _Record(step, sums, known)
        self._begin()
        if sums.device.type == "cpu":
            self.report()

    def _together(self, device: torch.device) -> Tensor:
        """Return the sums of all groups, (groups, len(_SUMS)) on ``device``: by one copy, where any are the host's."""
        total = torch.zeros(len(self._members), len(_SUMS), dtype=torch.float64, device=device)
        for where in dict.fromkeys(where for found in self._sums.values() for where in found):
            # Nothing is there of a group that is skipped, or that other stages have.
            nothing = torch.zeros(len(_SUMS), dtype=torch.float64, device=where)
            total += onto(torch.stack([self._sums.get(group, {}).get(where, nothing) for group in self._members]), device)
        return total

    def _known(self, group: str) -> tuple[float, ...]:
        """Return `_SCALES` and `EXPECTED` of a group, which need nothing from the device."""
        found, now = self._members[group], self._now.get(group, {"lr": 0.0})
        if group not in self._expected:
            self._expected[group] = expected(found.rule, found.routes, self._samples[group])
        return *_scales(found, now["lr"]), *self._expected[group].sums(now)

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._monitor is None or not self._monitor.enabled:
            return
        self._monitor.write_events(
            [
                (f"OptForge/{group}/{name}", value, record["step"])
                for group, numbers in record["groups"].items()
                for name, value in numbers.items()
            ]
        )


class Watch:
    """Observer of one call of ``step()``, which takes the sums that telemetry needs.

    Args:
        members: of the group.
        slices: its tensors.
        states: the optimizer's state of each tensor.
        sample: (parameter's name, start) of the matrices that are sampled.
        without_whole: whether to leave out parameters that tensor parallelism does not cut.
    """

    def __init__(
        self,
        members: Members,
        slices: Slices,
        states: Sequence[Mapping[str, Any]],
        sample: frozenset[tuple[str, int]],
        without_whole: bool = False,
    ) -> None:
        self.slices = slices
        self._states = states
        self._workspace: Tensor | None = None
        self._found: dict[str, list[Tensor]] = {name: [] for name in _SUMS}
        # What an earlier stage of a pipeline or the first tensor rank has too is counted there.
        parameters = [members.parameters[index] for index in slices.binding.indices]
        copies = {i for i, found in enumerate(parameters) if replicated(found) or (without_whole and shard_of(found) is None)}
        self._held = [_merged(fragments) for fragments in slices.placement.held_fragments(without=copies)]
        buffers = members.rule.buffers
        self._momentum = next((buffer.name for buffer in buffers if buffer.momentum), "")
        layout = slices.placement.layout
        self._sample = {
            index
            for index, matrix in enumerate(layout.matrices)
            if (layout.names[matrix.parameter], matrix.start * matrix.shards) in sample
        }

    @property
    def spans(self) -> Iterator[tuple[Span, ...]]:
        """The slices' spans for an elementwise rule, cut so that a bounded number of elements is copied together."""
        limit = chunk_numel(self.slices.tensors[0].device)
        for spans in self.slices.spans:
            yield from cut_spans(spans, limit)

    @contextmanager
    def changes(self, spans: Sequence[Span], views: Tensors) -> Iterator[None]:
        """Open a context in which the rule changes the parameters; add up the squares of weights and changes.

        Args:
            spans: the ranges that change.
            views: (elements,) each: the parameters in these ranges.
        """
        parameters = self._without_padding(spans, views)
        before = self._copies(parameters)
        self._add("weight", before, before)
        yield
        if before:
            torch._foreach_sub_(before, parameters)
        self._add("change", before, before)

    def unchanged(self, tensors: Tensors) -> None:
        """Add up the squares of weights that this step leaves alone."""
        weights = [tensor.detach().reshape(-1) for tensor in tensors]
        self._add("weight", weights, weights)

    def _without_padding(self, spans: Sequence[Span], views: Tensors) -> list[Tensor]:
        """Return the views without padding: ZeRO-3 leaves arbitrary values between the parameters of a slice."""
        found = []
        for span, view in zip(spans, views, strict=True):
            held = self._held[span.tensor]
            first = max(bisect_right(held, (span.within.start, math.inf)) - 1, 0)
            for start, end in held[first:]:
                if start >= span.within.end:
                    break
                low, high = max(start, span.within.start), min(end, span.within.end)
                if low < high:
                    found.append(view.narrow(0, low - span.within.start, high - low))
        return found

    def _copies(self, parameters: Tensors) -> list[Tensor]:
        """Copy ``parameters`` into a workspace that later calls use again: allocating would cost more than copying."""
        sizes = [parameter.numel() for parameter in parameters]
        if not parameters:
            return []
        dtype = reduce(torch.promote_types, {parameter.dtype for parameter in parameters})
        if self._workspace is None or self._workspace.numel() < sum(sizes) or self._workspace.dtype != dtype:
            self._workspace = torch.empty(sum(sizes), dtype=dtype, device=parameters[0].device)
        copies = list(torch.split(self._workspace.narrow(0, 0, sum(sizes)), sizes))
        torch._foreach_copy_(copies, list(parameters))
        return copies

    def momentum(self, spans: Sequence[Span], views: Tensors, state: State) -> None:
        """Add up squares and products of gradients and momentum, after the rule has advanced its state.

        Args:
            spans: ranges of the tensors.
            views: (elements,) each: the gradients in these ranges.
            state: by buffer, (elements,) each in these ranges.
        """
        if self._momentum:
            gradients = self._without_padding(spans, views)
            averages = self._without_padding(spans, state[self._momentum])
            self._add("product", averages, gradients)
            self._add("momentum", averages, averages)
            self._add("gradient", gradients, gradients)

    def orthogonality(self, exchange: BucketExchange, index: int, batch: MatrixBatch) -> Callable[[Tensor], None]:
        """Return a function that takes the (n, rows, cols) orthogonal factors of a batch and adds up their errors.

        With a team it takes this member's rows, is collective, and adds up on the first member.

        Args:
            exchange: of the bucket.
            index: number of the batch.
            batch: what the exchange has for it; errors of matrices that are not active do not count.
        """
        active, team = batch.active, batch.team

        def look(orthogonal: Tensor) -> None:
            if team:
                orthogonal = team.whole(orthogonal)
                if team.place > 0:
                    return
            for slot, matrix in enumerate(exchange.owned(index)):
                if matrix in self._sample:
                    self._found["defect"].append(active[slot] * _defect(orthogonal[slot]))
                    self._found["matrices"].append(active[slot])

        return look

    def sums(self) -> _Found:
        """Return the sums of the call by device: of the stepped tensors, and of the model's weights."""
        elements = sum(end - start for held in self._held for start, end in held)
        nbytes = sum(
            value.nbytes
            for state in self._states
            for key, value in state.items()
            if isinstance(value, Tensor) and key != "step"
        )
        near = self.slices.tensors[0].device
        for name, value in (("elements", elements), ("bytes", nbytes)):
            self._found[name] = [torch.full((), value, dtype=torch.float64, device=near)]
        devices = dict.fromkeys(value.device for values in self._found.values() for value in values)
        return {device: torch.stack([_total(values, device) for values in self._found.values()]) for device in devices}

    def _add(self, name: str, left: Tensors, right: Tensors) -> None:
        # A dot product takes half the time of a norm on a CPU, where that of 16-bit vectors is a thousand times slower.
        self._found[name] += [torch.dot(_wide(a), _wide(b)) for a, b in zip(left, right, strict=True)]


class _Record:
    """The sums of a step on their way to the host.

    Args:
        step: number of the step.
        sums: (groups, n) on any device.
        known: (groups, m) numbers of the host that come behind them.
    """

    def __init__(self, step: int, sums: Tensor, known: Tensor) -> None:
        self.step, self._known = step, known
        self._sums, self._arrived = to_host(sums)

    def rows(self) -> list[list[float]]:
        """Wait until the sums are there, and return them with what is known, by group."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return torch.cat([self._sums, self._known], dim=1).tolist()


def _total(values: Sequence[Tensor], device: torch.device) -> Tensor:
    there = [value.double() for value in values if value.device == device]
    return torch.stack(there).sum() if there else torch.zeros((), dtype=torch.float64, device=device)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _defect(orthogonal: Tensor) -> Tensor:
    """Compute ||O O^T - I||_F^2 / n of one (rows, cols) matrix, O being the matrix or its transpose with n rows, the fewer."""
    short = orthogonal if orthogonal.shape[0] <= orthogonal.shape[1] else orthogonal.mT
    gram = torch.mm(short, short.mT).float()
    gram.diagonal().sub_(1.0)
    return gram.square_().sum() / len(gram)


def _merged(fragments: Sequence[Held]) -> list[tuple[int, int]]:
    """Merge adjacent fragments into (start, end) ranges of their tensor."""
    merged: list[tuple[int, int]] = []
    for fragment in fragments:
        start = fragment.tensor_start
        begin = merged.pop()[0] if merged and merged[-1][1] == start else start
        merged.append((begin, start + fragment.numel))
    return merged


def _sample(routes: Sequence[Route]) -> frozenset[tuple[str, int]]:
    """Choose the matrices to sample, as (parameter's name, start): by a hash, or all might have the same place in a layer."""
    places = [(route.name, start) for route in routes for start, _, _ in route.matrices]
    return frozenset(sorted(places, key=lambda place: crc32(f"{place[0]}[{place[1]}]".encode()))[:SAMPLE])


def _scales(members: Members, rate: float) -> tuple[float, float]:
    """Return `_SCALES`: the factors are those of a matrix rule's orthogonal updates; another rule counts as 1 matrix."""
    rule = members.rule
    if not members.routes or not isinstance(rule, MatrixRule):
        return (rate, 1.0) if members.routes else (0.0, 0.0)
    scales = [scale for route in members.routes for scale in route.scales(rule)]
    return rate * sum(scales), float(len(scales))


def _numbers(sums: Mapping[str, float]) -> dict[str, float]:
    """Make a group's record; numbers that do not apply to it, or have no value yet, are left out."""
    update, parameter = (math.sqrt(sums[name] / sums["elements"]) for name in ("change", "weight"))
    numbers = {"update_rms": update, "parameter_rms": parameter}
    if parameter > 0:
        numbers["update_to_parameter"] = update / parameter
    if sums["momentum"] > 0 and sums["gradient"] > 0:
        numbers["momentum_gradient_cosine"] = sums["product"] / math.sqrt(sums["momentum"] * sums["gradient"])
    if sums["matrices"] > 0:
        numbers["orthogonality_error"] = math.sqrt(sums["defect"] / sums["matrices"])
    return {**numbers, "effective_lr": sums["scaled_lr"] / sums["scaled"], "state_bytes": round(sums["bytes"])}
