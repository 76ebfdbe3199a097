"""Error feedback (Dion2 and Dion3, Ahn et al. 2026, arXiv 2608.11612): a step updates the rows with the largest momentum.

The rows that it leaves out keep accumulating their gradients until they are chosen. Paper and code differ by names: what the
authors' code calls Dion2 is Muon with it, what it calls Dion3 (NorDion2) is NorMuon with it.
"""

import math
from typing import ClassVar

import torch

from ds_optforge.rules.base import Buffer, Choice, Hyperparameters, MatrixRule, State, Sum, Sums, Tensors

_SUM = "momentum_size"


class ErrorFeedback(MatrixRule):
    """A matrix rule's momentum by rows: M <- M + g; the rows R with the largest sums of |M| are chosen; M[R] <- momentum M[R].

    The rule orthogonalizes M[R] as it was before it was multiplied, and steps W[R]; to all other rows its update is zero. The
    scale by the shape is that of the whole matrix, and weight decay is of all rows, as in the authors' code. That code chooses
    rows or columns by the way in which a matrix is cut; here it is always output rows, so that the cuts do not matter. The sum
    M is not Muon's average: there is no Nesterov momentum, and it has a name of its own in the state.

    Mix it in before the rule, in a dataclass with ``share``.

    Attributes:
        share: of the output rows that a step updates.
    """

    __slots__ = ()

    share: float
    buffers: ClassVar[tuple[Buffer, ...]] = (Buffer("accumulated_gradient", momentum=True),)
    sums: ClassVar[tuple[Sum, ...]] = (Sum(_SUM, per="row"),)

    @property
    def choice(self) -> Choice:
        """The share of the rows that has the largest sums of |M|."""
        return Choice(_SUM, self.share)

    def summand(self, name: str, weights: Tensors, values: Tensors, state: State, now: Hyperparameters) -> Tensors:
        """Return |M + g|; arguments as in `MatrixRule.summand`."""
        return torch._foreach_abs(torch._foreach_add(list(state["accumulated_gradient"]), list(values)))

    def direction(self, gradients: Tensors, weights: Tensors, state: State, sums: Sums, now: Hyperparameters) -> Tensors:
        """Advance M and return it as it was before its chosen rows fade; arguments as in `MatrixRule.direction`."""
        accumulated, chosen = list(state["accumulated_gradient"]), sums[_SUM]
        whole = torch._foreach_add(accumulated, list(gradients))
        faded = torch._foreach_mul(whole, now["momentum"])
        torch._foreach_copy_(accumulated, whole)
        # Of the weights 0 and 1, lerp returns its first or second argument as it is.
        torch._foreach_lerp_(accumulated, faded, [flags.to(values.dtype) for flags, values in zip(chosen, faded, strict=True)])
        return whole

    def rms(self, rows: int, cols: int, transposed: bool) -> float:
        """Return what is left of the root mean square over the whole matrix; arguments as in `MatrixRule.rms`."""
        outputs, inputs = (cols, rows) if transposed else (rows, cols)
        rank = min(self.choice.count(outputs), inputs)
        whole: float = super().rms(rows, cols, transposed)  # type: ignore[safe-super]  # of the rule that it is mixed into
        return whole * math.sqrt(rank / min(rows, cols))
