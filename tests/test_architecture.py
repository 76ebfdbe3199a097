"""The tree is the architecture: imports go one way, files keep to themselves, and only three know DeepSpeed's internals."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "ds_optforge"
FILES = sorted(path for path in ROOT.rglob("*.py"))

# From the ground up: a room imports from itself and from those before it. docs/architecture.md says what each is for.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("shipped_configs", "reading", "terminal", "validation", "orthogonalize", "zero"),
    ("rules",),
    ("state", "config"),
    ("routing",),
    ("step",),
    ("optimizer",),
    ("schedules",),
    ("checkpoint",),
    ("integrations", "forecast", "migrate"),
    ("experiments", "testing"),
    ("doctor",),
    ("cli",),
)
KNOWS_DEEPSPEED = ("zero/layout.py", "zero/engine.py", "zero/pipeline.py", "zero/shards.py")
# What anybody may know of DeepSpeed: `import deepspeed` for initialize, and where its accelerator is.
PUBLIC_DEEPSPEED = ("deepspeed", "deepspeed.accelerator")
PURE = ("rules", "orthogonalize")


def room(path: Path) -> str:
    """The folder or file directly below the package."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """(module, names, line) of everything that a file imports, inside functions too, but for type checking alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, (), node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; allowed: whole names"
            yield str(node.module), tuple(alias.name for alias in node.names), node.lineno


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def own_imports(path: Path) -> Iterator[tuple[str, int]]:
    """(module of the package, line): of a name that is a module, the module."""
    known = {module_of(other) for other in FILES}
    for module, names, line in imports(path):
        if module.partition(".")[0] == "ds_optforge":
            inside = [f"{module}.{name}" for name in names if f"{module}.{name}" in known]
            yield from ((found, line) for found in inside or [module])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_from_itself_and_from_floors_below(path: Path) -> None:
    floors = {name: number for number, names in enumerate(FLOORS) for name in names}
    if path.parent == ROOT and path.name in ("__init__.py", "__main__.py"):
        return  # the front doors
    own = room(path)
    assert own in floors, f"{own}: a room without a floor; allowed: one of FLOORS, and a line in docs/architecture.md"
    for module, line in own_imports(path):
        other = module.removeprefix("ds_optforge").removeprefix(".").partition(".")[0]
        assert other in ("", own) or floors[other] < floors[own], f"{path}:{line}: {own} may not import {module}"


def test_files_import_each_other_in_no_circle() -> None:
    """Imports inside functions included, but for the front door, which everything is behind."""
    graph = {module_of(path): {module for module, _ in own_imports(path)} - {"ds_optforge"} for path in FILES}
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for other in graph.get(module, ()):
                walk(other, (*way, module))
            done.add(module)

    for module in graph:
        walk(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_few_files_know_deepspeeds_internals(path: Path) -> None:
    if str(path.relative_to(ROOT)) in KNOWS_DEEPSPEED:
        return
    for module, _, line in imports(path):
        if module.partition(".")[0] == "deepspeed":
            assert module in PUBLIC_DEEPSPEED, f"{path}:{line}: {module}; allowed: in {' and '.join(KNOWS_DEEPSPEED)}"


@pytest.mark.parametrize("path", [path for path in FILES if room(path) in PURE], ids=lambda path: str(path.relative_to(ROOT)))
def test_rules_and_orthogonalization_are_tensor_math(path: Path) -> None:
    for module, names, line in imports(path):
        every = {module, *(f"{module}.{name}" for name in names)}
        assert not any(name.startswith(("torch.distributed", "deepspeed")) for name in every), f"{path}:{line}: {module}"


@pytest.mark.parametrize("path", [path for path in FILES if room(path) == "zero"], ids=lambda path: path.name)
def test_zero_is_the_ground(path: Path) -> None:
    assert all(module.startswith("ds_optforge.zero") for module, _ in own_imports(path))


@cache
def private_names(path: Path) -> frozenset[str]:
    """Functions, classes, attributes and fields that a file defines with one underscore in front."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return frozenset(name for name in found if name.startswith("_") and not name.startswith("__"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_reaches_into_the_private_parts_of_another(path: Path) -> None:
    """A name of ours with one underscore is used where it is defined."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    elsewhere = set().union(*(private_names(other) for other in FILES if other != path)) - private_names(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("ds_optforge"):
            taken = [alias.name for alias in node.names if alias.name.startswith("_") and alias.name != "__version__"]
            assert not taken, f"{path}:{node.lineno}: imports {taken}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in elsewhere, f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_no_file_is_longer_than_a_purpose() -> None:
    """And no function longer than a screen."""
    longest = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert max(longest.values()) <= 470, max(longest, key=lambda name: longest[name])
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 50, f"{path}:{node.lineno}: {node.name} has {lines} lines"


class TestThePage:
    """docs/architecture.md."""

    PAGE = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")

    def test_has_every_room_on_its_floor(self) -> None:
        listed = re.findall(r"^\| (\d+) \| `([\w/.]+)` \|", self.PAGE, flags=re.MULTILINE)
        found = {(int(floor), name.removesuffix("/").removesuffix(".py")) for floor, name in listed}
        expected = {(number, name) for number, names in enumerate(FLOORS, start=1) for name in names}
        assert found == expected

    def test_has_every_file_that_a_step_goes_through(self) -> None:
        files = {str(path.relative_to(ROOT)) for path in FILES if room(path) in ("zero", "step")}
        listed = set(re.findall(r"^\| `((?:zero|step)/\w+\.py)` \|", self.PAGE, flags=re.MULTILINE))
        assert listed == {name for name in files if not name.endswith("__init__.py")}

    def test_names_only_what_there_is(self) -> None:
        """Every class and function in its table of ranges is defined in the package."""
        table = self.PAGE.partition("## Ranges")[2].partition("## Glossary")[0]
        names = set(re.findall(r"`([A-Z]\w+)`", table))
        defined = {
            node.name
            for path in FILES
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ClassDef)
        }
        assert names <= defined
