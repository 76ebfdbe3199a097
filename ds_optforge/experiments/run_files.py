"""The files that a training run leaves in its folder, as train.py, compare and sweep write and read them."""

import json
import os
from pathlib import Path
from typing import Any


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of metrics.jsonl up to the first incomplete one (still being written, or cut off); none without a file."""
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return [row for row in rows if isinstance(row, dict)]


def replace_text(path: Path, text: str) -> None:
    """Write a file atomically: readers find the old text or the new one, also after the writer was killed."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
