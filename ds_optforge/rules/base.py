"""What an update rule is: state declared as data, and tensor math on lists of tensors.

A rule never sees DeepSpeed, a process group or a partition. What a schedule may change (lr, weight_decay, momentum, betas)
it reads from the group's dict at every step; everything else it is constructed with. `ds_optforge.rules.registry` refuses
a rule that lacks a member.

Tensors of a rule's elementwise members are flat, (elements,): contiguous parts of parameters, cut anywhere, in the dtype
in which the parameters are stepped (float32 under DeepSpeed, the model's own in plain PyTorch).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = Sequence[Tensor]
State: TypeAlias = Mapping[str, Tensors]  # by buffer: a tensor for each of the parameters, in shape and dtype like it
Sums: TypeAlias = Mapping[str, Tensors]  # by sum: a float32 tensor for each of the parameters, which broadcasts with it
Hyperparameters: TypeAlias = Mapping[str, Any]
Per: TypeAlias = Literal["row", "matrix"]


@dataclass(frozen=True, slots=True)
class Buffer:
    """One elementwise state tensor of a rule.

    Attributes:
        name: its key in the optimizer's state.
        signed: whether it takes negative values (8-bit state has a map for either).
        momentum: it is the moving average of the gradient that telemetry compares with the gradient.
        copies_weight: it starts as a copy of the weight; other buffers start as zeros.
        full_precision: it keeps the dtype of the parameters whatever the state format. For what lies near a weight: a step
            is far smaller than the spacing of bfloat16 or 8-bit numbers around it.
        of_update: a matrix rule advances it by the update, in `MatrixRule.apply`; others by the gradient, in `direction`.
    """

    name: str
    signed: bool = True
    momentum: bool = False
    copies_weight: bool = False
    full_precision: bool = False
    of_update: bool = False


@dataclass(frozen=True, slots=True)
class Statistic:
    """A float32 value that is kept for each output row of a matrix, or for each matrix. It starts as 0.

    It is kept where the row's, or the matrix's, first element lies, travels with it, and is advanced by `MatrixRule.update`.
    """

    name: str
    per: Per = "row"


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum over each whole matrix, or over each of its output rows, of what `MatrixRule.summand` makes of its elements.

    Added up in float64 over the fragments of all ranks, and rounded to float32: it does not depend on the layout.

    Attributes:
        name: its key in the sums that the rule's members get.
        per: what is summed over.
        of_update: of the updates, and given to `apply` alone. Else of the gradients, and given to `direction`, `update` and
            `apply`.
    """

    name: str
    per: Per = "matrix"
    of_update: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Whole matrices of one shape, for `MatrixRule.update`.

    Attributes:
        matrices: (n, rows, cols) directions, in the wire's dtype; may be overwritten.
        active: (n,) 1 for a matrix with any gradient that is not zero, else 0; in the wire's dtype.
        transposed: the weights are stored (in, out), so that their output rows are the columns.
        statistics: by name, (n, outputs) or (n, 1) in float32, to be advanced in place; negative where the rank that keeps
            a value is another one (``sharding.mode: shard_local``).
        sums: by name, (n, outputs) or (n, 1) in float32.
        watch: to be called with the (n, rows, cols) orthogonal factors, before anything is made of them; for telemetry.
    """

    matrices: Tensor
    active: Tensor
    transposed: bool = False
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    watch: Callable[[Tensor], None] = field(default=lambda orthogonal: None)


class Rule(ABC):
    """What elementwise and matrix rules have in common.

    Attributes:
        buffers: the elementwise state.
        scheduled: names of the settings that live in the parameter group, where a schedule may change them.
        averages: names of the buffers from which `averaged` makes the weights to evaluate; none where the weights are
            evaluated as they are.
        replaces_schedule: a falling learning rate is an error, because the rule does what it is for by itself.
    """

    __slots__ = ()

    buffers: ClassVar[tuple[Buffer, ...]]
    scheduled: ClassVar[tuple[str, ...]]
    averages: ClassVar[tuple[str, ...]] = ()
    replaces_schedule: ClassVar[bool] = False

    def begin(self, group: Hyperparameters, scalars: MutableMapping[str, float], step: int) -> Hyperparameters:
        """The hyperparameters of step ``step`` (from 1). ``scalars``: the rule's own numbers, saved with its state."""
        return group

    @staticmethod
    def averaged(weight: Tensor, buffers: Mapping[str, Tensor], scalars: Mapping[str, float]) -> Tensor:
        """The weight to evaluate and export, as a new tensor like ``weight``.

        Args:
            weight: (elements,) as trained.
            buffers: those of ``averages``, by name, likewise.
            scalars: what `begin` kept.
        """
        raise NotImplementedError


