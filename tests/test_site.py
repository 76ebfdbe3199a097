"""The documentation site: it is built without a warning, and its pages of errors and names are complete."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ds_optforge
from ds_optforge import rules

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
MESSAGES = [(section, text) for section in SECTIONS for text in re.findall(r"^### `(.+)`$", SECTIONS[section], re.MULTILINE)]
ENVIRONMENT = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
SOURCES = sorted((ROOT / "ds_optforge").rglob("*.py"))

LOADED = re.compile(r"<(?:script|img|link rel=\"(?:stylesheet|icon)\")[^>]*(?:src|href)=\"(https?:[^\"]+)")  # from elsewhere


def literals() -> Iterator[str]:
    """Every text of the package, with … for what is filled in."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


TEXTS = list(literals())


def errors() -> set[str]:
    """The names of all errors that the package defines."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(re.search("Error$", ast.unparse(base)) for base in node.bases):
                found.add(node.name)
    return found


def test_every_error_class_has_its_section() -> None:
    assert {"ConfigError", "CheckpointError", "LayoutError"} <= errors() <= set(SECTIONS)


@pytest.mark.parametrize(("section", "message"), MESSAGES)
def test_every_message_is_one_that_the_package_raises(section: str, message: str) -> None:
    pattern = re.escape(message).replace("…", ".*")
    assert message == section or any(re.search(pattern, text, re.DOTALL) for text in TEXTS), "no such text in ds_optforge/"


def test_every_public_name_is_on_the_page_of_the_interface() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: (\S+)", page, re.MULTILINE)
    for name in shown:
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
        assert inspect.getdoc(found), name
    last = {name.rpartition(".")[2] for name in shown}
    assert set(ds_optforge.__all__) <= last
    members = set(re.findall(r"\w+", " ".join(re.findall(r"members: \[(.*?)\]", page))))
    classes = {name for name in rules.__all__ if inspect.isclass(getattr(rules, name)) and name not in ("DecaySettings",)}
    assert classes <= last | members


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """mkdocs.yml is strict: dead links, dead anchors, pages outside the navigation and missing references fail."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    made, docs = tmp_path / "site", ROOT / "docs"
    pages = {path.relative_to(made).with_suffix("") for path in made.rglob("*.html")}
    assert pages - {Path("404")} == {path.relative_to(docs).with_suffix("") for path in docs.rglob("*.md")} | {
        Path("changelog"),
        Path("security"),
    }
    for page in made.rglob("*.html"):
        assert LOADED.findall(page.read_text(encoding="utf-8")) == [], page.name
