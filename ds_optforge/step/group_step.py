"""Runs one call of ``step()`` for one parameter group: elementwise, or with matrices that travel to owners in buckets."""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ds_optforge.rules.around import AroundStep
from ds_optforge.rules.base import (
    Batch,
    ElementwiseRule,
    Hyperparameters,
    MatrixRule,
    State,
    Tensors,
    buffers_of,
    statistics_of,
)
from ds_optforge.step.finite import Gradients
from ds_optforge.step.fragments import flat_gradient, nonzero, scale_to
from ds_optforge.step.slices import Bucket, Members, Portion, Slices, Span, chunk_numel, cut_spans
from ds_optforge.step.telemetry import Telemetry, Watch
from ds_optforge.step.zeros import refuse_zeros
from ds_optforge.zero.exchange import MatrixBatch


class GroupStep:
    """The step of one parameter group in one call of ``step()``: `checked` gradients come first, then `update_group`.

    In plain PyTorch a parameter without a gradient is skipped, as torch.optim skips it: its weight, its state and its number of
    steps stay as they are. Under ZeRO nobody can tell, so that a missing gradient counts as zeros there.

    Args:
        group: the group's dict in ``param_groups``.
        name: identifier of the group.
        members: parameters, routes, settings and rule of the tensors.
        slices: the group's tensors (those on one device), bound to their places.
        state: the optimizer's state by tensor; entries are added for the tensors that are stepped.
        telemetry: of the optimizer; None if nothing is recorded.
    """

    def __init__(
        self,
        group: Mapping[str, Any],
        name: str,
        members: Members,
        slices: Slices,
        state: MutableMapping[Tensor, Any],
        telemetry: Telemetry | None,
    ) -> None:
        self.name, self._group, self._members, self._slices = name, group, members, slices
        self._telemetry = telemetry
        slices.binding.discard_left_overs(slices.tensors)
        tensors = slices.tensors
        skips = slices.binding.process_group is None and tensors[0] is members.parameters[0]
        self._taking = [index for index, tensor in enumerate(tensors) if not (skips and tensor.grad is None)]
        # Of a skipped tensor the state is only read; it has none before its first step, as in torch.optim.
        taking = set(self._taking)
        self._states = [state[t] if index in taking else state.get(t, {}) for index, t in enumerate(tensors)]
        self._gradients = [flat_gradient(tensor) for tensor in tensors]

    @property
    def size(self) -> int:
        """The number of parameters behind the step."""
        return len(self._slices.binding.indices)

    @property
    def slices(self) -> Slices:
        """The group's tensors."""
        return self._slices

    @property
    def steps_taken(self) -> int:
        """The steps of the tensor that has taken most; 0 before the first."""
        return max(int(state.get("step", 0)) for state in self._states)

    @property
    def is_idle(self) -> bool:
        """Whether none of the parameters has a gradient, so that there is no step."""
        return not self._taking

    @property
    def checked(self) -> Gradients | None:
        """The gradients, to be checked first; None under ZeRO, where DeepSpeed decides whether to skip the step."""
        binding = self._slices.binding
        return None if binding.partitioned else Gradients(self._gradients, self._slices.placement.layout.names, binding)

    def update_group(self) -> None:
        """Update the group's tensors and their state. Collective over the ranks that hold the group's parameters.

        Raises:
            ConfigError: a matrix of zeros that the rule refuses in its first step; nothing of the group was changed.
        """
        fresh, rule = [index for index in self._taking if not self._states[index]], self._members.rule
        if fresh and isinstance(rule, MatrixRule) and rule.refuses_zeros:
            refuse_zeros(self._slices, fresh, self._members.settings.rule)
        self._slices.allocate(self._members, self._states, self._taking)
        if fresh and self._is_rehearsal():
            return
        # Tensors that have been skipped are behind, and a rule counts steps: all with the same number are stepped together.
        counts = [int(self._states[index]["step"]) for index in self._taking]
        watch = None
        if self._telemetry:
            watch = self._telemetry.watch(self.name, self._slices, self._states, max(counts) + 1)
        for count in sorted(set(counts)):
            taking = [index for index, found in zip(self._taking, counts, strict=True) if found == count]
            call = self._call(taking, count + 1, watch)
            if isinstance(rule, ElementwiseRule):
                _step_elements(call, rule)
            else:
                _MatrixStep(call, rule).step_matrices()
            call.write_back()
        if self._telemetry and watch:
            taken = set(self._taking)
            watch.unchanged([t for index, t in enumerate(self._slices.tensors) if index not in taken])
            self._telemetry.add(self.name, watch, call.now, call.step)
        self._slices.binding.clear_spent_gradients(self._slices.tensors)

    def _is_rehearsal(self) -> bool:
        """Whether this is the call, with zero gradients, by which DeepSpeed's stage 0 in fp16 or bf16 allocates state."""
        clones = self._slices.tensors[0] is not self._members.parameters[0] and not self._slices.binding.partitioned
        return clones and not any(gradient.any() for gradient in self._gradients)

    def _call(self, taking: Sequence[int], step: int, watch: Watch | None) -> "_Call":
        """Count the step of the tensors in ``taking``, and gather what the rule gets."""
        states = [self._states[index] for index in taking]
        torch._foreach_add_([state["step"] for state in states], 1)
        scalars = {key: value for key, value in states[0].items() if isinstance(value, float)}
        now = self._members.rule.begin(self._group, scalars, step)
        around = self._members.around.begin(scalars, step, self._group["lr"])
        for state in states:
            state.update(scalars)
        if len(taking) == len(self._states):
            return _Call(self._slices, self._states, self._gradients, now, step, frozenset(taking), watch, around)
        return self._partial_call(frozenset(taking), now, step, watch, around)

    def _partial_call(
        self, taking: frozenset[int], now: Hyperparameters, step: int, watch: Watch | None, around: AroundStep | None
    ) -> "_Call":
        """Gather what the rule gets for some of the tensors; a matrix rule, which has buckets of all, gets zeros for the rest.

        Zero gradients change no weight and no statistic of a matrix rule. They would fade its buffers: it gets others.
        """
        states, gradients = list(self._states), list(self._gradients)
        others = [index for index in range(len(states)) if index not in taking]
        if isinstance(self._members.rule, MatrixRule):
            for index in others:
                states[index], gradients[index] = {}, torch.zeros_like(gradients[index])
            self._slices.allocate(self._members, states, others)
        return _Call(self._slices, states, gradients, now, step, taking, watch, around)


