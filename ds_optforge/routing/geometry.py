"""The matrices in a parameter: members of a bank, filters of a convolution, or blocks as ``split`` and ``heads`` say."""

from collections.abc import Sequence

from torch import Tensor

from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.errors import ConfigError
from ds_optforge.routing.tags import tags_of
from ds_optforge.zero.shards import full_shape


def is_vector(parameter: Tensor) -> bool:
    """Whether a parameter counts as a vector: one dimension, or more of which at most one is larger than 1, as (C, 1, 1).

    The weight of a Linear or of a convolution with a single input or output is no vector: it decays as other weights do, but a
    matrix rule leaves it to adamw, since there is nothing to orthogonalize.
    """
    shape = full_shape(parameter)
    return len(shape) < 2 or (len(shape) > 2 and sum(size > 1 for size in shape) < 2 and tags_of(parameter).matrix is None)


def matrices_in(parameter: Tensor, name: str, config: OptimizerConfig, matched: Sequence[int]) -> list[tuple[int, int, int]]:
    """Find the matrices in a parameter: a bank's members, a convolution's filters, or blocks as ``split`` and ``heads`` say.

    Args:
        parameter: of the model.
        name: its qualified name, for messages.
        config: of the optimizer.
        matched: indices of the overrides that match the parameter; the last one with a key wins.

    Returns:
        (start in the flattened parameter, rows, cols) of each matrix. A vector counts as one row.

    Raises:
        ConfigError: ``split`` or ``heads`` do not fit the rows, or the weight is stored (in, out).
    """
    shape, tags = full_shape(parameter), tags_of(parameter)
    if is_vector(parameter):
        rows, cols = 1, shape.numel()
    elif tags.matrix is not None:
        rows, cols = tags.matrix
    elif tags.name is not None:
        rows, cols = shape[-2:]
    else:  # KellerJordan's groups are not registered; more dimensions than two are convolution filters there
        rows, cols = shape[0], shape.numel() // shape[0]
    blocks = [rows]
    for key in ("split", "heads"):
        asked = [(i, value) for i in matched if (value := getattr(config.common.overrides[i], key)) is not None]
        if asked:
            index, value = asked[-1]
            if tags.transposed:
                raise ConfigError(f"{name}: overrides[{index}].{key} cuts rows, but this weight is stored (in, out)")
            cut = _split if key == "split" else _heads
            blocks = cut(blocks, value, f"{name}: overrides[{index}]")
    matrices = []
    for bank in range(0, shape.numel(), rows * cols):
        start = bank
        for block in blocks:
            matrices.append((start, block, cols))
            start += block * cols
    return matrices


def _split(blocks: list[int], parts: tuple[int, ...], where: str) -> list[int]:
    if sum(parts) != blocks[0]:
        raise ConfigError(f"{where}.split: got {list(parts)}, {sum(parts)} rows; allowed: parts of its {blocks[0]} rows")
    return list(parts)


def _heads(blocks: list[int], heads: int | tuple[int, ...], where: str) -> list[int]:
    counts = [heads] * len(blocks) if isinstance(heads, int) else list(heads)
    if len(counts) != len(blocks):
        raise ConfigError(f"{where}.heads: got {len(counts)} counts; allowed: {len(blocks)}, one per entry of split")
    for rows, count in zip(blocks, counts, strict=True):
        if rows % count:
            raise ConfigError(f"{where}.heads: got {count} for {rows} rows; allowed: a divisor of {rows}")
    return [rows // count for rows, count in zip(blocks, counts, strict=True) for _ in range(count)]
