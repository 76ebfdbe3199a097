"""Sections of the configuration and the one error that says everything that is wrong with one of them."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from ds_optforge.errors import ConfigError as ConfigError


class Section(BaseModel):
    """A JSON object with known keys only; numbers are numbers, not strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def refuse_key(cls, key: str) -> str:
        """Why ``key`` is not one of this section's."""
        return "unknown key"


M = TypeVar("M", bound=BaseModel)


def validate(
    model: type[M],
    values: Mapping[str, Any],
    path: str,
    paths: Mapping[str, str] | None = None,
    beside: Iterable[str] = (),
) -> M:
    """``model(**values)``, or a ConfigError whose lines start with ``path`` (``paths[key]`` where the key came from there).

    ``beside``: keys that are allowed at ``path`` too, and read by another model.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            origin = (paths or {}).get(str(detail["loc"][0]), path) if detail["loc"] else path
            where = _join(origin, [part for part in detail["loc"] if part != "[key]"])
            problems.append(problem(model, detail, where, beside if origin == path else ()))
        raise ConfigError("\n".join(dict.fromkeys(problems))) from None


def _join(path: str, location: Sequence[int | str]) -> str:
    for part in location:
        named = isinstance(part, str) and part.isprintable() and part
        path += f".{part}" if named else f"[{part!r}]"
    return path


def problem(model: type[BaseModel], detail: Any, where: str, beside: Iterable[str] = ()) -> str:
    """One of pydantic's error details as a line: where, what was found, what is allowed."""
    found = detail["input"]
    if detail["type"] == "extra_forbidden":
        owner = _model_at(model, detail["loc"])
        return f"{where}: {_unknown_key(owner, str(detail['loc'][-1]), beside)}"
    if detail["type"] == "missing" and isinstance(detail["loc"][-1], int):  # of a list that is too short
        return f"{where}: missing; allowed: a value"
    if detail["type"] == "missing":
        return f"{where}: missing; allowed: {_model_at(model, detail['loc']).model_fields[str(detail['loc'][-1])].description}"
    if detail["type"] == "value_error":  # of ours: about one field of the section, or about the value itself
        message = str(detail["ctx"]["error"])
        return f"{where}.{message}" if isinstance(found, Mapping) else f"{where}: {_got(found)}; allowed: {message}"
    allowed = detail["msg"].removeprefix("Input should be ").removeprefix("Input should ")
    return f"{where}: {_got(found)}; allowed: {allowed}"


def _got(found: Any) -> str:
    return f"got {found!r} ({type(found).__name__})"


def _model_at(model: type[BaseModel], location: Sequence[int | str]) -> Any:
    """The section that the last part of ``location`` is a key of."""
    inner: Any = model
    for part in location[:-1]:
        if isinstance(part, str):
            annotation = inner.model_fields[part].annotation
            inner = next(kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields"))
    return inner


def _unknown_key(owner: type[Section], key: str, beside: Iterable[str]) -> str:
    allowed = [*owner.model_fields, *beside]
    close = difflib.get_close_matches(key, allowed, n=1)
    return f"{owner.refuse_key(key)}; " + (f"did you mean '{close[0]}'? " if close else "") + f"allowed: {', '.join(allowed)}"


def refuse_auto(value: Any, path: str) -> None:
    """A framework fills "auto" before it builds an optimizer; one that is left is a mistake."""
    left = list(_autos(value, path))
    if left:
        raise ConfigError("\n".join(f'{where}: got "auto" that no framework filled; allowed: a value' for where in left))


def _autos(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _autos(inner, _join(path, [key]))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _autos(inner, f"{path}[{index}]")
    elif value == "auto" and not path.endswith((".orthogonalization.method", ".match")):
        yield path
