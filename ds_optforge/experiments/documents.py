"""YAML files, read safely; every problem is reported with its file, its line and its field."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ds_optforge import reading
from ds_optforge.errors import ConfigError
from ds_optforge.validation import problem

M = TypeVar("M", bound=BaseModel)
Location: TypeAlias = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """The safe loader, for which 1e-3 is a number as it is in YAML 1.2 (in 1.1, which PyYAML follows, it is text)."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


@dataclass(frozen=True, slots=True)
class Document:
    """The content of a YAML file, and the line of each of its values.

    Attributes:
        file: the path, as messages show it.
        content: the fields.
        lines: the line, from 1, by location: the keys and indices from the outside in.
    """

    file: str
    content: dict[str, Any]
    lines: Mapping[Location, int]

    @classmethod
    def read(cls, path: Path) -> "Document":
        """Read a file with the safe loader.

        Raises:
            ConfigError: the file cannot be read, is not YAML, is no mapping, or gives a key twice.
        """
        try:
            text = reading.text(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); allowed: a YAML file") from None
        try:
            loader = _Loader(text)
            node = reading.yaml_node(loader)
            if not isinstance(node, yaml.MappingNode):
                raise ConfigError(f"{path}:1: got {_kind(node)}; allowed: a mapping of fields")
            lines: dict[Location, int] = {}
            _walk(node, (), lines, str(path))
            content: dict[str, Any] = reading.yaml_value(loader, node)
        except yaml.YAMLError as error:
            raise ConfigError(_syntax(path, error)) from None
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{path}: {error}; allowed: a YAML file") from None
        return cls(str(path), content, lines)

    def at(self, *location: str | int) -> str:
        """Format a location as ``FILE:LINE: field``, with the line of its innermost value that the file has."""
        known = location
        while known and known not in self.lines:
            known = known[:-1]
        return f"{self.file}:{self.lines.get(known, 1)}: {_field(location)}"

    def section(self, model: type[M], value: Any, *location: str | int) -> M:
        """Validate the value at ``location`` as ``model``.

        Raises:
            ConfigError: the value is invalid; the message has a line per problem.
        """
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.at(*location)}: got {value!r}; allowed: a mapping of {', '.join(model.model_fields)}")
        try:
            return model.model_validate(dict(value))
        except ValidationError as error:
            raise ConfigError("\n".join(self._problem(model, detail, location) for detail in error.errors())) from None

    def _problem(self, model: type[BaseModel], detail: Any, location: Location) -> str:
        place = (*location, *(key for key in detail["loc"] if key != "[key]"))
        if detail["type"] == "value_error" and isinstance(detail["input"], Mapping):  # of ours: "field: what is wrong"
            name, _, message = str(detail["ctx"]["error"]).partition(": ")
            return f"{self.at(*place, name)}: {message}"
        return problem(model, detail, self.at(*place))

    def fail(self, message: str, *location: str | int) -> NoReturn:
        """Raise ConfigError about the value at ``location``."""
        raise ConfigError(f"{self.at(*location)}: {message}") from None


def _walk(node: yaml.Node, location: Location, lines: dict[Location, int], file: str) -> None:
    """Note the line of every value; refuse a key that is given twice, which PyYAML accepts."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            place = (*location, index)
            lines[place] = item.start_mark.line + 1
            _walk(item, place, lines, file)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                raise ConfigError(f"{file}:{line}: {_field(location)}: got the key {key.value!r}; allowed: text (quote it)")
            place = (*location, key.value)
            if place in lines:
                raise ConfigError(f"{file}:{line}: {_field(place)}: given twice, first on line {lines[place]}; allowed: once")
            lines[place] = line
            _walk(value, place, lines, file)


def _field(location: Location) -> str:
    text = ""
    for key in location:
        text += f"[{key}]" if isinstance(key, int) else f".{key}"
    return text.removeprefix(".") or "the file"


def _kind(node: yaml.Node | None) -> str:
    return "an empty file" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else f"{node.value!r}"


def _syntax(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = f":{mark.line + 1}" if mark else ""
    return f"{path}{line}: not YAML, or not the safe part of it ({getattr(error, 'problem', None) or error})"
