"""The declaration of state that belongs to a matrix and not to the slices that hold its fragments."""

from dataclasses import dataclass

from ds_optforge.zero.partition import Of


@dataclass(frozen=True, slots=True)
class Factor:
    """Declaration of a float32 tensor that the owner of a matrix keeps of it. It starts as zeros.

    No other rank has it, and it never travels: `MatrixRule.update` gets it in `Batch.factors`, where the matrix arrives.

    Attributes:
        name: key of the tensor in the optimizer's state and in `Batch.factors`.
        of: its shape, for a stored (rows, cols) matrix: "rows" for (rows, rows), "cols" for (cols, cols), "matrix" for
            (rows, cols).
    """

    name: str
    of: Of
