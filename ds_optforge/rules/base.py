"""The base classes of update rules: state declared as data, and tensor math on lists of tensors.

A rule never sees DeepSpeed, a process group or a partition. It reads what a schedule may change (lr, weight_decay,
momentum, betas) from the group's dict at every step, and is constructed with everything else.
`ds_optforge.rules.registry` refuses a rule that lacks a member.

The tensors that a rule's elementwise members get are flat, (elements,): contiguous ranges of parameters, cut anywhere, in
the dtype in which the parameters are stepped (float32 under DeepSpeed, the model's own in plain PyTorch).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor

from ds_optforge.orthogonalize import Healthy, Team
from ds_optforge.rules.factor import Factor

Tensors: TypeAlias = Sequence[Tensor]
State: TypeAlias = Mapping[str, Tensors]  # by buffer: one tensor per parameter, of its shape and dtype
Sums: TypeAlias = Mapping[str, Tensors]  # by sum: one float32 tensor per parameter, which broadcasts with it
Hyperparameters: TypeAlias = Mapping[str, Any]
Per: TypeAlias = Literal["row", "matrix"]
Given: TypeAlias = Literal["update", "direction", "apply"]
Values: TypeAlias = Mapping[str, Tensor]  # by name: one value for each row, or for each matrix, of a bucket


@dataclass(frozen=True, slots=True)
class Buffer:
    """Declaration of an elementwise state buffer.

    Attributes:
        name: key of the buffer in the optimizer's state.
        signed: whether it takes negative values (8-bit state has one map for signed values and one for unsigned ones).
        momentum: whether it is the moving average of the gradient that telemetry compares with the gradient.
        copies_weight: whether it starts as a copy of the weight; other buffers start as zeros.
        full_precision: whether it keeps the dtype of the parameters whatever the state format. Meant for values near a
            weight: a step is far smaller than the spacing of bfloat16 or 8-bit numbers around them.
        wide: whether it is in float32 where the parameters' dtype is narrower (in plain PyTorch); ``full_precision`` too.
        of_update: whether a matrix rule advances it by the update, in `MatrixRule.apply`; other buffers are advanced by
            the gradient, in `MatrixRule.direction`.
        gradient_average: whether it is the exponential moving average m <- lerp(m, g, 1 - decay) of the gradient g, from zero
            on. A run that resumes from another rule's checkpoint with this rule begins it with that rule's average, if all
            its buffers that the gradient advances are such averages; the rest of its state begins as zeros, and the step
            counts on.
    """

    name: str
    signed: bool = True
    momentum: bool = False
    copies_weight: bool = False
    full_precision: bool = False
    wide: bool = False
    of_update: bool = False
    gradient_average: bool = False


@dataclass(frozen=True, slots=True)
class Statistic:
    """Declaration of a float32 value that is kept per output row of a matrix, or per matrix. It starts as 0.

    The value is kept on the rank that holds the first element of the row, or of the matrix.

    Attributes:
        name: key of the statistic in the optimizer's state and in `Batch.statistics`.
        per: "row" for one value per output row, "matrix" for one value per matrix.
        given: to whom. "update": it travels with the first element to the owner, where `MatrixRule.update` advances it.
            "direction" and "apply": to all ranks that hold elements, together with the sums of the gradients or of the
            updates, for `MatrixRule.settle`, which advances it.
    """

    name: str
    per: Per = "row"
    given: Given = "update"


@dataclass(frozen=True, slots=True)
class Sum:
    """Declaration of a sum over each whole matrix, or over each of its output rows, of the terms of `MatrixRule.summand`.

    The terms are added up in float64 over the fragments of all ranks, and the result is rounded to float32: it does not
    depend on the layout.

    Attributes:
        name: key of the sum in the ``sums`` that the rule's members get.
        per: "row" for one sum per output row, "matrix" for one sum per matrix.
        of_update: whether the terms come from the updates; only `MatrixRule.apply` gets such a sum. Other sums have terms
            from the gradients, and `direction`, `update` and `apply` get them.
        mean: whether the sum is divided by the number of its terms.
    """

    name: str
    per: Per = "matrix"
    of_update: bool = False
    mean: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """Declaration that a step updates some output rows of each matrix alone: those in which a sum is largest.

    Of rows with equal sums the first ones are chosen. What `direction` gets as that sum is 1 for a chosen row, 0 for another.
    `update` gets the chosen rows alone; to `apply`, which does not get the sum, the update of another row is zero.

    Attributes:
        by: name of a sum per row, of the gradient.
        share: of the output rows that are chosen, above 0 and below 1.
    """

    by: str
    share: float

    def count(self, outputs: int) -> int:
        """Return how many of ``outputs`` rows are chosen: ``share`` of them, taken as a decimal fraction, rounded up."""
        return math.ceil(Fraction(repr(self.share)) * outputs)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Whole matrices of one shape, their chosen rows (see `Choice`), or one matrix of a team, for `MatrixRule.update`.

    Attributes:
        matrices: (n, rows, cols) directions, in the wire's dtype; may be overwritten.
        active: (n,) 1 for a matrix with any gradient that is not zero, else 0; in the wire's dtype.
        transposed: whether the weights are stored (in, out), so that their output rows are the columns.
        statistics: by name, (n, outputs) or (n, 1) in float32, to be advanced in place; negative where another rank keeps
            the value (``sharding.mode: shard_local``).
        sums: by name, (n, outputs) or (n, 1) in float32; empty for a rule with `MatrixRule.settle`.
        has_all: whether no statistic is another rank's, so that none is negative.
        factors: by name, (n, rows, rows), (n, cols, cols) or (n, rows, cols) in float32, to be advanced in place.
        watch: function that the rule calls with the (n, rows, cols) orthogonal factors before it changes them; it serves
            telemetry. With a team, with this member's rows of them.
        team: the ranks that compute the update of the one matrix together; None for a rank alone. Only a rule that
            `works_in_teams` gets one.
        whole: (rows, cols) of the matrices from which rows were chosen; None if these are whole.
    """

    matrices: Tensor
    active: Tensor
    transposed: bool = False
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    has_all: bool = False
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    watch: Callable[[Tensor], None] = field(default=lambda orthogonal: None)
    team: Team | None = None
    whole: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the whole matrices."""
        return self.whole or (self.matrices.shape[-2], self.matrices.shape[-1])


class Rule(ABC):
    """Common base of elementwise and matrix rules; a rule derives from `ElementwiseRule` or `MatrixRule`.

    Attributes:
        buffers: the state buffers.
        scheduled: names of the settings that live in the parameter group, where a schedule may change them.
        averages: names of the buffers from which `averaged` computes the weights to evaluate; empty if the weights are
            evaluated as they are.
        replaces_schedule: whether the rule does by itself what a falling learning rate is for. A configured falling curve
            is then a ConfigError, and a learning rate that falls during training is warned of.
    """

    __slots__ = ()

    buffers: ClassVar[tuple[Buffer, ...]]
    scheduled: ClassVar[tuple[str, ...]]
    averages: ClassVar[tuple[str, ...]] = ()
    replaces_schedule: ClassVar[bool] = False

    def begin(self, group: Hyperparameters, scalars: MutableMapping[str, float], step: int) -> Hyperparameters:
        """Return the hyperparameters of one step; called once per step and group, before everything else.

        Args:
            group: the dict in ``param_groups``, with the values of `scheduled`.
            scalars: the rule's own numbers, saved with its state; to be changed in place.
            step: number of the step, counted from 1.

        Returns:
            What the other members get as ``now``.
        """
        return group

    @staticmethod
    def averaged(weight: Tensor, buffers: Mapping[str, Tensor], scalars: Mapping[str, float]) -> Tensor:
        """Compute the weight to evaluate and export.

        Args:
            weight: the trained weight, of any shape.
            buffers: the buffers named in ``averages``, by name, of the same shape.
            scalars: the numbers that `begin` kept.

        Returns:
            A new tensor of the shape and dtype of ``weight``.

        Raises:
            NotImplementedError: a rule without ``averages``.
        """
        raise NotImplementedError


class ElementwiseRule(Rule):
    """A rule whose update of an element depends on that element alone.

    Attributes:
        update_at_most: the root mean square of a group's updates, without decay, over the learning rate, that steady training
            does not exceed: telemetry warns above it. None where there is no such bound.
    """

    __slots__ = ()

    update_at_most: ClassVar[float | None] = None

    @property
    def in_place(self) -> bool:
        """Whether `step` allocates no temporary tensors of the parameters' size, and so may get all of them in one call."""
        return False

    @abstractmethod
    def step(self, parameters: Tensors, gradients: Tensors, state: State, now: Hyperparameters) -> None:
        """Update ``parameters`` and ``state`` in place.

        Args:
            parameters: (elements,) each.
            gradients: (elements,) each; to be left unchanged.
            state: by buffer, (elements,) each.
            now: the hyperparameters that `begin` returned.
        """


