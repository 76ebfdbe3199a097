"""Write the tables of performance.md from what the benchmarks left.

    make bench && python docs/performance_tables.py [FOLDER]

FOLDER (runs/benchmarks) holds their JSON files. Rewrites what stands between `<!-- name -->` and `<!-- end -->`; a table whose
file is missing stays as it is.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "performance.md"
Row = dict[str, Any]
Columns = dict[str, tuple[str, str]]  # key of the row: heading, format


def table(rows: Iterable[Row], columns: Columns) -> str:
    """A Markdown table."""
    lines = [
        "| " + " | ".join(heading for heading, _ in columns.values()) + " |",
        "|" + "---|" * len(columns),
    ]
    for row in rows:
        cells = ["" if row.get(key) is None else format(row[key], how) for key, (_, how) in columns.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def orthogonalization(rows: list[Row]) -> str:
    columns: Columns = {
        "shape": ("shape", ""),
        "batch": ("matrices", ""),
        "form": ("form", ""),
        "auto_ms": ("ms", ".1f"),
        "over_products": ("over its products", ".2f"),
        "over_torch": ("times faster than torch.optim.Muon", ".2f"),
        "over_deepspeed": ("than DeepSpeed", ".2f"),
        "compiled_ms": ("compiled, ms", ".1f"),
        "distance": ("distance to the polar factor", ".3f"),
        "torch_distance": ("torch's", ".3f"),
    }
    return table(rows, columns)


def step(rows: list[Row]) -> str:
    columns: Columns = {
        "width": ("width", ""),
        "stage": ("ZeRO", ""),
        "optimizer": ("optimizer", ""),
        "iteration_ms": ("iteration, ms", ".0f"),
        "overhead_ms": ("over AdamW, ms", ".0f"),
        "over_incumbent": ("of the built-in's", ".2f"),
        "over_products": ("of the products", ".2f"),
        "cpu_over_incumbent": ("processor time, of the built-in's", ".2f"),
        "cpu_over_products": ("of the products", ".2f"),
    }
    return table(rows, columns)


def memory(rows: list[Row]) -> str:
    columns: Columns = {
        "stage": ("ZeRO", ""),
        "optimizer": ("optimizer", ""),
        "held_mb": ("held between steps, MB", ".1f"),
        "workspace_mb": ("workspace of a step, MB", ".1f"),
        "over_bound": ("of the bound", ".2f"),
        "over_adamw_mb": ("held and peak over AdamW, MB", "+.1f"),
    }
    return table(rows, columns)


def wire(rows: list[Row]) -> str:
    columns: Columns = {
        "ranks": ("ranks", ""),
        "placed": ("placed", ""),
        "stage": ("ZeRO", ""),
        "optimizer": ("optimizer", ""),
        "megabytes": ("MB a step over AdamW", ".2f"),
        "floor_megabytes": ("floor", ".2f"),
        "less_than_incumbent": ("times less than built-in", ".1f"),
    }
    # On ZeRO-1 and 2 the built-in Muon sends nothing that could be compared.
    kept = [row | ({} if row["stage"] == 3 else {"less_than_incumbent": None}) for row in rows if row["link"] is None]
    return table((row for row in kept if row["optimizer"] != "AdamW"), columns)


def links(rows: list[Row]) -> str:
    columns: Columns = {
        "link": ("link", ""),
        "optimizer": ("optimizer", ""),
        "milliseconds": ("iteration, ms", ".0f"),
        "overhead_ms": ("over AdamW, ms", ".0f"),
        "over_incumbent": ("of the built-in's", ".2f"),
    }
    return table((row for row in rows if row["link"] is not None), columns)


def modes(rows: list[Row]) -> str:
    columns: Columns = {
        "mode": ("mode", ""),
        "loss": ("validation loss", ".4f"),
        "deviation": ("deviation over seeds", ".4f"),
        "over_gather": ("over gather", "+.4f"),
        "over_gather_deviation": ("its deviation", ".4f"),
    }
    return table(rows, columns)


def scaling(rows: list[Row]) -> str:
    columns: Columns = {
        "model": ("model", ""),
        "ranks": ("ranks", ""),
        "stage": ("ZeRO", ""),
        "matrices_per_rank": ("matrices a rank", ".1f"),
        "flops_max_over_mean": ("FLOPs, max / mean", ".3f"),
        "path_over_ideal": ("critical path / ideal", ".3f"),
        "sent_mb": ("sent a step, MB", ",.0f"),
        "workspace_mb": ("workspace, MB", ",.0f"),
        "planning_seconds": ("planning, s", ".2f"),
    }
    kept = [row for row in rows if row["sub_groups"] == 1 and row["model"] in ("llama3-8b", "llama3-70b", "kimi-k2")]
    return table(kept, columns)


TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {  # marker: file, table
    "orthogonalization": ("orthogonalization", orthogonalization),
    "step": ("step", step),
    "memory": ("memory", memory),
    "wire": ("wire", wire),
    "links": ("wire", links),
    "modes_2": ("modes_2", modes),
    "modes_4": ("modes_4", modes),
    "rows_2": ("rows_2", modes),
    "scaling": ("scaling", scaling),
}


def main(folder: Path) -> None:
    """Rewrite the page."""
    text = PAGE.read_text(encoding="utf-8")
    for marker, (name, make) in TABLES.items():
        path = folder / f"{name}.json"
        if path.exists():
            found = make(json.loads(path.read_text(encoding="utf-8"))["rows"])
            pattern = rf"(<!-- {marker} -->\n).*?(<!-- end -->)"
            text = re.sub(pattern, lambda place, found=found: place[1] + found + "\n" + place[2], text, flags=re.DOTALL)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/benchmarks"))
