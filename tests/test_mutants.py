"""What `make mutants` changes in a file, and the list of what changes nothing."""

import json
from pathlib import Path

from tests.mutants import mutants_of

ROOT = Path(__file__).parents[1]
EQUIVALENT = ROOT / "tests" / "data" / "equivalent_mutants.json"

FILE = '''"""A text, 1."""

LIMIT = 3
__all__ = ["LIMIT"]


class Section:
    bound: int = Field(2, ge=-1, description="never 4 > 3")

    @property
    def share(self) -> float:
        """Half: 0.5."""
        if self.bound < 2 and self.bound:
            raise ValueError(f"got {1 + 1}")
        logger.info("said", 1)
        return 0.5 * self.bound
'''


def test_the_mutants_of_a_file(tmp_path: Path) -> None:
    """Of texts, log lines, decorators and what an error says there is none."""
    path = tmp_path / "file.py"
    path.write_text(FILE)
    found = mutants_of(path, tmp_path)
    assert {mutant.function for mutant in found} == {"", "Section.share"}
    field = 'bound: int = Field({}, ge={}, description="never 4 > 3")'
    test = "if {}:"
    assert sorted(mutant.mutated for mutant in found) == sorted(
        [
            *("LIMIT = 4", "LIMIT = 2"),
            *(field.format(3, -1), field.format(1, -1), field.format(2, "(1)").replace("(1)", "1")),
            *(test.format("(not (self.bound < 2 and self.bound))"), test.format("(self.bound < 2 or self.bound)")),
            *(test.format("(self.bound)"), test.format("(self.bound < 2)"), test.format("(self.bound <= 2) and self.bound")),
            *(test.format("self.bound < 3 and self.bound"), test.format("self.bound < 1 and self.bound")),
            "pass",
            *("return None", "return (0.5 / self.bound)", "return 0.505 * self.bound"),
        ]
    )


def test_a_mutant_is_the_file_with_one_change(tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_text("def f(a, b=1):\n    return a + b\n")
    sources = {mutant.mutated: (mutant.function, mutant.source) for mutant in mutants_of(path, tmp_path)}
    assert sources == {
        "def f(a, b=2):": ("", "def f(a, b=2):\n    return a + b\n"),
        "def f(a, b=0):": ("", "def f(a, b=0):\n    return a + b\n"),
        "return None": ("f", "def f(a, b=1):\n    return None\n"),
        "return (a - b)": ("f", "def f(a, b=1):\n    return (a - b)\n"),
    }


def test_every_equivalent_mutant_is_one_and_has_its_reason() -> None:
    """One whose code has changed is to be looked at again."""
    for entry in json.loads(EQUIVALENT.read_text(encoding="utf-8")):
        keys = {mutant.key for mutant in mutants_of(ROOT / entry["file"], ROOT)}
        assert (entry["file"], entry["function"], entry["original"], entry["mutated"]) in keys, entry
        assert len(entry["reason"].split()) >= 4, entry
