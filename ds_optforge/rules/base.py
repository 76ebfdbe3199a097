"""What an update rule is: hyperparameters, buffers declared as data, and tensor math on lists of tensors.

A rule never sees DeepSpeed, a process group or a partition. What a schedule may change (lr, weight_decay, momentum, betas)
it reads from the group's dict at every step; everything else it is constructed with.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

Tensors: TypeAlias = Sequence[Tensor]
State: TypeAlias = Mapping[str, Tensors]  # by buffer name; each as the parameters, in float32
Hyperparameters: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Buffer:
    """One elementwise state tensor of a rule.

    Attributes:
        name: its key in the optimizer's state.
        signed: whether it takes negative values (8-bit state has a map for either).
        copies_weight: it starts as a copy of the weight, and keeps float32 whatever the state format: a step is far
            smaller than the spacing of bfloat16 or 8-bit numbers around a weight.
    """

    name: str
    signed: bool = True
    copies_weight: bool = False


class Rule(Protocol):
    """``scheduled`` names the settings that live in the group, where a schedule may change them."""

    buffers: ClassVar[tuple[Buffer, ...]]
    scheduled: ClassVar[tuple[str, ...]]

    def begin(self, group: Hyperparameters, scalars: MutableMapping[str, float], step: int) -> Hyperparameters:
        """The hyperparameters of step ``step`` (from 1). ``scalars``: the rule's own numbers, saved with its state."""


@runtime_checkable
class ElementwiseRule(Rule, Protocol):
    """A rule whose update of an element depends on that element alone.

    ``in_place``: `step` makes no temporary tensors of the parameters' size.
    """

    @property
    def in_place(self) -> bool: ...

    def step(self, parameters: Tensors, gradients: Tensors, state: State, now: Hyperparameters) -> None:
        """Update ``parameters`` and ``state`` in place, given what `begin` returned. ``gradients`` stay unchanged."""


@runtime_checkable
class MatrixRule(Rule, Protocol):
    """A rule that needs whole matrices: ``direction`` and ``apply`` are elementwise, ``update`` sees each matrix.

    ``row_buffer`` names a float32 statistic per output row of each matrix; "" where the rule has none.
    """

    row_buffer: ClassVar[str]

    def cost(self, rows: int, cols: int) -> int:
        """FLOPs of ``update`` on one (rows, cols) matrix."""

    def direction(self, gradients: Tensors, state: State, now: Hyperparameters) -> Tensors:
        """Advance ``state`` in place and return what is to be orthogonalized. ``gradients`` stay unchanged."""

    def update(
        self, matrices: Tensor, active: Tensor, rows: Tensor, transposed: bool, watch: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """(n, rows, cols) directions, which may be overwritten -> (n, rows, cols) updates; zero where ``active`` (n,) is 0.

        ``rows`` (n, outputs) are the row statistics, advanced in place (empty without a row buffer); a negative one is kept
        by another rank. ``transposed`` tells that the weight is stored (in, out), so that its outputs are its columns.
        ``watch`` is called with the (n, rows, cols) orthogonal factors, before anything is made of them.
        """

    def rms(self, rows: int, cols: int, transposed: bool) -> float:
        """The root mean square of the elements of `update` for one exactly orthogonal (rows, cols) matrix."""

    def apply(self, parameters: Tensors, updates: Tensors, active: Tensor, now: Hyperparameters) -> None:
        """Step ``parameters`` in place. ``active`` (one 0 or 1 each): 0 leaves a parameter as it is."""


def row_buffer_of(rule: Rule) -> str:
    """The name of its row statistics; "" where it has none."""
    return rule.row_buffer if isinstance(rule, MatrixRule) else ""


def decay(parameters: Tensors, updates: Tensors, rate: float, cautious: bool, active: Tensor | None = None) -> None:
    """Decoupled weight decay, before the update: W <- (1 - rate) W.

    ``cautious`` (as in NorMuon's and MuonAdamW's recipes): only where update * W >= 0, that is where decay and update agree.
    ``active`` (one 0 or 1 each): 0 leaves a parameter as it is.
    """
    if rate == 0:
        return
    if not cautious:
        # Not numbers, which foreach rounds to the parameters' dtype first; and where they come from the device, of one
        # dimension, so that they are not either.
        if active is None:
            torch._foreach_mul_(list(parameters), torch.tensor(1.0 - rate, dtype=torch.float64))
        else:
            wide = torch.promote_types(parameters[0].dtype, torch.float32)
            torch._foreach_mul_(list(parameters), list((1.0 - rate * active.to(wide)).view(-1, 1).unbind()))
        return
    agrees = torch._foreach_mul(list(parameters), list(updates))
    masked = [parameter * (product >= 0) for parameter, product in zip(parameters, agrees, strict=True)]
    if active is not None:
        torch._foreach_mul_(masked, list(active.to(masked[0].dtype).unbind()))
    torch._foreach_add_(list(parameters), masked, alpha=-rate)
