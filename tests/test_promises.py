"""Every promise to users is shown by a test, and docs/promises.md lists them all."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.promises import BY_SUBJECT, PROMISES

DOCS = Path(__file__).parents[1] / "docs"
GENERATOR: dict[str, Any] = runpy.run_path(str(DOCS / "promises_table.py"))
TESTS: dict[str, list[str]] = GENERATOR["tests_by_key"]()


def test_no_promise_is_without_a_test() -> None:
    assert [key for key in PROMISES if key not in TESTS] == []


def test_every_promise_that_a_test_names_is_one() -> None:
    assert {key: tests for key, tests in TESTS.items() if key not in PROMISES} == {}


def test_a_key_stands_for_one_promise_and_a_promise_is_a_sentence() -> None:
    assert sum(map(len, BY_SUBJECT.values())) == len(PROMISES) == len(set(PROMISES.values()))
    assert [promise for promise in PROMISES.values() if not promise.endswith(".")] == []


def test_the_page_is_what_the_script_makes() -> None:
    made = GENERATOR["page"](BY_SUBJECT, TESTS)
    assert (DOCS / "promises.md").read_text(encoding="utf-8") == made, "stale: run `python docs/promises_table.py`"


def test_every_marker_that_pytest_sees_is_on_the_page(request: pytest.FixtureRequest) -> None:
    """The script reads the files without pytest; a marker that it cannot read, such as one with an alias, would be missing."""
    for item in request.session.items:
        name = item.nodeid.partition("[")[0].partition("@")[0]  # pytest-xdist adds the group
        for marker in item.iter_markers("promise"):
            assert marker.args, f"{name}: a promise without its key"
            for key in marker.args:
                assert name in TESTS.get(key, []), f"{name}: {key}"
