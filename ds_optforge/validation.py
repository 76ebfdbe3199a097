"""Sections of the configuration, and their validation by one error that lists every problem."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from ds_optforge.errors import ConfigError, did_you_mean


class Section(BaseModel):
    """Base of the models of JSON objects: it allows known keys only, and no strings for numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def refuse_key(cls, key: str) -> str:
        """Say why ``key`` is not one of this section's keys."""
        return "unknown key"


M = TypeVar("M", bound=BaseModel)


def validate(
    model: type[M],
    values: Mapping[str, Any],
    path: str,
    paths: Mapping[str, str] | None = None,
    beside: Iterable[str] = (),
) -> M:
    """Make ``model(**values)``.

    Args:
        model: of the section.
        values: the section, as read from JSON.
        path: of the section, for messages.
        paths: by key, the path of a value that came from another section.
        beside: keys that another model reads at ``path``, to be named in messages.

    Raises:
        ConfigError: bad values; the message has a line per problem.
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
    """Turn one of pydantic's error details into a line: the path, what was found, what is allowed.

    Args:
        model: that was validated.
        detail: an entry of ``ValidationError.errors()``.
        where: path of the value.
        beside: keys that another model reads at the same path.
    """
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
    return f"{where}: {_got(found)}; allowed: {_allowed(detail)}"


# In our words, by pydantic's name of the problem, with what pydantic says of it filled in.
_WORDS = {
    "too_short": "{min_length} or more entries",
    "too_long": "{max_length} entries at most",
    "string_too_short": "a text",
    "dict_type": "an object",
    "model_type": "an object",
    "list_type": "a list",
    "tuple_type": "a list",
    "bool_type": "true or false",
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
}


def _allowed(detail: Any) -> str:
    words = _WORDS.get(detail["type"])
    if words:
        return words.format(**detail.get("ctx", {}))
    message: str = detail["msg"]
    return message.removeprefix("Input should be ").removeprefix("Input should ")


def _got(found: Any) -> str:
    return f"got {found!r} ({type(found).__name__})"


def _model_at(model: type[BaseModel], location: Sequence[int | str]) -> Any:
    """Return the section of which the last entry of ``location`` is a key."""
    inner: Any = model
    for part in location[:-1]:
        if isinstance(part, str):
            annotation = inner.model_fields[part].annotation
            inner = next(kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields"))
    return inner


def _unknown_key(owner: type[Section], key: str, beside: Iterable[str]) -> str:
    allowed = [*owner.model_fields, *beside]
    return f"{owner.refuse_key(key)}; {did_you_mean(key, allowed, 0.6)}allowed: {', '.join(allowed)}"


def refuse_auto(value: Any, path: str) -> None:
    """Refuse values "auto", which a framework fills before it builds an optimizer.

    Args:
        value: a section, or a value in it.
        path: of the value, for messages.

    Raises:
        ConfigError: any "auto" that is left, except where it is a valid value; the message has a line for each.
    """
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
    elif value == "auto" and not path.endswith((".orthogonalization.method", ".match", ".split", ".heads")):
        yield path
