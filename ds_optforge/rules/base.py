"""What an update rule is: hyperparameters, buffers declared as data, and tensor math on lists of tensors.

A rule never sees DeepSpeed, a process group or a partition. What a schedule may change (lr, weight_decay, momentum, betas)
it reads from the group's dict at every step; everything else it is constructed with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

Tensors: TypeAlias = Sequence[Tensor]
Hyperparameters: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Buffer:
    """One state tensor of a rule, shaped like the slice that it belongs to."""

    name: str


class Rule(Protocol):
    """``scheduled`` names the settings that live in the group, where a schedule may change them."""

    buffers: ClassVar[tuple[Buffer, ...]]
    scheduled: ClassVar[tuple[str, ...]]


@runtime_checkable
class ElementwiseRule(Rule, Protocol):
    """A rule whose update of an element depends on that element alone."""

    def step(
        self,
        parameters: Tensors,
        gradients: Tensors,
        state: Mapping[str, Tensors],
        steps: Tensors,
        group: Hyperparameters,
    ) -> None:
        """Update ``parameters`` and ``state`` in place; ``steps`` are 0-d counters that this call increments."""


@runtime_checkable
class MatrixRule(Rule, Protocol):
    """A rule that needs whole matrices: ``direction`` and ``apply`` are elementwise, ``update`` sees each matrix."""

    def cost(self, rows: int, cols: int) -> int:
        """FLOPs of ``update`` on one (rows, cols) matrix."""

    def direction(self, gradients: Tensors, state: Mapping[str, Tensors], group: Hyperparameters) -> Tensors:
        """Advance ``state`` in place and return what is to be orthogonalized. ``gradients`` stay unchanged."""

    def update(self, matrices: Tensor, active: Tensor) -> Tensor:
        """(n, rows, cols) directions -> (n, rows, cols) updates; zero where ``active`` (n,) is 0."""

    def apply(self, parameters: Tensors, updates: Tensors, active: Tensor, group: Hyperparameters) -> None:
        """Step ``parameters`` in place. ``active`` (one 0 or 1 each): 0 leaves a parameter as it is."""
