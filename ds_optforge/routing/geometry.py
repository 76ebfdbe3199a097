"""The matrices in a parameter: members of a bank, filters of a convolution, or blocks as ``split`` and ``heads`` say."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.errors import ConfigError
from ds_optforge.routing.fused import Fused
from ds_optforge.routing.tags import tags_of
from ds_optforge.zero.partition import Joined
from ds_optforge.zero.shards import full_shape


@dataclass(frozen=True, slots=True)
class Geometry:
    """The matrices in a parameter.

    Attributes:
        matrices: (start in the flattened parameter, rows, cols) of each. A vector counts as one row.
        transposed: whether they are stored (in, out).
        joins: the matrices that each of them joins though they are no ranges of it; None if it is one itself.
        cut: whether ``split`` or ``heads`` made them.
    """

    matrices: tuple[tuple[int, int, int], ...]
    transposed: bool
    joins: Joined | None
    cut: bool


def is_vector(parameter: Tensor) -> bool:
    """Whether a parameter counts as a vector: one dimension, or more of which at most one is larger than 1, as (C, 1, 1).

    The weight of a Linear or of a convolution with a single input or output is no vector: it decays as other weights do, but a
    matrix rule leaves it to adamw, since there is nothing to orthogonalize.
    """
    shape = full_shape(parameter)
    matrix = tags_of(parameter).kind.matrix
    return len(shape) < 2 or (len(shape) > 2 and sum(size > 1 for size in shape) < 2 and matrix is None)


def geometry_of(parameter: Tensor, name: str, config: OptimizerConfig, matched: Sequence[int]) -> Geometry:
    """Find the matrices in a parameter: a bank's members, a convolution's filters, or blocks as ``split`` and ``heads`` say.

    Args:
        parameter: of the model.
        name: its qualified name, for messages.
        config: of the optimizer.
        matched: indices of the overrides that match the parameter; the last one with a key wins.

    Raises:
        ConfigError: ``split`` or ``heads`` do not fit the rows, or nothing tells what "auto" would be, or the weight is stored
            (in, out).
    """
    shape, tags = full_shape(parameter), tags_of(parameter)
    kind = tags.kind
    if is_vector(parameter):
        rows, cols = 1, shape.numel()
    elif kind.matrix is not None:
        rows, cols = kind.matrix
    elif tags.name is not None:
        rows, cols = shape[-2:]
    else:  # KellerJordan's groups are not registered; more dimensions than two are convolution filters there
        rows, cols = shape[0], shape.numel() // shape[0]
    stored = _asked("stored", config, matched)
    transposed = kind.transposed if stored is None else stored.value == "in_out" and not is_vector(parameter)
    blocks = _blocks(rows, transposed, kind.fused, name, config, matched)
    joins = None if blocks else _joined(cols if transposed else rows, transposed, kind.fused, name, config, matched)
    matrices = []
    for bank in range(0, shape.numel(), rows * cols):
        start = bank
        for block in blocks or [rows]:
            matrices.append((start, block, cols))
            start += block * cols
    return Geometry(tuple(matrices), transposed, joins, blocks is not None or joins is not None)


@dataclass(frozen=True, slots=True)
class _Asked:
    """The value of a key, and the override that has it; None for the key at the top level."""

    value: Any
    override: int | None

    def where(self, name: str, key: str) -> str:
        return f"{name}: {key}" if self.override is None else f"{name}: overrides[{self.override}].{key}"


def _asked(key: str, config: OptimizerConfig, matched: Sequence[int]) -> _Asked | None:
    found = [(value, i) for i in matched if (value := getattr(config.common.overrides[i], key)) is not None]
    if found:
        return _Asked(*found[-1])
    value = getattr(config.common, key, None)
    return None if value is None else _Asked(value, None)


def _blocks(
    rows: int, transposed: bool, fused: Fused | None, name: str, config: OptimizerConfig, matched: Sequence[int]
) -> list[int] | None:
    """Return the rows of each block that a matrix of ``rows`` is cut into, in order; None if nothing cuts it."""
    blocks = None
    for key, cut in (("split", _split), ("heads", _heads)):
        asked = _asked(key, config, matched)
        if asked is None:
            continue
        value, where = asked.value, asked.where(name, key)
        if value == "auto":
            found = _parts_of(fused, rows, transposed) if key == "split" else _heads_of(fused, rows, transposed, blocks)
            if found is not None:
                blocks = found
            elif asked.override is not None and not (key == "split" and _turns(fused, transposed)):
                raise ConfigError(f"{where}: got 'auto', but {_why_not(fused, transposed)}; allowed: numbers, or no '{key}'")
            continue
        if transposed:
            if key == "split" and len(set(value)) == 1:
                continue  # equal parts of the columns: see `_joined`
            raise ConfigError(f"{where} cuts rows, but this weight is stored (in, out); allowed: a split into equal parts")
        blocks = cut(blocks or [rows], value, where)
    return blocks


def _joined(
    outputs: int, transposed: bool, fused: Fused | None, name: str, config: OptimizerConfig, matched: Sequence[int]
) -> Joined | None:
    """Return the matrices that a ``split`` finds in one that has these ``outputs``, if they are no ranges of it."""
    asked = _asked("split", config, matched)
    if asked is None:
        return None
    if asked.value == "auto":
        return _turns(fused, transposed)
    if not transposed:
        return None
    if sum(asked.value) != outputs:
        found = f"got {list(asked.value)}, {sum(asked.value)} outputs"
        raise ConfigError(f"{asked.where(name, 'split')}: {found}; allowed: parts of its {outputs} columns")
    return Joined(len(asked.value), asked.value[0])


def _turns(fused: Fused | None, transposed: bool) -> Joined | None:
    """Return the equal parts of a weight that are no ranges of it, since they take turns or are columns; None for any other."""
    if fused is None or len(set(fused.parts)) > 1 or len(fused.parts) == 1 or not (fused.block or transposed):
        return None
    return Joined(len(fused.parts), fused.block or fused.parts[0])


def _parts_of(fused: Fused | None, rows: int, transposed: bool) -> list[int] | None:
    """Return the parts of a weight whose parts follow each other whole; None for any other."""
    if fused is None or transposed or fused.block or len(fused.parts) == 1 or sum(fused.parts) != rows:
        return None
    return list(fused.parts)


def _heads_of(fused: Fused | None, rows: int, transposed: bool, blocks: Sequence[int] | None) -> list[int] | None:
    """Return the rows of each head of each part; None for a weight without heads, or whose split is another."""
    if fused is None or transposed or max(fused.heads) == 1 or sum(fused.parts) != rows:
        return None
    if fused.block:
        return [fused.block] * (rows // fused.block)
    if blocks is not None and list(blocks) != list(fused.parts):
        return None
    pairs = zip(fused.parts, fused.heads, strict=True)
    return [part // count for part, count in pairs for _ in range(count)]


def uncut(fused: Fused | None, found: Geometry) -> str:
    """Return what a parameter joins though it is not cut, with the key that would cut it; empty if there is nothing."""
    if fused is None or len(fused.parts) == 1 or found.cut:
        return ""
    unequal = len(set(fused.parts)) > 1 and (fused.block or found.transposed)
    return f'{fused}, which "heads": "auto" cuts by head' if unequal else f'{fused}, which "split": "auto" cuts'


def _why_not(fused: Fused | None, transposed: bool) -> str:
    if fused is None:
        return "neither its module nor the model's configuration tells what it joins"
    if fused.block or (transposed and max(fused.heads) > 1):
        return f"{fused} are no ranges of rows"
    return "it joins no matrices" if len(fused.parts) == 1 else f"{fused} have no heads, or another split than asked for"


def _split(blocks: list[int], parts: tuple[int, ...], where: str) -> list[int]:
    if sum(parts) != blocks[0]:
        raise ConfigError(f"{where}: got {list(parts)}, {sum(parts)} rows; allowed: parts of its {blocks[0]} rows")
    return list(parts)


def _heads(blocks: list[int], heads: int | tuple[int, ...], where: str) -> list[int]:
    counts = [heads] * len(blocks) if isinstance(heads, int) else list(heads)
    if len(counts) != len(blocks):
        raise ConfigError(f"{where}: got {len(counts)} counts; allowed: {len(blocks)}, one per entry of split")
    for rows, count in zip(blocks, counts, strict=True):
        if rows % count:
            raise ConfigError(f"{where}: got {count} for {rows} rows; allowed: a divisor of {rows}")
    return [rows // count for rows, count in zip(blocks, counts, strict=True) for _ in range(count)]
