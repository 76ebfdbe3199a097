"""The files that a training run leaves in its folder, as train.py, compare and sweep write and read them."""

import os
from pathlib import Path
from typing import Any

from ds_optforge.errors import ConfigError
from ds_optforge.reading import DATA_BYTES, content, json_value, text


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of metrics.jsonl up to the first incomplete one (still being written, or cut off); none without a file.

    Raises:
        ConfigError: the file is too large.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = content(path, DATA_BYTES).splitlines() if path.is_file() else ()
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; allowed: what a run has written") from None
    rows = []
    for line in lines:
        try:
            rows.append(json_value(line))
        except ValueError:
            break
    return [row for row in rows if isinstance(row, dict)]


def read_summary(folder: Path) -> dict[str, Any]:
    """Read summary.json.

    Raises:
        OSError: there is none that can be read.
        ValueError: it holds no object.
    """
    found = json_value(text(folder / "summary.json"))
    if not isinstance(found, dict):
        raise ValueError(f"got a {type(found).__name__}; allowed: an object")
    return found


def replace_text(path: Path, text: str) -> None:
    """Write a file atomically: readers find the old text or the new one, also after the writer was killed."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