class ElementwiseRule(Rule):
    """A rule whose update of an element depends on that element alone."""

    __slots__ = ()

    @property
    def in_place(self) -> bool:
        """Whether `step` makes no temporary tensors of the parameters' size, and so may get all of them in one call."""
        return False

    @abstractmethod
    def step(self, parameters: Tensors, gradients: Tensors, state: State, now: Hyperparameters) -> None:
        """Update ``parameters`` and ``state`` in place.

        Args:
            parameters, gradients, state: (elements,) each. ``gradients`` stay unchanged.
            now: what `begin` returned.
        """


class MatrixRule(Rule):
    """A rule that needs whole matrices: all members are elementwise but `update`, which sees each matrix.

    Attributes:
        statistics: float32 values that are kept per output row or per matrix.
        sums: sums over whole rows or matrices. Where there are any, no tensor of an elementwise member spans two matrices.
        reads_weights: `direction`, and `summand` of the gradient, get the weights.
    """

    __slots__ = ()

    statistics: ClassVar[tuple[Statistic, ...]] = ()
    sums: ClassVar[tuple[Sum, ...]] = ()
    reads_weights: ClassVar[bool] = False

    @abstractmethod
    def cost(self, rows: int, cols: int) -> int:
        """FLOPs of `update` on one (rows, cols) matrix."""

    @abstractmethod
    def direction(self, gradients: Tensors, weights: Tensors, state: State, sums: Sums, now: Hyperparameters) -> Tensors:
        """Advance ``state`` in place and return what `update` is to get, like ``gradients``.

        Args:
            gradients: (elements,) each; they stay unchanged.
            weights: likewise, if ``reads_weights``; else empty.
            state: the buffers that are not of the update.
            sums: those of the gradient: (elements,) each per row, (1,) per matrix.
            now: what `begin` returned.
        """

    @abstractmethod
    def update(self, batch: Batch, now: Hyperparameters) -> Tensor:
        """(n, rows, cols) updates, in the wire's dtype or wider; zeros where ``batch.active`` is 0.

        Statistics of a matrix that is not active must stay as they are.
        """

    @abstractmethod
    def rms(self, rows: int, cols: int, transposed: bool) -> float:
        """The root mean square of the elements of `update` for one exactly orthogonal (rows, cols) matrix."""

    @abstractmethod
    def apply(
        self, parameters: Tensors, updates: Tensors, active: Tensor, state: State, sums: Sums, now: Hyperparameters
    ) -> None:
        """Step ``parameters``, and ``state``, in place.

        Args:
            parameters: (elements,) each; each is a part of one matrix.
            updates: likewise, in the wire's dtype.
            active: (parameters,) 0 or 1: 0 leaves a parameter, and its state, as it is.
            state: the buffers of the update.
            sums: all of the rule's: (elements,) each per row, (1,) per matrix.
            now: what `begin` returned.
        """

    def summand(self, name: str, weights: Tensors, values: Tensors, state: State, now: Hyperparameters) -> Tensors:
        """What the sum ``name`` adds up, an element for each of ``values``. Changes nothing.

        Args:
            weights: (elements,) each; empty for a sum of the gradient, unless ``reads_weights``.
            values: the gradients, or the updates in the wire's dtype.
            state: as `direction`, or `apply`, will get it: not yet advanced.
            now: what `begin` returned.
        """
        raise NotImplementedError


def buffers_of(rule: Rule, of_update: bool) -> tuple[Buffer, ...]:
    """The buffers that are advanced by the update, or the others."""
    return tuple(buffer for buffer in rule.buffers if buffer.of_update == of_update)


def statistics_of(rule: Rule) -> tuple[Statistic, ...]:
    """The statistics of a rule; an elementwise one has none."""
    return rule.statistics if isinstance(rule, MatrixRule) else ()


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
