"""What a configuration puts around every rule: an average of the trained weights, for evaluation, and EMA-Nesterov."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ds_optforge.rules.base import Buffer, Rule, State, Tensors
from ds_optforge.rules.flat import side_by_side
from ds_optforge.validation import Section

WEIGHT_AVERAGE = Buffer("weight_average", full_precision=True, wide=True)
UPDATE_AVERAGE = Buffer("update_average", full_precision=True, wide=True)
# By buffer: the key of the configuration, and the numbers beside the buffer in the state. Not names for a rule's own.
KEYS = {WEIGHT_AVERAGE.name: "average", UPDATE_AVERAGE.name: "ema_nesterov"}
SCALARS = {WEIGHT_AVERAGE.name: ("weights_averaged",), UPDATE_AVERAGE.name: ("lookahead", "lookahead_lr")}

_EMA_DECAY = 0.999


class AverageSettings(Section):
    """Settings of the average of the trained weights: those after each step, from step ``start`` on."""

    kind: Literal["ema", "tail"] = Field(
        description="ema: exponential moving average, begun with the first weights; tail: all weights count alike"
    )
    decay: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description=f"ema: decay rate, the share of the earlier weights after each step; null: {_EMA_DECAY}"
    )
    start: Annotated[int, Field(ge=1)] | None = Field(
        None, description="the step whose weights are the first in the average; ema: null is 1; tail: required"
    )

    @model_validator(mode="after")
    def _complete(self) -> "AverageSettings":
        if self.kind == "tail" and self.start is None:
            raise ValueError("start: missing with kind 'tail'; allowed: the step whose weights are the first in the average")
        if self.kind == "tail" and self.decay is not None:
            raise ValueError(f"decay: got {self.decay} with kind 'tail', in which all weights count alike; allowed: kind 'ema'")
        return self

    def share(self, averaged: float) -> float:
        """Return the share of the current weights in an average that holds ``averaged`` earlier ones."""
        if not averaged:
            return 1.0
        if self.kind == "tail":
            return 1.0 / (averaged + 1.0)
        return 1.0 - (_EMA_DECAY if self.decay is None else self.decay)


class EmaNesterovSettings(Section):
    """Settings of EMA-Nesterov (Yau et al. 2026, arXiv 2605.25395).

    The defaults are those that its author published for Muon in modded-nanogpt, where ``stop`` was 2400 of 3150 steps.
    """

    decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.99, description="decay rate of the average of the changes of a weight")
    scale: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.6, description="how many averages to look ahead, times the learning rate over its largest so far"
    )
    start: Annotated[int, Field(ge=0)] = Field(500, description="steps that only fill the average")
    stop: Annotated[int, Field(ge=1)] | None = Field(None, description="steps after which nothing is looked ahead; null: never")

    @model_validator(mode="after")
    def _ordered(self) -> "EmaNesterovSettings":
        if self.stop is not None and self.stop <= self.start:
            raise ValueError(f"stop: got {self.stop} with start {self.start}; allowed: a later step")
        return self

    def lookahead(self, step: int, share: float) -> float:
        """Return how far to look ahead after ``step``, with the learning rate at that ``share`` of its largest."""
        ahead = self.start <= step and (self.stop is None or step < self.stop)
        return self.scale * share if ahead else 0.0


@dataclass(frozen=True, slots=True)
class Lookahead:
    """EMA-Nesterov in one step: with W the weight without look-ahead, from step to step

        W' = rule(W + b m);  m' = decay m + (1 - decay) (W' - W);  and the model gets W' + b' m'.

    W' - W is (W' - (W + b m)) + b m, so that W need not be kept. Where a matrix rule leaves a matrix as it is, for want of a
    gradient, W and m stay.

    Attributes:
        decay: of m.
        before: b, in which the weights stand.
        after: b'.
    """

    decay: float
    before: float
    after: float

    def update(self, averages: Tensors, changes: Tensors, factor: Tensor | None) -> None:
        """Advance m in place.

        Args:
            averages: m, (elements,) each.
            changes: (W + b m) - W', (elements,) each: zeros where a matrix is not active.
            factor: (averages,) 0 or 1: whether they are active; None counts as all 1.
        """
        kept = self.decay + (1.0 - self.decay) * self.before
        if factor is None:
            torch._foreach_mul_(list(averages), kept)
        else:
            for (block, _), column in _columns(averages, averages, (kept - 1.0) * factor + 1.0):
                block.mul_(column)
        torch._foreach_add_(list(averages), list(changes), alpha=self.decay - 1.0)

    def look(self, weights: Tensors, averages: Tensors, factor: Tensor | None) -> None:
        """Move the weights from W', or from W + b m where they are not active, to W' + b' m'; arguments as in `update`."""
        if factor is None:
            torch._foreach_add_(list(weights), list(averages), alpha=self.after)
        else:
            _add_scaled(weights, averages, self.before * factor + (self.after - self.before))

    def take_back(self, weights: Tensors, averages: Tensors, factor: Tensor | None) -> None:
        """Move weights that are not active from W + b m to W."""
        if factor is not None:
            _add_scaled(weights, averages, self.before * factor - self.before)


@dataclass(frozen=True, slots=True)
class AroundStep:
    """What goes on around a rule in one step.

    Attributes:
        buffers: the state that it needs.
        share: of the current weights in their average; 0 before it begins.
        lookahead: of EMA-Nesterov; None without it.
    """

    buffers: tuple[Buffer, ...]
    share: float
    lookahead: Lookahead | None

    def before(self, weights: Tensors) -> list[Tensor]:
        """Return what `advance` needs of the weights, (elements,) each, as they are before the rule's step."""
        return _wide_copies(weights) if self.lookahead else []

    def advance(
        self, weights: Tensors, before: Tensors, state: State, sizes: Sequence[Sequence[int]], active: Tensor | None
    ) -> None:
        """Advance the state, and the weights by the look-ahead, in place, after the rule has stepped the weights.

        Args:
            weights: (elements,) each, in the dtype of the parameters.
            before: what `before` returned.
            state: by buffer, (elements,) each, in that dtype or float32 if it is narrower.
            sizes: elements of the items of each weight.
            active: (items,) 0 or 1: whether the rule has stepped an item; None counts as all 1.
        """
        stepped = _in_dtype_of(state[self.buffers[0].name], weights)
        if not self.lookahead or not weights:
            self._average(stepped, state)
            return
        momenta, items, spare = list(state[UPDATE_AVERAGE.name]), stepped, list(before)
        factor = None if active is None else active.to(spare[0].dtype)
        torch._foreach_sub_(spare, stepped)
        if factor is not None:
            momenta, items, spare = (_items(tensors, sizes) for tensors in (momenta, stepped, spare))
        self.lookahead.update(momenta, spare, factor)
        if self.share and factor is None:
            self._average(stepped, state)
        elif self.share:
            torch._foreach_copy_(spare, items)
            self.lookahead.take_back(spare, momenta, factor)
            self._average(before, state)
        self.lookahead.look(items, momenta, factor)
        if stepped[0] is not weights[0]:
            torch._foreach_copy_(list(weights), stepped)

    def _average(self, weights: Tensors, state: State) -> None:
        if self.share:
            torch._foreach_lerp_(list(state[WEIGHT_AVERAGE.name]), list(weights), self.share)


