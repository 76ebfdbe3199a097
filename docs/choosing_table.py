"""Write the tables of choosing.md from what benchmarks/choosing.py left.

    python docs/choosing_table.py                                     # from the results on record
    python docs/choosing_table.py runs/choosing/choosing.json         # puts these on record in data/choosing.json first

Rewrites what stands between `<!-- name -->` and `<!-- end -->`. A test fails when the committed page is stale.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "choosing.md"
RECORD = Path(__file__).parent / "data" / "choosing.json"


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Make the tables by name."""
    workloads = {row["workload"]: row["title"] for row in results["rows"]}
    return {
        "losses": "\n\n".join(losses(title, results, name) for name, title in workloads.items()) + "\n",
        "costs": costs(results["costs"]),
        "rates": "\n\n".join(rates(workloads[name], found) for name, found in results["tuning"].items()) + "\n",
    }


def losses(title: str, results: dict[str, Any], workload: str) -> str:
    """A line for each rule, the best first, with whether chance explains its distance to Muon."""
    lines = [
        f"**{title}**, {results['steps']} steps",
        "",
        "| rule | rate | validation loss | below Muon's by | |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for row in (row for row in results["rows"] if row["workload"] == workload):
        cells = [row["rule"], f"{row['rate']:g}", f"{row['loss']:.4f} ± {row['error']:.4f}", "", ""]
        if "gain" in row:
            cells[3:] = [f"{row['gain']:.4f}", verdict(row["gain"], row["threshold"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(gain: float, threshold: float) -> str:
    """Say what a difference to Muon's loss is, beside the one that chance exceeds in one case of twenty."""
    return "within noise" if abs(gain) <= threshold else "lower" if gain > 0 else "higher"


def costs(rows: list[dict[str, Any]]) -> str:
    """A line for each rule."""
    lines = [
        "| rule | time of a step, AdamW's: 1 | state, bytes per parameter | sent, MB a step and rank | TFLOPs, busiest rank |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        figures = [f"{row['over_adamw']:.1f}", f"{row['state_bytes']:.2f}", f"{row['sent_mb']:,.0f}", f"{row['tflops']:.1f}"]
        lines.append(f"| {' | '.join([row['rule'], *figures])} |")
    return "\n".join(lines) + "\n"


def rates(title: str, tuning: dict[str, dict[str, float]]) -> str:
    """A line for each rule: the rates that were tried, with their losses, the best in bold."""
    lines = [f"**{title}**", "", "| rule | rates and losses |", "| --- | --- |"]
    for rule, found in tuning.items():
        best = min(found, key=lambda rate: found[rate])
        cells = [f"{float(rate):g}: {loss:.3f}" for rate, loss in found.items()]
        cells = [f"**{cell}**" if rate == best else cell for rate, cell in zip(found, cells, strict=True)]
        lines.append(f"| {rule} | {', '.join(cells)} |")
    return "\n".join(lines)


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
