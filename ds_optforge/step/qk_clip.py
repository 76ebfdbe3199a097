"""QK-clip: after a step, the rows of W_q and W_k of heads whose attention logits have grown too large are scaled down.

Of each key head, S is the largest logit that the model's forward passes have shown since the last step, on any rank, and
gamma = min(1, tau / S). The rows of its queries and keys are multiplied by sqrt(gamma) each, biases too, so that its logits
are multiplied by gamma (Kimi K2, arXiv 2507.20534, section 2.1, algorithm 1). In latent attention the rotary part of the key
belongs to all heads and stays as it is; the rotary part of a query is multiplied by gamma. Where several query heads share a
key head, S is their largest logit, as in Megatron-LM; the paper has no such heads. Momentum and other state stay as they are.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_optforge.config.sections import QKClipSettings
from ds_optforge.errors import ConfigError
from ds_optforge.routing.attention import Attention, Projection, attention_of
from ds_optforge.routing.tags import models_of, parameter_name
from ds_optforge.rules.around import UPDATE_AVERAGE
from ds_optforge.rules.base import statistics_of
from ds_optforge.step.groups import Groups
from ds_optforge.step.logits import QUERIES, LogitWatch
from ds_optforge.step.slices import Members, Slices
from ds_optforge.zero.agreement import max_over_all_ranks
from ds_optforge.zero.placement import Held
from ds_optforge.zero.shards import full_shape, shard_of

logger = logging.getLogger("ds_optforge")


@dataclass(frozen=True, slots=True)
class _Clipped:
    """A parameter whose outputs are rescaled.

    Attributes:
        factors: (outputs,) of each output, its place in the vector of all factors.
        width: elements of an output.
        down: whether these follow each other: not where the weight is stored (in, out), nor of a bias.
    """

    factors: tuple[int, ...]
    width: int
    down: bool


@dataclass(frozen=True, slots=True)
class _Range:
    """Elements of a slice, and the factors that they are multiplied by.

    Attributes:
        tensor, start, shape: place of the elements in the tensors, and the shape of their view.
        first, count: the factors, in the order of the slice's.
        down: whether a factor is that of a row of the view rather than of a column.
    """

    tensor: int
    start: int
    shape: tuple[int, int]
    first: int
    count: int
    down: bool

    def view(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the view of these elements in flat ``tensors``."""
        return tensors[self.tensor].narrow(0, self.start, self.shape[0] * self.shape[1]).view(self.shape)

    def of(self, factors: Tensor) -> Tensor:
        """Return the factors, to be multiplied by the `view`."""
        found = factors.narrow(0, self.first, self.count)
        return found[:, None] if self.down else found[None, :]


@dataclass(frozen=True, slots=True, eq=False)
class _Bound:
    """The elements of one call's tensors that are rescaled.

    Attributes:
        slices: of the call.
        factors: (outputs of all parameters,) places in the vector of all factors, on the tensors' device.
        ranges: of the tensors.
    """

    slices: Slices
    factors: Tensor
    ranges: tuple[_Range, ...]


