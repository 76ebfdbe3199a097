"""The list of slips that only ranks show (tests/rank_mutants.py runs them): each still fits the package and its tests.

What it costs to run them is too much for every change; that the list has not gone stale is known at once.
"""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from tests import rank_mutants

MUTANTS = rank_mutants.listed()
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.number}-{mutant.file}")
def test_the_text_occurs_once_and_the_mutated_file_compiles(mutant: rank_mutants.Mutant) -> None:
    assert mutant.original != mutant.mutated
    before = (ROOT / "ds_optforge" / mutant.file).read_text(encoding="utf-8")
    assert ast.dump(ast.parse(mutant.source())) != ast.dump(ast.parse(before))
    assert mutant.slip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.number}-{mutant.file}")
def test_its_tests_are_there(mutant: rank_mutants.Mutant) -> None:
    """By name; what is in brackets, only running them tells."""
    assert mutant.tests
    for test in mutant.tests:
        file, *names = re.sub(r"\[.*", "", test).split("::")
        tree: ast.AST = ast.parse((ROOT / "tests" / "distributed" / file).read_text(encoding="utf-8"))
        for name in names:
            found = [node for node in ast.iter_child_nodes(tree) if getattr(node, "name", "") == name]
            assert found, f"{test}: no {name}"
            tree = found[0]


def test_the_page_counts_them_by_room() -> None:
    """docs/reliability.md."""
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").partition("## Slips that only ranks show")[2]
    found = dict(re.findall(r"^\| `([\w/.]+)` \| (\d+) \|", page.partition("\n## ")[0], flags=re.MULTILINE))
    counted = Counter(mutant.room for mutant in MUTANTS)
    expected = {name if name.endswith(".py") else f"{name}/": str(count) for name, count in counted.items()}
    assert found == expected
    assert len(MUTANTS) >= 60


def test_it_is_chosen_by_number_or_by_a_part_of_its_file() -> None:
    assert [mutant.number for mutant in rank_mutants.chosen(MUTANTS, ["2", "5"])] == [2, 5]
    assert {mutant.file for mutant in rank_mutants.chosen(MUTANTS, ["gather"])} == {"zero/gather.py"}
    assert rank_mutants.chosen(MUTANTS, []) == MUTANTS