class MatrixRule(Rule):
    """A rule that needs whole matrices: all members are elementwise but `update`, which sees each matrix.

    A step calls `begin`, then for each bucket `summand` and `direction` on the fragments of this rank, `update` on the
    matrices that it owns, and `summand` and `apply` on its fragments again. `settle`, of a rule that has it, comes between
    `summand` and what follows.

    Attributes:
        statistics: float32 values that are kept per output row or per matrix.
        factors: float32 tensors that the owner of a matrix keeps of it.
        sums: sums over whole rows or matrices. No tensor of `apply`, and of `direction` if any of them are of the gradients,
            spans two matrices then.
        reads_weights: whether `direction`, and `summand` of the gradient, get the weights.
        refuses_zeros: whether a matrix of zeros is an error in its first step.
        resizes: whether `apply` gives the update another size than `rms`: telemetry then expects none.
        in_teams: whether the `update` of the class that says so heeds ``batch.team``; `team_cost` is then needed. It is not
            inherited by a class that has an `update` of its own.
    """

    __slots__ = ()

    statistics: ClassVar[tuple[Statistic, ...]] = ()
    factors: ClassVar[tuple[Factor, ...]] = ()
    sums: ClassVar[tuple[Sum, ...]] = ()
    reads_weights: ClassVar[bool] = False
    refuses_zeros: ClassVar[bool] = False
    resizes: ClassVar[bool] = False
    in_teams: ClassVar[bool] = False

    @property
    def choice(self) -> Choice | None:
        """The rows of each matrix that a step updates: `update` gets them alone, and only they travel; None: all."""
        return None

    @abstractmethod
    def cost(self, rows: int, cols: int) -> int:
        """Return the cost of `update` on one (rows, cols) matrix, or on as many chosen rows, in FLOPs.

        The plan balances owners by it.
        """

    def cost_on(self, device: str, rows: int, cols: int) -> int:
        """Return the cost on a type of device, for a rule whose products differ between devices; `cost` is the same on all.

        Args:
            device: "cpu", "cuda", ...
            rows: stored rows.
            cols: stored columns.
        """
        return self.cost(rows, cols)

    @property
    def needs_owner(self) -> bool:
        """Whether the rule, as it is set, needs one owner for each matrix all the same; asked where there is ``in_teams``."""
        return False

    def team_cost(self, device: str, rows: int, cols: int, blocks: Sequence[int]) -> tuple[int, int, int]:
        """Count what `update` of one (rows, cols) matrix costs a member of a team. Teams are planned by it.

        Args:
            device: "cpu", "cuda", ...
            rows: stored rows.
            cols: stored columns.
            blocks: rows of each member.

        Returns:
            (FLOPs of the member with most rows; calls of `Team.gather`; bytes of the tensors that these fill).

        Raises:
            NotImplementedError: a rule without ``in_teams``.
        """
        raise NotImplementedError

    @abstractmethod
    def direction(self, gradients: Tensors, weights: Tensors, state: State, sums: Sums, now: Hyperparameters) -> Tensors:
        """Advance ``state`` in place and return the directions that `update` is to get.

        Args:
            gradients: (elements,) each; to be left unchanged.
            weights: (elements,) each if ``reads_weights``; else empty.
            state: by buffer that is not of the update, (elements,) each.
            sums: by sum of the gradient, (elements,) each for one per row, (1,) each for one per matrix; float32. In their
                place what `settle` returned, if the rule has it.
            now: the hyperparameters that `begin` returned.

        Returns:
            (elements,) each, in the order of ``gradients``. They are rounded to the wire's dtype.
        """

    @abstractmethod
    def update(self, batch: Batch, now: Hyperparameters) -> Tensor:
        """Compute the updates of whole matrices, and advance ``batch.statistics`` and ``batch.factors`` in place.

        Those of a matrix that is not active must stay as they are.

        Args:
            batch: matrices of one shape.
            now: the hyperparameters that `begin` returned.

        Returns:
            (n, rows, cols) updates in the wire's dtype or wider; zeros where ``batch.active`` is 0. With a team, this
            member's rows of the one update.
        """

    @abstractmethod
    def rms(self, rows: int, cols: int, transposed: bool) -> float:
        """Return the root mean square of the step over the learning rate, decay apart, for an exactly orthogonal matrix.

        That of `update` where `apply` does not change the size, as none may that is to work with ``mode: shard_local``.

        Args:
            rows: stored rows.
            cols: stored columns.
            transposed: whether the weight is stored (in, out).
        """

    def healthy(self, rows: int, cols: int) -> Healthy | None:
        """Return bounds for what `update` gives to ``batch.watch``, for ordinary momenta of one shape; None if none are known.

        Args:
            rows: stored rows.
            cols: stored columns.
        """
        return None

    @abstractmethod
    def apply(
        self, parameters: Tensors, updates: Tensors, active: Tensor, state: State, sums: Sums, now: Hyperparameters
    ) -> None:
        """Step ``parameters``, and the ``state`` that is of the update, in place.

        Args:
            parameters: (elements,) each; each lies within one matrix.
            updates: (elements,) each, rounded to the wire's dtype, in that of the parameters or in a wider one of the wire.
            active: (parameters,) 0 or 1: 0 leaves a parameter, and its state, as it is.
            state: by buffer of the update, (elements,) each.
            sums: by sum, all of the rule's: (elements,) each for one per row, (1,) each for one per matrix; float32. In their
                place what `settle` returned for the updates, if the rule has it.
            now: the hyperparameters that `begin` returned.
        """

    def settle(self, of_update: bool, values: Values, now: Hyperparameters) -> Values:
        """Make of sums and statistics the numbers that `direction` or `apply` gets, and advance the statistics.

        It is optional, and called once per bucket and kind of sums; all ranks that hold elements compute the same. Sums and
        given statistics of a rule that has it are all per row, or all per matrix.

        Args:
            of_update: whether for `apply`; else for `direction`.
            values: (count,) each, in float64: by sum and by statistic that is given to `direction`, and for `apply` also
                those that are given to it, and "active", 0 or 1: where it is 0, statistics must stay as they are.
            now: the hyperparameters that `begin` returned.

        Returns:
            (count,) each: by name of a statistic that was in ``values``, what is to be kept; by any other name, what
            `direction` or `apply` gets as ``sums``.

        Raises:
            NotImplementedError: a rule without it.
        """
        raise NotImplementedError

    def summand(self, name: str, weights: Tensors, values: Tensors, state: State, now: Hyperparameters) -> Tensors:
        """Compute the terms that the sum ``name`` adds up, without changing any argument.

        Args:
            name: of one of `sums`.
            weights: (elements,) each; empty for a sum of the gradient, unless ``reads_weights``.
            values: (elements,) each: the gradients, or the updates as `apply` will get them.
            state: by buffer, (elements,) each, as `direction` or `apply` will get it: not yet advanced.
            now: the hyperparameters that `begin` returned.

        Returns:
            (elements,) each, in the order of ``values``.

        Raises:
            NotImplementedError: a rule without `sums`.
        """
        raise NotImplementedError