@dataclass(frozen=True, eq=False)
class _Call:
    """The inputs of a rule.

    Attributes:
        slices: the group's tensors.
        states, gradients: of each tensor; the gradients are flat.
        now: hyperparameters of the step.
        step: number of the step, from 1.
        taking: numbers of the tensors that are stepped.
        watch: of telemetry, if the step is recorded.
        around: what goes on around the rule, if anything.
    """

    slices: Slices
    states: Sequence[MutableMapping[str, Any]]
    gradients: Sequence[Tensor]
    now: Hyperparameters
    step: int
    taking: frozenset[int]
    watch: Watch | None
    around: AroundStep | None

    @cached_property
    def parameters(self) -> list[Tensor]:
        """The slices as flat tensors, (elements,) each; copies of those that are not row-major (channels_last)."""
        return [tensor.detach().reshape(-1) for tensor in self.slices.tensors]

    def write_back(self) -> None:
        """Copy the stepped values into the tensors that are not row-major."""
        for index in self.taking:
            tensor = self.slices.tensors[index]
            if not tensor.is_contiguous():
                tensor.copy_(self.parameters[index].view(tensor.shape))

    @property
    def spans(self) -> Iterator[tuple[Span, ...]]:
        """The spans for an elementwise rule, cut where a bounded number of elements is copied together."""
        if self.watch:
            yield from self.watch.spans
        elif not self.around:
            yield from self.slices.spans
        else:
            for spans in self.slices.spans:
                yield from cut_spans(spans, chunk_numel(self.parameters[0].device))

    def chosen(self, spans: Sequence[Span]) -> list[Span]:
        """Return those of ``spans`` that are in stepped tensors."""
        return [span for span in spans if span.tensor in self.taking]

    @contextmanager
    def changes(self, spans: Sequence[Span], active: Tensor | None = None) -> Iterator[None]:
        """Open a context in which the rule changes the parameters in these ranges, for telemetry and what is around it.

        Args:
            spans: the ranges.
            active: (items,) 0 or 1: whether the rule steps an item; None counts as all 1.
        """
        views, stepped = [span.of(self.parameters) for span in spans], self.chosen(spans)
        before = self.around.before(views) if self.around else []
        with self.watch.changes(stepped, [span.of(self.parameters) for span in stepped]) if self.watch else nullcontext():
            yield
        if self.around:
            with self.slices.opened(self.around.buffers, self.states, spans) as state:
                self.around.advance(views, before, state, [span.sizes for span in spans], active)


