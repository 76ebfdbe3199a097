"""Files that somebody else may have written: read within limits of size, depth and numbers, and only inside their folder.

Every function raises ValueError with a reason, which callers put behind the name of the file. `SECURITY.md` says what is
promised.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

CONFIG_BYTES = 2**20  # of a configuration: JSON or YAML that people write
DATA_BYTES = 2**28  # of JSON that programs write, such as the manifest of a checkpoint
DEPTH = 64  # of lists and objects inside each other
DIGITS = 240  # of a whole number, in hexadecimal too: so that every one fits into a float
VALUES = 100_000  # of a YAML file, with what aliases repeat written out

_DEEP = f"is nested more than {DEPTH} levels deep"


def content(path: Path, limit: int = CONFIG_BYTES) -> bytes:
    """Return the bytes of a file that has ``limit`` of them at most, whatever size it pretends to have.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger.
    """
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        wanted = found.st_size if stat.S_ISREG(found.st_mode) else limit
        read = file.read(min(wanted, limit) + 1)
    if max(len(read), wanted) > limit:
        raise ValueError(f"has more than {limit} bytes")
    return read


def text(path: Path, limit: int = CONFIG_BYTES) -> str:
    """Return the text of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than ``limit`` bytes, or not UTF-8.
    """
    return content(path, limit).decode("utf-8")


def json_value(written: str | bytes) -> Any:
    """Return what JSON says. Raises ValueError for what is no JSON, is nested too deep, or has a number of too many digits."""
    try:
        value = json.loads(written, parse_int=_whole_number)
    except RecursionError:
        raise ValueError(_DEEP) from None
    refuse_deep(value)
    return value


def _whole_number(digits: str) -> int:
    _refuse_long(digits)
    return int(digits)


def _refuse_long(digits: str) -> None:
    if len(digits) > DIGITS:
        raise ValueError(f"has a number of {len(digits)} digits; allowed: {DIGITS}")


def refuse_deep(value: Any) -> None:
    """Raise ValueError for lists and dicts nested too deep; ``value`` is as JSON gives it, so nothing is in it twice."""
    level = [value]
    for _ in range(DEPTH + 1):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _values(outer)]
        if not level:
            return
    raise ValueError(_DEEP)


def _values(outer: dict[Any, Any] | list[Any]) -> Any:
    return outer.values() if isinstance(outer, dict) else outer


def yaml_node(loader: Any) -> Any:
    """Return the root of a YAML document; None for an empty one.

    Args:
        loader: a yaml.SafeLoader of the text.

    Raises:
        yaml.YAMLError: the text is no YAML.
        ValueError: it is nested too deep, has too many values or an alias that contains itself, or too long a number.
    """
    try:
        node = loader.get_single_node()
        if node is not None:
            _size(node, {})
    except RecursionError:
        raise ValueError(_DEEP) from None
    return node


def yaml_value(loader: Any, node: Any) -> Any:
    """Return what a node of `yaml_node` says; None for None. Raises ValueError where a tag and a value do not fit."""
    try:
        return None if node is None else loader.construct_document(node)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # PyYAML lets these through
        raise ValueError(f"has a value that is none of its tag ({type(error).__name__}: {error})") from None


def _size(node: Any, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """(values, levels) of a node, with what aliases repeat written out; ``known`` has those of nodes, None while inside one."""
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise ValueError(f"has an alias that contains itself (line {node.start_mark.line + 1})")
        return found
    known[id(node)] = None
    values, levels = 1, 0
    for inner in _inner(node):
        more, deep = _size(inner, known)
        values, levels = values + more, max(levels, deep)
    if values > VALUES:
        raise ValueError(f"has more than {VALUES} values, with what aliases repeat written out")
    if levels > DEPTH:
        raise ValueError(_DEEP)
    if node.tag == "tag:yaml.org,2002:int":
        _refuse_long(node.value)
    known[id(node)] = values, levels + 1
    return values, levels + 1


def _inner(node: Any) -> list[Any]:
    if isinstance(node.value, str):
        return []
    return [inner for entry in node.value for inner in (entry if isinstance(entry, tuple) else (entry,))]


def inside(folder: Path, name: str) -> Path:
    """Return ``folder / name``.

    Raises:
        ValueError: that leads out of the folder: by "..", as an absolute path, or by a link.
    """
    path = folder / name
    try:
        outside = not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        outside = True
    if outside:
        raise ValueError(f"leads out of {folder}")
    return path
