"""What a configuration puts around every rule: an average of the trained weights, for evaluation."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ds_optforge.rules.base import Buffer, Rule, State, Tensors
from ds_optforge.validation import Section

WEIGHT_AVERAGE = Buffer("weight_average", full_precision=True, wide=True)
# By buffer, the numbers beside it in the state. Not names for a rule's own.
SCALARS = {WEIGHT_AVERAGE.name: ("weights_averaged",)}

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


@dataclass(frozen=True, slots=True)
class AroundStep:
    """What goes on around a rule in one step.

    Attributes:
        buffers: the state that it needs.
        share: of the current weights in their average.
    """

    buffers: tuple[Buffer, ...]
    share: float

    def advance(self, weights: Tensors, state: State) -> None:
        """Advance the state in place after the rule has stepped the weights.

        Args:
            weights: (elements,) each, in the dtype of the parameters.
            state: by buffer, (elements,) each, in that dtype or float32 if it is narrower.
        """
        averages = list(state[WEIGHT_AVERAGE.name])
        torch._foreach_lerp_(averages, _in_dtype_of(averages, weights), self.share)


@dataclass(frozen=True, slots=True)
class Around:
    """What a configuration puts around every rule. All of it is elementwise, and its state is full-precision buffers.

    Attributes:
        average: of the trained weights; None for none.
    """

    average: AverageSettings | None = None

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """The state beside that of the rule."""
        return (WEIGHT_AVERAGE,) if self.average else ()

    def begin(self, scalars: MutableMapping[str, float], step: int) -> AroundStep | None:
        """Count one step; None if nothing is to be done around the rule in it.

        Args:
            scalars: numbers that are saved with the state, those of the rule among them; to be changed in place.
            step: number of the step, counted from 1.
        """
        if not self.average or step < (self.average.start or 1):
            return None
        averaged = scalars.get("weights_averaged", 0.0)
        scalars["weights_averaged"] = averaged + 1.0
        return AroundStep(self.buffers, self.average.share(averaged))


NOTHING = Around()


def evaluated(rule: Rule | type[Rule], weight: Tensor, buffers: Mapping[str, Tensor], scalars: Mapping[str, float]) -> Tensor:
    """Return the weight to evaluate and export: the average, once it has begun.

    Args:
        rule: that stepped the weight.
        weight: the trained weight, of any shape.
        buffers: by name, those of the rule's ``averages`` and of what is around it; of the same shape.
        scalars: numbers that are saved with the state.

    Returns:
        A new tensor of the shape and dtype of ``weight``.
    """
    if WEIGHT_AVERAGE.name not in buffers:
        return rule.averaged(weight, buffers, scalars)
    begun = bool(scalars.get("weights_averaged"))
    return torch.empty_like(weight).copy_(buffers[WEIGHT_AVERAGE.name] if begun else weight)


def _in_dtype_of(like: Tensors, values: Tensors) -> list[Tensor]:
    """Return ``values``, (elements,) each, in the dtype of ``like``: themselves, or copies side by side."""
    if not values or values[0].dtype == like[0].dtype:
        return list(values)
    sizes = [value.numel() for value in values]
    wide = list(torch.split(like[0].new_empty(sum(sizes)), sizes))
    torch._foreach_copy_(wide, list(values))
    return wide
