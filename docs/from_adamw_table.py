"""Write the tables of from_adamw.md from what benchmarks/from_adamw.py left.

    python docs/from_adamw_table.py                                     # from the results on record
    python docs/from_adamw_table.py runs/from_adamw/from_adamw.json     # puts these on record in data/from_adamw.json first

Rewrites what stands between `<!-- name -->` and `<!-- end -->`. A test fails when the committed page is stale.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "from_adamw.md"
RECORD = Path(__file__).parent / "data" / "from_adamw.json"


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Make the tables by name."""
    return {"evidence": evidence(results["rows"]), "tuning": tuning(results["tuning"], results["rows"])}


def evidence(rows: list[dict[str, Any]]) -> str:
    """A line for each workload and rate of AdamW."""
    lines = [
        "| workload | AdamW's rate | AdamW | `init` from it | better by | noise threshold | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    by_key = {(row["workload"], row["rate"], row["optimizer"]): row for row in rows}
    for (workload, rate, optimizer), after in by_key.items():
        if optimizer == "init":
            before = by_key[workload, rate, "adamw"]
            cells = [f"{after['title']}, {after['steps']} steps", f"{rate:g}", loss(before), loss(after)]
            cells += [f"{after['gain']:.4f}", f"{after['threshold']:.4f}", "better" if after["beats"] else "not better"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def loss(row: dict[str, Any]) -> str:
    """Mean and standard error."""
    return f"{row['loss']:.4f} ± {row['error']:.4f}"


def tuning(losses: dict[str, dict[str, float]], rows: list[dict[str, Any]]) -> str:
    """A line for each workload: AdamW's loss at each rate, the lowest in bold."""
    titles = {row["workload"]: row["title"] for row in rows}
    rates = sorted({rate for each in losses.values() for rate in each}, key=float)
    lines = ["| workload | " + " | ".join(rates) + " |", "| --- |" + " ---: |" * len(rates)]
    for workload, each in losses.items():
        best = min(each.values())
        cells = [f"{each[rate]:.4f}" if rate in each else "" for rate in rates]
        cells = [f"**{cell}**" if each.get(rate) == best else cell for rate, cell in zip(rates, cells, strict=True)]
        lines.append(f"| {titles[workload]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rewritten(page: str, made: dict[str, str]) -> str:
    """The page with the tables in it."""
    for name, table in made.items():
        head, marker, rest = page.partition(f"<!-- {name} -->\n")
        page = head + marker + table + rest[rest.index("<!-- end -->") :]
    return page


def main(arguments: list[str]) -> None:
    """Rewrite the page."""
    if arguments:
        shutil.copy(arguments[0], RECORD)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(rewritten(page, tables(json.loads(RECORD.read_text()))), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
