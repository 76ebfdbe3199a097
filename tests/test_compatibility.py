"""docs/compatibility.md says what the tests' markers say, and every row of it has a test."""

import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.compatibility import BY_SUBJECT, COLUMNS, ROWS

DOCS = Path(__file__).parents[1] / "docs"
SCRIPT = DOCS / "compatibility_table.py"
GENERATOR: dict[str, Any] = runpy.run_path(str(SCRIPT))
STALE = "stale: run `python docs/compatibility_table.py`"


@cache
def made() -> str:
    """The page, from the markers as another pytest collects them: this one may run a choice of tests."""
    process = subprocess.run([sys.executable, str(SCRIPT), "--print"], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout.partition("\0")[2]


def test_the_page_is_what_the_script_makes() -> None:
    assert (DOCS / "compatibility.md").read_text(encoding="utf-8") == made(), STALE


def test_no_row_is_without_a_test() -> None:
    assert [row for row in ROWS.values() if f"| {row} | " not in made()] == []


def test_a_key_stands_for_one_row() -> None:
    assert sum(map(len, BY_SUBJECT.values())) == len(ROWS) == len(set(ROWS.values()))


def test_measured_errors_are_of_cells_and_exact_ones() -> None:
    """1e-5: the tolerance of the tests that measure them."""
    errors = GENERATOR["errors_of_record"]()
    assert [cell for cell in errors if cell[0] not in ROWS or cell[1] not in COLUMNS] == []
    assert [cell for cell, found in errors.items() if not max(found.values()) <= 1e-5] == []


def test_a_changed_verdict_would_be_noticed() -> None:
    row = next(iter(ROWS))
    pages = {verdict: GENERATOR["page"]({(row, 2): verdict}, {}) for verdict in ("exact", "refused")}
    assert pages["exact"].replace(" exact |", " refused |") == pages["refused"] != pages["exact"]


def test_an_error_stands_beside_the_control() -> None:
    cell = (next(iter(ROWS)), 2)
    assert "| exact (2e-06, AdamW 0) |" in GENERATOR["page"]({cell: "exact"}, {cell: {"muon": 2.1e-6, "adamw": 0.0}})


@pytest.mark.parametrize(
    "mark",
    [
        pytest.mark.compatibility("no such row", stages=(2,), verdict="exact"),
        pytest.mark.compatibility("data", stages=(4,), verdict="exact"),
        pytest.mark.compatibility("data", stages=(2,), verdict="fine"),
        pytest.mark.compatibility("data", verdict="exact"),
    ],
    ids=["row", "stage", "verdict", "no stage"],
)
def test_a_marker_that_names_no_cell_is_an_error(mark: pytest.MarkDecorator, request: pytest.FixtureRequest) -> None:
    item = pytest.Function.from_parent(request.node.parent, name="marked", callobj=lambda: None)
    item.add_marker(mark)
    with pytest.raises(ValueError, match=r"marked: compatibility\("):
        GENERATOR["cells_of"](item)
