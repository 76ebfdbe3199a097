"""Write compatibility.md: what OptForge can be combined with, stage by stage, from the markers of the tests.

    python docs/compatibility_table.py                                      # the verdicts, beside the errors that are on record
    pytest -m 'compatibility and not frameworks' --junitxml report.xml      # measures the errors
    python docs/compatibility_table.py report.xml                           # puts them on record in data/compatibility.json

Rows are in tests/compatibility.py. tests/test_compatibility.py fails when the committed page is stale.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
RECORD = ROOT / "docs" / "data" / "compatibility.json"
sys.path.insert(0, str(ROOT))

from tests.compatibility import BY_SUBJECT, COLUMNS, ROWS, VERDICTS  # noqa: E402 - needs the path above

HEAD = """\
# Compatibility

What OptForge can be combined with, by ZeRO stage; the last column is CPU offload of the optimizer. Every cell comes from tests.

- **exact**: a test compares whole parameters after some steps on several ranks with the same training in one process, without
  DeepSpeed, which takes the ranks' gradients in turn (and rounds them where the feature does). Two numbers are measured: the
  largest relative error of a parameter with Muon in float32, and the same with torch.optim.AdamW, which shows what the
  combination itself costs. At 0 not a bit differs. Where ranks add up gradients in another order, 1e-7 to 1e-5 is no error.
  A cell without numbers is tested as exact in another way, mostly against a run without the feature.
- **refused**: `ds_optforge.initialize`, `ds-optforge check` and, where only `register` is called, the first step at the latest
  end with an error that names the setting and the way out. Nothing has been trained by then.
- **not testable here**: needs a GPU, which the machine of these tests lacks.
- With `register` alone nobody but DeepSpeed reads the file. What the first step cannot see then, and what changes nothing in
  the training (a test of each): unknown keys at the top level, `hybrid_engine`, `checkpoint.load_universal`,
  `elastic_checkpoint`, `data_parallel_size` without sequence parallelism, and `super_offload` and quantization on ZeRO-1 and 2,
  where DeepSpeed ignores them. DeepCompile is not seen either, and could not be tried: DeepSpeed does not build it on a CPU.
  `ds-optforge check` sees all of them.
- An empty cell: DeepSpeed does not have the combination, or no test has tried it.

Written by `python docs/compatibility_table.py` from tests/compatibility.py and the markers of the tests; the numbers are of
`pytest -m 'compatibility and not frameworks' --junitxml report.xml && python docs/compatibility_table.py report.xml`.
"""

Cell = tuple[str, int | str]  # row, column
Errors = dict[Cell, dict[str, float]]


def cells_of(item: pytest.Item) -> dict[Cell, str]:
    """The verdict of each cell that a test's markers name. Raises ValueError for a marker that says nothing of use."""
    found: dict[Cell, str] = {}
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    for marker in item.iter_markers("compatibility"):
        stages = marker.kwargs.get("stages", (parameters["stage"],) if "stage" in parameters else ())
        verdict = marker.kwargs.get("verdict")
        unknown = [*(row for row in marker.args if row not in ROWS), *(stage for stage in stages if stage not in COLUMNS)]
        if unknown or not marker.args or not stages or verdict not in VERDICTS:
            raise ValueError(
                f"{item.nodeid}: compatibility{marker.args} {marker.kwargs}; allowed: rows of tests/compatibility.py, stages= "
                f"of {COLUMNS} (or the test's parameter 'stage'), verdict= one of {VERDICTS}"
            )
        found |= {(row, stage): verdict for row in marker.args for stage in stages}
    return found


class Collector:
    """A plugin of pytest that reads the markers of all tests that it collects."""

    def __init__(self) -> None:
        self.verdicts: dict[Cell, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for cell, verdict in cells_of(item).items():
                if self.verdicts.setdefault(cell, verdict) != verdict:
                    raise ValueError(f"{item.nodeid}: {cell} is '{verdict}', and '{self.verdicts[cell]}' by another test")


def collected() -> dict[Cell, str]:
    """The verdict of every cell that the tests name."""
    paths = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.compatibility" in path.read_text("utf-8")]
    collector = Collector()
    options = ["--collect-only", "-qq", "-m", "compatibility", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    status = pytest.main([*options, *map(str, paths)], plugins=[collector])
    if status != pytest.ExitCode.OK:
        raise SystemExit(f"the tests could not be collected: {status!r}")
    return collector.verdicts


def errors_of_record() -> Errors:
    """What was measured, by cell."""
    record = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else []
    return {(entry["row"], entry["stage"]): {"muon": entry["muon"], "adamw": entry["adamw"]} for entry in record}


def errors_of_report(report: Path) -> Errors:
    """The largest errors per cell among the tests of a report, which all have passed."""
    found: Errors = {}
    for case in ElementTree.parse(report).iter("testcase"):
        if any(case.iter("failure")) or any(case.iter("error")):
            raise SystemExit(f"{case.get('classname')}::{case.get('name')}: failed; allowed: a report without failures")
        for entry in case.iter("property"):
            if entry.get("name") == "compatibility":
                measured = json.loads(entry.get("value", ""))
                cell = (measured["row"], measured["stage"])
                before = found.get(cell, measured)
                found[cell] = {name: max(measured[name], before[name]) for name in ("muon", "adamw")}
    return found


def put_on_record(errors: Errors) -> None:
    """Write the errors, in the order of the page."""
    order = [(row, column) for row in ROWS for column in COLUMNS]
    entries = [{"row": row, "stage": stage, **errors[row, stage]} for row, stage in order if (row, stage) in errors]
    RECORD.write_text("[\n" + ",\n".join("  " + json.dumps(entry) for entry in entries) + "\n]\n", encoding="utf-8")


def page(verdicts: Mapping[Cell, str], errors: Mapping[Cell, Mapping[str, float]]) -> str:
    """A heading and a table per subject; rows without a cell are left out."""
    lines = [HEAD]
    for subject, rows in BY_SUBJECT.items():
        kept = {key: name for key, name in rows.items() if any((key, column) in verdicts for column in COLUMNS)}
        heads = [f"ZeRO-{column}" if isinstance(column, int) else f"+ {column}" for column in COLUMNS]
        lines += [f"## {subject}", "", "| | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(COLUMNS)]
        for key, name in kept.items():
            lines.append(f"| {name} | " + " | ".join(cell_text((key, column), verdicts, errors) for column in COLUMNS) + " |")
        lines.append("")
    return "\n".join(lines)


def cell_text(cell: Cell, verdicts: Mapping[Cell, str], errors: Mapping[Cell, Mapping[str, float]]) -> str:
    """The verdict, and Muon's and AdamW's error where they were measured."""
    verdict = verdicts.get(cell, "")
    measured = errors.get(cell) if verdict == "exact" else None
    if not measured:
        return verdict
    shown = {name: f"{error:.0e}" if error else "0" for name, error in measured.items()}
    return f"exact ({shown['muon']}, AdamW {shown['adamw']})"


def main(arguments: Sequence[str]) -> Any:
    """Write the page, or with ``--print`` show it; a report's errors go on record first."""
    verdicts = collected()
    if arguments and arguments[0] != "--print":
        errors = errors_of_record() | errors_of_report(Path(arguments[0]))  # of some of the tests, perhaps
        put_on_record({cell: error for cell, error in errors.items() if cell in verdicts})
    made = page(verdicts, errors_of_record())
    if "--print" in arguments:
        sys.stdout.write("\0" + made)
    else:
        PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