def works_in_teams(rule: MatrixRule) -> bool:
    """Whether several ranks can compute the `update` of one matrix together.

    The class that defines `update` has to say so: one that overrides the `update` of a rule for teams may not know of them.
    Statistics of a rule have one owner, and so do the matrices of one that chooses rows, or `needs_owner` as it is set.
    """
    definer = next(base for base in type(rule).__mro__ if "update" in vars(base))
    return bool(vars(definer).get("in_teams", False)) and not rule.needs_owner and not rule.statistics and not rule.choice


def buffers_of(rule: Rule, of_update: bool) -> tuple[Buffer, ...]:
    """Return the buffers of ``rule`` that the update advances (``of_update``), or those that the gradient advances."""
    return tuple(buffer for buffer in rule.buffers if buffer.of_update == of_update)


def statistics_of(rule: Rule, *given: Given) -> tuple[Statistic, ...]:
    """Return the statistics of a rule, or those ``given`` to these members alone; an elementwise rule has none."""
    statistics = rule.statistics if isinstance(rule, MatrixRule) else ()
    return tuple(statistic for statistic in statistics if not given or statistic.given in given)


def factors_of(rule: Rule) -> tuple[Factor, ...]:
    """Return the factors of a rule; an elementwise rule has none."""
    return rule.factors if isinstance(rule, MatrixRule) else ()


def kept_by(rule: Rule) -> tuple[Statistic | Factor, ...]:
    """Return the statistics and factors of a rule, all that it keeps beside its buffers."""
    return (*statistics_of(rule), *factors_of(rule))


def settles(rule: MatrixRule | type[MatrixRule]) -> bool:
    """Whether a rule has `MatrixRule.settle`."""
    return (rule if isinstance(rule, type) else type(rule)).settle is not MatrixRule.settle
