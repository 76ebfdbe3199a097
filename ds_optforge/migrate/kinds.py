"""Recognises which kind of file a user has, by its content, and reads it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ds_optforge.errors import ConfigError
from ds_optforge.migrate import deepspeed_file
from ds_optforge.migrate.documents import load
from ds_optforge.migrate.source import Source

_DEEPSPEED = (
    "optimizer", "scheduler", "zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu",
)  # fmt: skip


def read(path: Path) -> Source:
    """Return what a file says.

    Raises:
        ConfigError: a file that cannot be read, or is of no known kind, or has bad values.
    """
    values = load(path)
    for matches, reader in _KINDS:
        if matches(values):
            return reader(values, path)
    raise ConfigError(
        f"{path}: got an object with the keys {', '.join(sorted(values)) or 'of nothing'}; allowed: a DeepSpeed configuration"
    )


_KINDS: tuple[tuple[Callable[[Mapping[str, Any]], bool], Callable[[Mapping[str, Any], Path], Source]], ...] = (
    (lambda values: any(key in values for key in _DEEPSPEED), deepspeed_file.read),
)
