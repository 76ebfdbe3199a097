"""Lets DeepSpeed read a configuration, and says what it refuses and what it never looks at.

DeepSpeed reads most of its file by asking a dict for the keys that it knows. Which keys it knows is therefore not written down
here: the dict remembers what it was asked for.
"""

import copy
import difflib
import logging
from collections.abc import Iterator, KeysView, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ds_optforge.config.deepspeed_values import BATCH_SIZES

_MICRO = "train_micro_batch_size_per_gpu"
# Read by deepspeed.initialize and by zero.Init, once there are ranks.
_READ_ELSEWHERE = ("sequence_parallel_size", "data_parallel_size")


class Asked(dict[str, Any]):
    """A configuration that remembers for which keys it was asked."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({str(key): Asked(value) if isinstance(value, Mapping) else value for key, value in values.items()})
        self.asked: set[str] = set()
        self.whole = False  # whether somebody went through all keys, and so knows what to do with any

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, which counts as asked for."""
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        """A view that asks, too."""
        return KeysView(self)

    def __iter__(self) -> Iterator[str]:
        self.whole = True
        return super().__iter__()

    def items(self) -> Any:
        """All of it."""
        self.whole = True
        return super().items()

    def values(self) -> Any:
        """All of it."""
        self.whole = True
        return super().values()

    def __copy__(self) -> "Asked":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return {key: copy.deepcopy(value, memo) for key, value in self.items()}


def problems_of_reading(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each value that DeepSpeed refuses, then for each key that it would ignore.

    Args:
        config: a whole configuration without "auto"; its batch sizes are not looked at, as they depend on the ranks.
    """
    given = Asked({**{key: _without_params(key, value) for key, value in config.items() if key not in BATCH_SIZES}, _MICRO: 1})
    refused = _refused(given)
    if refused is not None:
        yield from _lines(config, refused)
        return
    given.asked.update(_READ_ELSEWHERE, BATCH_SIZES)
    yield from _ignored(given, "")


def _without_params(key: str, value: Any) -> Any:
    """What the "params" of the optimizer and the scheduler hold is for these to read."""
    return {**value, "params": {}} if key in ("optimizer", "scheduler") and isinstance(value, Mapping) else value


def _refused(config: dict[str, Any]) -> Exception | None:
    try:
        with _quiet():
            from deepspeed import DeepSpeedConfig

            DeepSpeedConfig(config)
    except Exception as error:  # DeepSpeed raises whatever its sections raise: assertions, KeyError, its own
        return error
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed tells of its import and of every reading."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _lines(config: Mapping[str, Any], refused: Exception) -> Iterator[str]:
    """Find the sections that are refused on their own: DeepSpeed's messages do not name them."""
    alone = {key: _refused({_MICRO: 1, key: value}) for key, value in config.items() if key not in BATCH_SIZES}
    at_fault = {key: error for key, error in alone.items() if error is not None}
    for key, error in at_fault.items():
        if isinstance(error, ValidationError):
            yield from (_detail(error.title, detail, key) for detail in error.errors())
        else:
            yield f"{key}: DeepSpeed refuses it ({_said(error)})"
    if not at_fault:
        yield f"DeepSpeed refuses the configuration: {_said(refused)}"


def _said(error: Exception) -> str:
    return str(error) if not isinstance(error, KeyError) else f"{error} is missing, or of another name"


def _detail(title: str, detail: Any, section: str) -> str:
    location = [str(part) for part in detail["loc"]]
    where = ".".join(location if location[:1] == [section] else [section, *location])
    if detail["type"] == "extra_forbidden":
        return _unknown(where, location[-1], _keys(title, location[:-1]))
    allowed = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if detail["type"] == "enum":  # in which DeepSpeed lists some values twice
        allowed = ", ".join(dict.fromkeys(allowed.replace(" or ", ", ").split(", ")))
    return f"{where}: got {detail['input']!r}; allowed: {allowed}"


def _keys(title: str, location: Sequence[str]) -> list[str]:
    """The keys of DeepSpeed's section of that name, or of one inside it: fields, and other names under which they are read."""
    of_deepspeed = (found for found in _subclasses(BaseModel) if found.__module__.startswith("deepspeed."))
    model = next((found for found in of_deepspeed if found.__name__ == title), None)
    for name in location:
        fields = [field for key, field in (model.model_fields if model else {}).items() if name in (key, field.alias)]
        kinds = [kind for field in fields for kind in (field.annotation, *get_args(field.annotation))]
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return [name for key, field in (model.model_fields if model else {}).items() for name in (key, field.alias) if name]


def _subclasses(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for subclass in model.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _ignored(section: Asked, path: str) -> Iterator[str]:
    """The keys that nobody asked for.

    A section that is switched off has none, nor one that was gone through as a whole; or that no Python code has asked for
    anything: a model of pydantic has read it, and would have refused an unknown key.
    """
    if not section.asked:
        return
    for key, value in dict.items(section):
        if key not in section.asked and not section.whole:
            shown = key if key.isprintable() and key else repr(key)
            yield _unknown(path + shown, key, sorted(section.asked))
        elif isinstance(value, Asked) and dict.get(value, "enabled") is not False:
            yield from _ignored(value, f"{path}{key}.")


def _unknown(where: str, key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"{where}: DeepSpeed knows no such key; " + (f"did you mean '{close[0]}'?" if close else "allowed: remove it")