def _step_elements(call: _Call, rule: ElementwiseRule) -> None:
    for spans in map(call.chosen, call.spans):
        if not spans:
            continue
        parameters, gradients = ([span.of(tensors) for span in spans] for tensors in (call.parameters, call.gradients))
        with call.slices.opened(rule.buffers, call.states, spans) as state:
            with call.changes(spans):
                rule.step(parameters, gradients, state, call.now)
            if call.watch:
                call.watch.momentum(spans, gradients, state)


class _MatrixStep:
    """The step of a matrix rule: each bucket is collected, orthogonalized and applied."""

    def __init__(self, call: _Call, rule: MatrixRule) -> None:
        self._call, self._rule = call, rule
        self._chosen_by = rule.choice.by if rule.choice else ""
        self._by_gradient, self._by_update = buffers_of(rule, of_update=False), buffers_of(rule, of_update=True)

    def step_matrices(self) -> None:
        """Step all buckets: with exchanges, or every fragment alone."""
        slices = self._call.slices
        if slices.sharding.gathers(self._call.step):
            self._run_exchanges()
        else:
            self._run_alone((*slices.local, *slices.alone))

    def _run_exchanges(self) -> None:
        """Keep one exchange returning and one travelling out while another is orthogonalized; local matrices fill the gaps.

        While exchange k travels, exchange k + 1 is filled; that it is sent only once k has arrived leaves five buffers at most.
        The order of the collectives is the same on every rank.
        """
        travelling, local = self._call.slices.travelling, list(self._call.slices.local)
        if not travelling:
            return self._run_alone(local)
        late = [local.pop()] if local else []  # is orthogonalized while the last exchange travels out, applied while it returns
        last = len(travelling) - 1
        shares = [local[k :: last + 2] for k in range(last + 2)]
        self._fill(travelling[0])
        self._send(travelling[0])
        for k, bucket in enumerate(travelling):
            self._run_alone(shares[k])
            if k < last:
                self._fill(travelling[k + 1])
            else:
                self._prepare(late)
            bucket.exchange.arrive()
            if k < last:
                self._send(travelling[k + 1])
            self._update(bucket)
            if k == last:
                bucket.exchange.give_back()
            if k > 0:
                self._apply(travelling[k - 1])
            if k < last:
                bucket.exchange.give_back()
        self._run_alone(shares[-1])
        for bucket in (*late, travelling[-1]):
            self._apply(bucket)

    def _run_alone(self, buckets: Sequence[Bucket]) -> None:
        """Step buckets that do not travel."""
        for bucket in buckets:
            self._prepare([bucket])
            self._apply(bucket)

    def _prepare(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            self._fill(bucket)
            self._send(bucket)
            self._update(bucket)

    def _fill(self, bucket: Bucket) -> None:
        """Put the rule's directions into the send buffer."""
        self._sum(bucket, of_update=False)
        bucket.exchange.open()
        for number in range(len(bucket.portions)):
            self._fill_portion(bucket, number)

    def _fill_portion(self, bucket: Bucket, number: int) -> None:
        call, rule, portion = self._call, self._rule, bucket.portions[number]
        gradients, weights = portion.views(call.gradients), self._weights(portion)
        with call.slices.opened(self._by_gradient, call.states, portion.spans) as state:
            if bucket.sums and bucket.sums.has(False):  # no tensor may span two matrices
                sums = bucket.sums.given(number, of_update=False)
                given = (portion.split(gradients), self._split_weights(portion), _split(portion, state))
                directions = rule.direction(*given, sums, call.now)
                self._require_alike("direction", directions, given[0])
                if bucket.rows:
                    bucket.rows.mark(portion.in_send, sums[self._chosen_by])
            else:
                directions = rule.direction(gradients, weights, state, {}, call.now)
                self._require_alike("direction", directions, gradients)
                directions = portion.split(directions)
            torch._foreach_copy_(portion.in_buffer(bucket.exchange.outgoing), list(directions))
            if call.watch:
                call.watch.momentum(portion.spans, gradients, state)

    def _send(self, bucket: Bucket) -> None:
        if bucket.rows:
            bucket.rows.send()
        active = nonzero(bucket.fragments.of(self._call.gradients), bucket.exchange.outgoing.dtype)
        bucket.exchange.collect(active, self._kept(bucket))

    def _weights(self, portion: Portion) -> list[Tensor]:
        return portion.views(self._call.parameters) if self._rule.reads_weights else []

    def _split_weights(self, portion: Portion) -> list[Tensor]:
        weights = self._weights(portion)
        return portion.split(weights) if weights else []

    def _update(self, bucket: Bucket) -> None:
        for index in bucket.exchange.batches:
            self._update_batch(bucket, index)  # nothing of a batch is held while the next is orthogonalized

    def _update_batch(self, bucket: Bucket, index: int) -> None:
        whole = bucket.exchange.matrices(index)
        if bucket.rows:
            chosen, numbers = bucket.rows.take(index, whole)
            updates = self._updates(bucket, index, chosen, (whole.matrices.shape[1], whole.matrices.shape[2]))
            bucket.exchange.put(index, bucket.rows.spread(updates, numbers, chosen, whole), whole)
        else:
            bucket.exchange.put(index, self._updates(bucket, index, whole), whole)

    def _updates(self, bucket: Bucket, index: int, found: MatrixBatch, whole: tuple[int, int] | None = None) -> Tensor:
        """Return the rule's updates of a batch, in its shape; ``whole`` is that of the matrices if these are rows of them."""
        watch = self._call.watch
        names = (statistic.name for statistic in statistics_of(self._rule, "update"))
        batch = Batch(
            found.matrices,
            found.active,
            found.transposed,
            dict(zip(names, found.statistics, strict=True)),
            bucket.sums.of_matrices(bucket.exchange.owned(index)) if bucket.sums else {},
            found.has_all,
            bucket.factors.of(index, self._call.states) if bucket.factors else {},
            watch.orthogonality(bucket.exchange, index, found) if watch else _ignore,
            found.team,
            whole,
        )
        shape = found.shape_of_update
        updates = self._rule.update(batch, self._call.now)
        if not isinstance(updates, Tensor) or updates.shape != shape:
            raise self._wrong("update", updates, f"a tensor of shape {tuple(shape)}, as batch.matrices")
        if bucket.factors:
            bucket.factors.put(index, batch.factors, self._call.states)
        return updates

    def _apply(self, bucket: Bucket) -> None:
        bucket.exchange.await_updates()
        if bucket.norms is not None:
            scale_to(bucket.exchange.elements(), bucket.norms)
        bucket.exchange.returned_statistics(self._kept(bucket))
        self._sum(bucket, of_update=True)
        counts = [len(portion.places) for portion in bucket.portions]
        of_items = torch.split(bucket.exchange.outgoing[bucket.flags].float(), counts)
        for number, chosen in enumerate(of_items):
            self._apply_portion(bucket, number, chosen)
        bucket.exchange.release()
        if bucket.sums:
            bucket.sums.release()

    def _apply_portion(self, bucket: Bucket, number: int, chosen: Tensor) -> None:
        call, portion = self._call, bucket.portions[number]
        views = portion.views(call.parameters)
        parameters = portion.split(views)
        returned = self._returned(bucket, portion, parameters[0])
        sums = bucket.sums.given(number, of_update=True) if bucket.sums else {}
        with call.slices.opened(self._by_update, call.states, portion.spans) as state, call.changes(portion.spans, chosen):
            self._rule.apply(parameters, returned, chosen, _split(portion, state), sums, call.now)

    def _sum(self, bucket: Bucket, of_update: bool) -> None:
        """Add up the rule's terms of each portion's elements, over all ranks that hold a fragment of a matrix."""
        sums = bucket.sums
        if not sums or not sums.has(of_update):
            return
        buffers = self._by_update if of_update else self._by_gradient
        sums.begin(of_update, self._call.states)
        for number, portion in enumerate(bucket.portions if sums.of(of_update) else ()):
            weights, values = self._summed(bucket, portion, of_update)
            with self._call.slices.opened(buffers, self._call.states, portion.spans, store=False) as opened:
                state = _split(portion, opened)
                for item in sums.of(of_update):
                    terms = self._rule.summand(item.name, weights, values, state, self._call.now)
                    self._require_alike(f"summand('{item.name}')", terms, values)
                    sums.add(item, number, terms)
        sums.finish(of_update)
        sums.settle(of_update, bucket.exchange.outgoing, self._call.states, self._call.now)

    def _summed(self, bucket: Bucket, portion: Portion, of_update: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Return the weights and the values, updates or gradients, of a portion's items for `summand`."""
        if not of_update:
            return self._split_weights(portion), portion.split(portion.views(self._call.gradients))
        parameters = portion.split(portion.views(self._call.parameters))
        return parameters, self._returned(bucket, portion, parameters[0])

    def _returned(self, bucket: Bucket, portion: Portion, like: Tensor) -> list[Tensor]:
        """Return the updates of a portion's items, side by side, in the dtype and on the device of ``like``, a parameter.

        Of one dtype, a kernel of a rule's foreach operators takes many tensors; of two, one. (A wider wire's stays.)
        """
        buffer = bucket.exchange.outgoing
        dtype = torch.promote_types(like.dtype, buffer.dtype)
        updates = torch.split(like.new_empty(sum(portion.sizes), dtype=dtype), portion.sizes)
        torch._foreach_copy_(updates, portion.in_buffer(buffer))
        return list(updates)

    def _require_alike(self, member: str, found: Any, given: Tensors) -> None:
        """Raise TypeError unless a member of the rule returned a tensor for each that it was given, of the same shape.

        In the first step alone: what a rule returns later is as that was, and there may be thousands of tensors.
        """
        if self._call.step > 1:
            return
        if not isinstance(found, Sequence) or [getattr(t, "shape", None) for t in found] != [t.shape for t in given]:
            hint = "" if self._rule.reads_weights else " (weights are empty without reads_weights)"
            raise self._wrong(member, found, f"a tensor like each of the {len(given)} that it is given{hint}")

    def _wrong(self, member: str, found: Any, allowed: str) -> TypeError:
        shapes = [tuple(t.shape) for t in found] if isinstance(found, Sequence) else getattr(found, "shape", found)
        return TypeError(f"{type(self._rule).__name__}.{member}: got {shapes}; allowed: {allowed}")

    def _kept(self, bucket: Bucket) -> list[Tensor]:
        """Return views of the bits of the statistics that are kept with the bucket's fragments."""
        states, pattern = self._call.states, bucket.exchange.pattern
        return [view for name, values in bucket.kept for view in values.of([state[name].view(pattern) for state in states])]


def _split(portion: Portion, state: State) -> State:
    """Cut the state of a portion's spans into that of its items."""
    return {name: portion.split(values) for name, values in state.items()}


def _ignore(orthogonal: Tensor) -> None:
    """Watch nothing."""
