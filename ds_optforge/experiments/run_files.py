"""What a training run leaves in its folder, as train.py writes and reads it and as compare and sweep do."""

import json
import os
from pathlib import Path
from typing import Any


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, up to one that is still being written or that a run was killed in; none without a file."""
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return [row for row in rows if isinstance(row, dict)]


def replace_text(path: Path, text: str) -> None:
    """Write a file so that whoever reads it, or is killed, finds the old text or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
