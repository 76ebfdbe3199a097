"""Write the table of reliability.md from what its tests measured.

    pytest tests/distributed/test_portable.py --junitxml report.xml && python docs/reliability_table.py report.xml

Rewrites what stands between `<!-- topologies -->` and `<!-- end -->`. A cell is the largest relative difference of a loss to
the uninterrupted run's; a combination that failed or was not run is missing, and the script says so.
"""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

PAGE = Path(__file__).parent / "reliability.md"
TEST = re.compile(r"test_every_optimizer_moves_to_every_topology\[(?P<name>\w+)-(?P<state>\w+)\]")


def main(report: Path) -> int:
    """Rewrite the page; 1 if a case of the report did not pass."""
    rows, failed = {}, []
    for case in ElementTree.parse(report).iter("testcase"):
        if match := TEST.fullmatch(case.get("name", "")):
            rows[match["name"], match["state"]] = {
                entry.get("name", ""): float(entry.get("value", "nan")) for entry in case.iter("property")
            }
            if any(case.iter("failure")) or any(case.iter("error")):
                failed.append(case.get("name"))
    text = PAGE.read_text(encoding="utf-8")
    made = re.sub(r"(<!-- topologies -->\n).*?(<!-- end -->)", lambda m: m[1] + table(rows) + m[2], text, flags=re.DOTALL)
    PAGE.write_text(made, encoding="utf-8")
    print(f"{len(rows)} rows; failed: {failed or 'none'}")
    return 1 if failed or not rows else 0


def table(rows: dict[tuple[str, str], dict[str, float]]) -> str:
    """Optimizer and state format down, topologies across."""
    topologies = list(next(iter(rows.values()), {}))
    lines = [
        "| optimizer | state | " + " | ".join(topologies) + " |",
        "|---|---|" + "---|" * len(topologies),
    ]
    for (name, state), found in rows.items():
        cells = [f"{found[t]:.0e}" if found.get(t) else ("exact" if t in found else "not passed") for t in topologies]
        lines.append(f"| {name} | {state} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