@dataclass(frozen=True, slots=True)
class Around:
    """What a configuration puts around every rule. All of it is elementwise, and its state is full-precision buffers.

    Attributes:
        average: of the trained weights; None for none.
        nesterov: EMA-Nesterov; None for none.
    """

    average: AverageSettings | None = None
    nesterov: EmaNesterovSettings | None = None

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """The state beside that of the rule."""
        return (WEIGHT_AVERAGE,) * bool(self.average) + (UPDATE_AVERAGE,) * bool(self.nesterov)

    def begin(self, scalars: MutableMapping[str, float], step: int, lr: float) -> AroundStep | None:
        """Count one step; None if nothing is to be done around the rule in it.

        Args:
            scalars: numbers that are saved with the state, those of the rule among them; to be changed in place.
            step: number of the step, counted from 1.
            lr: learning rate of the group.
        """
        share = 0.0
        if self.average and step >= (self.average.start or 1):
            averaged = scalars.get("weights_averaged", 0.0)
            scalars["weights_averaged"] = averaged + 1.0
            share = self.average.share(averaged)
        lookahead = None
        if self.nesterov:
            before, largest = scalars.get("lookahead", 0.0), max(lr, scalars.get("lookahead_lr", 0.0))
            after = self.nesterov.lookahead(step, lr / largest if largest else 0.0)
            scalars["lookahead"], scalars["lookahead_lr"] = after, largest
            lookahead = Lookahead(self.nesterov.decay, before, after)
        return AroundStep(self.buffers, share, lookahead) if share or lookahead else None


NOTHING = Around()


def evaluated(rule: Rule | type[Rule], weight: Tensor, buffers: Mapping[str, Tensor], scalars: Mapping[str, float]) -> Tensor:
    """Return the weight to evaluate and export: the average, once it has begun; else the weight without look-ahead.

    Args:
        rule: that stepped the weight.
        weight: the trained weight, of any shape.
        buffers: by name, those of the rule's ``averages`` and of what is around it; of the same shape.
        scalars: numbers that are saved with the state.

    Returns:
        A new tensor of the shape and dtype of ``weight``.
    """
    if buffers.keys().isdisjoint(SCALARS):
        return rule.averaged(weight, buffers, scalars)
    found = torch.empty_like(weight)
    if WEIGHT_AVERAGE.name in buffers and scalars.get("weights_averaged"):
        return found.copy_(buffers[WEIGHT_AVERAGE.name])
    if UPDATE_AVERAGE.name in buffers and scalars.get("lookahead"):
        return found.copy_(torch.sub(weight, buffers[UPDATE_AVERAGE.name], alpha=scalars["lookahead"]))
    return found.copy_(weight)


def _in_dtype_of(like: Tensors, values: Tensors) -> list[Tensor]:
    """Return ``values``, (elements,) each, in the dtype of ``like``: themselves, or copies."""
    return list(values) if not values or values[0].dtype == like[0].dtype else _wide_copies(values)


def _wide_copies(values: Tensors) -> list[Tensor]:
    """Return copies of ``values``, (elements,) each, side by side, in float32 where their dtype is narrower."""
    if not values:
        return []
    sizes = [value.numel() for value in values]
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    copies = list(torch.split(values[0].new_empty(sum(sizes), dtype=dtype), sizes))
    torch._foreach_copy_(copies, list(values))
    return copies


def _items(tensors: Tensors, sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    return [item for tensor, each in zip(tensors, sizes, strict=True) for item in torch.split(tensor, list(each))]


def _columns(first: Tensors, second: Tensors, values: Tensor) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Return blocks of both (`side_by_side`), each with its part of ``values``, (tensors,), as a column."""
    blocks = side_by_side(first, second)
    return list(zip(blocks, torch.split(values.view(-1, 1), [len(block) for block, _ in blocks]), strict=True))


def _add_scaled(weights: Tensors, directions: Tensors, rates: Tensor) -> None:
    """Add to each weight its direction times its rate, of ``rates`` (weights,), in place."""
    for (block, steps), column in _columns(weights, directions, rates):
        block.addcmul_(steps, column)