class QKClip:
    """Bound on the attention logits of the model whose parameters are in ``groups``.

    DeepSpeed steps one group or sub-group in a call, so that a step has several calls of `clip`; the first takes the logits.

    Args:
        settings: of the optimizer.
        groups: of the optimizer.
        steps_taken: tells the steps that the optimizer has taken.

    Raises:
        ConfigError: attention that cannot be bounded exactly, or none; see `attention_of`.
    """

    def __init__(self, settings: QKClipSettings, groups: Groups, steps_taken: Callable[[], int]) -> None:
        self._tau, self._every = settings.tau, settings.every
        parameters = [parameter for members in groups.members.values() for parameter in members.parameters]
        if groups.stage is not None:
            raise ConfigError('qk_clip: got a PipelineModule of several stages; allowed: one stage, or no "qk_clip"')
        self._attentions = _found(parameters)
        names = {parameter_name(parameter) for parameter in parameters}
        self._clipped = dict(self._outputs(names))
        for members in groups.members.values():
            clipped = {route.name for route in members.routes} & self._clipped.keys()
            if clipped:
                _refuse_copies(members, min(clipped))
        self._heads = sum(attention.key_heads for attention in self._attentions.values())
        self._watch = LogitWatch(self._attentions, lambda: (steps_taken() + 1) % self._every == 0)
        self._bound: dict[int, _Bound] = {}
        self._done: list[Slices] = []  # what this step has clipped
        self._largest: tuple[int, Tensor] | None = None
        self._powers: Tensor | None = None
        logger.info(
            "qk_clip: bounds the logits of %d attention modules by %g, every %d step(s); of a sequence of more than %d tokens "
            "it looks at as many queries",
            len(self._attentions),
            self._tau,
            self._every,
            QUERIES,
        )

    def clip(self, stepped: Sequence[Slices], step: int) -> None:
        """Rescale what these tensors hold of queries' and keys' weights. Collective over all ranks in the first call of a step.

        Args:
            stepped: the tensors of this call, which have been stepped.
            step: number of the step, from 1.
        """
        if any(slices is done for slices in stepped for done in self._done):
            self._done, self._powers = [], None
        if not self._done:
            if step % self._every == 0:
                self._begin(step, self._watch.take(stepped[0].binding.device))
            else:
                self._watch.drop()
        self._done += stepped
        if self._powers is not None:
            for slices in stepped:
                self._rescale(slices, self._powers)

    @property
    def logits(self) -> dict[str, Any]:
        """{"step": n, "max": {module: [largest logit of each key head]}} of the last step that looked at them; empty before."""
        if self._largest is None:
            return {}
        step, values = self._largest
        of_modules = torch.split(values, [attention.key_heads for attention in self._attentions.values()])
        return {"step": step, "max": {path: found.tolist() for path, found in zip(self._attentions, of_modules, strict=True)}}

    def _begin(self, step: int, largest: Tensor) -> None:
        """Agree on the largest logits, and compute all factors: 1, then sqrt(gamma) of each head, then gamma of each head."""
        max_over_all_ranks(largest)
        self._largest = step, largest
        gamma = self._tau / largest.clamp(min=self._tau)
        self._powers = torch.cat([torch.ones_like(gamma[:1]), gamma.sqrt(), gamma])

    def _rescale(self, slices: Slices, powers: Tensor) -> None:
        bound = self._bound.get(id(slices))
        if bound is None:
            bound = self._bound[id(slices)] = self._bind(slices)
        if not bound.ranges:
            return
        factors = powers.to(bound.factors.device)[bound.factors]
        flat = [tensor.detach().reshape(-1) for tensor in slices.tensors]
        torch._foreach_mul_([place.view(flat) for place in bound.ranges], [place.of(factors) for place in bound.ranges])
        for tensor, values in zip(slices.tensors, flat, strict=True):
            if not tensor.is_contiguous():  # the flat tensor is a copy
                tensor.copy_(values.view(tensor.shape))

    def _outputs(self, names: set[str]) -> Iterator[tuple[str, _Clipped]]:
        """Yield each parameter that is rescaled, by name, with the factor of each of its outputs.

        Raises:
            ConfigError: one that tensor parallelism has cut, or that the optimizer does not step.
        """
        before = 1
        for path, attention in self._attentions.items():
            for projection in attention.projections:
                factors = self._factors(projection, before)
                for parameter in projection.parameters:
                    name = parameter_name(parameter)
                    _refuse_cut(path, name, parameter, name in names)
                    shape = full_shape(parameter)
                    down = len(shape) > 1 and not projection.transposed
                    yield name, _Clipped(factors, shape.numel() // len(factors), down)
            before += attention.key_heads

    def _factors(self, projection: Projection, before: int) -> tuple[int, ...]:
        heads = sum(attention.key_heads for attention in self._attentions.values())
        found = [0] * projection.outputs
        for rows in projection.rows:
            place = before + rows.head + (heads if rows.power == 1.0 else 0)
            found[rows.start : rows.start + rows.numel] = [place] * rows.numel
        return tuple(found)

    def _bind(self, slices: Slices) -> _Bound:
        """Find what these tensors hold of the parameters that are rescaled."""
        places: list[int] = []
        ranges: list[_Range] = []
        for index, name in enumerate(slices.placement.layout.names):
            held = slices.placement.held(index)
            if held is None or name not in self._clipped:
                continue
            clipped = self._clipped[name]
            ranges += _blocks(held, clipped, len(places))
            places += clipped.factors
        return _Bound(slices, torch.tensor(places, dtype=torch.long, device=slices.tensors[0].device), tuple(ranges))


def _found(parameters: Sequence[Tensor]) -> dict[str, Attention]:
    """Find the attention of the models that have these parameters, by the qualified name of its module."""
    models = models_of(parameters)
    if not models:
        raise ConfigError(
            "qk_clip: got parameters of no registered model; allowed: ds_optforge.register(model) before the optimizer is "
            'built, or no "qk_clip"'
        )
    return attention_of(models)


def _refuse_copies(members: Members, name: str) -> None:
    """Refuse what would keep, and come back to, a weight as it was before the clip."""
    rule = members.settings.rule
    if any(buffer.copies_weight for buffer in members.rule.buffers):
        kept = f"got '{rule}' for {name}, which keeps a copy of the weight that would stay as it was"
    elif statistics_of(members.rule, "direction", "apply"):
        kept = f"got '{rule}' for {name}, which keeps norms of the weight that would stay as they were"
    elif members.around.buffers:
        key = "ema_nesterov" if UPDATE_AVERAGE in members.around.buffers else "average"
        raise ConfigError(f"qk_clip: got '{key}' too, which follows the weights before the clip; allowed: one of the two")
    else:
        return
    another = f'another rule for it ("overrides": [{{"match": "{name}", "name": "adamw"}}]), or no "qk_clip"'
    raise ConfigError(f"qk_clip: {kept}; allowed: {another}")


def _refuse_cut(path: str, name: str, parameter: Tensor, stepped: bool) -> None:
    if shard_of(parameter) is not None:
        raise ConfigError(f'qk_clip: {name} is cut by tensor parallelism; allowed: whole q and k projections, or no "qk_clip"')
    if not stepped:
        raise ConfigError(
            f"qk_clip: {name}, of the trainable attention {path}, is not among the optimizer's parameters; allowed: all of its "
            "q and k projections, or frozen ones"
        )


def _blocks(held: Held, clipped: _Clipped, before: int) -> Iterator[_Range]:
    """Cut the elements that a tensor holds of a parameter into blocks that are multiplied by whole rows or columns of factors.

    Args:
        held: elements of the flattened parameter.
        clipped: the parameter.
        before: number of factors before its own.
    """
    outputs, width = len(clipped.factors), clipped.width
    period = width if clipped.down else outputs
    low, high = held.within.start, held.within.end
    if clipped.down:  # values, say, lie before or behind
        scaled = [output for output, place in enumerate(clipped.factors) if place]
        low, high = max(low, scaled[0] * width), min(high, (scaled[-1] + 1) * width)
    while low < high:
        row, column = divmod(low, period)
        rows = 1 if column or high - low < period else (high - low) // period
        cols = min(period - column, high - low) if rows == 1 else period
        first, count = (row, rows) if clipped.down else (column, cols)
        start = held.tensor_start + low - held.within.start
        yield _Range(held.tensor, start, (rows, cols), before + first, count, clipped.down)
        low += rows * cols
