"""Write promises.md: what is promised to users, each with the tests that show it.

    python docs/promises_table.py

The promises are in tests/promises.py; a test names those that it shows, `@pytest.mark.promise("key", ...)` on the function,
on its class or, for a whole module, in `pytestmark`. tests/test_promises.py fails when the committed page is stale.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "promises.md"
HEAD = """\
# Promises

What users may rely on, and for each promise the tests that show it; `pytest` takes their names. Written by
`python docs/promises_table.py` from tests/promises.py and the markers of the tests.
"""


def keys_in(expression: ast.expr) -> list[str]:
    """The keys of `pytest.mark.promise("key", ...)`, alone or in a list; none for any other expression."""
    if isinstance(expression, ast.List | ast.Tuple):
        return [key for element in expression.elts for key in keys_in(element)]
    if not isinstance(expression, ast.Call) or ast.unparse(expression.func) != "pytest.mark.promise":
        return []
    return [str(ast.literal_eval(argument)) for argument in expression.args]


def marked(body: list[ast.stmt], name: str, around: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs of (key, test) in the body of a module or class, which has this name and these keys itself."""
    for statement in body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "pytestmark":
            around = around + keys_in(statement.value)
    for statement in body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            own = [*around, *(key for decorator in statement.decorator_list for key in keys_in(decorator))]
            inner = f"{name}::{statement.name}"
            if isinstance(statement, ast.ClassDef) and statement.name.startswith("Test"):
                yield from marked(statement.body, inner, own)
            elif statement.name.startswith("test"):
                yield from ((key, inner) for key in dict.fromkeys(own))


def tests_by_key() -> dict[str, list[str]]:
    """The tests that show each promise, as pytest names them, in the order of the files."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        name = path.relative_to(ROOT).as_posix()
        for key, test in marked(ast.parse(path.read_text(encoding="utf-8")).body, name, []):
            found.setdefault(key, []).append(test)
    return found


def page(by_subject: dict[str, dict[str, str]], tests: dict[str, list[str]]) -> str:
    """A heading per subject, a bullet per promise, its tests below it."""
    lines = [HEAD]
    for subject, promises in by_subject.items():
        lines += [f"## {subject}", ""]
        for key, promise in promises.items():
            lines += [f"- {promise}", *(f"  - `{test}`" for test in tests.get(key, []))]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tests.promises import BY_SUBJECT

    PAGE.write_text(page(BY_SUBJECT, tests_by_key()), encoding="utf-8")
