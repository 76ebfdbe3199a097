"""The output of every benchmark: a table on the terminal, a JSON file and a picture, with the machine it ran on."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from rich.console import Console
from rich.table import Table

import ds_optforge

DEFAULT_OUT = Path("runs/benchmarks")


@dataclass(frozen=True)
class Column:
    """A column of a table: the key of its value in a row, its heading (with the unit) and the format of its numbers."""

    key: str
    heading: str
    format: str = ""


def machine() -> str:
    """Describe the processor, its cores and the threads of this process."""
    model = next((line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) a process"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def show(title: str, columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> None:
    """Print one table."""
    table = Table(*(column.heading for column in columns), title=f"{title}\n{machine()}")
    for row in rows:
        table.add_row(*(_cell(row.get(column.key), column.format) for column in columns))
    Console(width=150).print(table)


def _cell(value: Any, how: str) -> str:
    return "" if value is None else format(value, how)


def write(name: str, title: str, rows: Sequence[dict[str, Any]], out: Path = DEFAULT_OUT, **more: Any) -> Path:
    """Write ``NAME.json`` into ``out``: title, machine, versions, rows and the fields of ``more``. Return its path."""
    out.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "ds_optforge": ds_optforge.__version__}
    path = out / f"{name}.json"
    content = {"title": title, "machine": machine(), "versions": versions, "rows": list(rows), **more}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def figure(width: float = 8.0, height: float = 4.5) -> tuple[Any, Any]:
    """Make a matplotlib figure and axes that need no display; `save` writes them. Sizes are in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def save(name: str, fig: Any, out: Path = DEFAULT_OUT) -> Path:
    """Write the figure as ``NAME.png`` into ``out``. Return its path."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.png"
    fig.savefig(path, dpi=120)
    return path
