"""Reads JSON and YAML files, and single values from them, with errors that name the file and the key."""

import difflib
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ds_optforge import reading
from ds_optforge.errors import ConfigError, did_you_mean
from ds_optforge.migrate.source import AUTO, Given


def load(path: Path) -> dict[str, Any]:
    """Return the object that a JSON or YAML file holds.

    Raises:
        ConfigError: a file that cannot be read, or holds something else; or YAML without PyYAML.
    """
    try:
        text = reading.text(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; allowed: a JSON or YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not text; allowed: a JSON or YAML file") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; allowed: a JSON or YAML file") from None
    loaded = _json(path, text) if path.suffix == ".json" or text.lstrip().startswith("{") else _yaml(path, text)
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ConfigError(f"{path}: got a {type(loaded).__name__}; allowed: an object with names as keys")
    return loaded


def _json(path: Path, text: str) -> Any:
    try:
        return reading.json_value(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); allowed: a JSON object, or YAML in a file of another ending") from None


def _yaml(path: Path, text: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError:
        raise ConfigError(f"{path}: YAML needs PyYAML; run: pip install 'ds-optforge[experiments]'") from None
    try:
        loader = yaml.SafeLoader(text)
        return reading.yaml_value(loader, reading.yaml_node(loader))
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())}); allowed: a YAML mapping") from None


def find(named: str, beside: Path) -> Path:
    """Return the file that ``beside`` names: from the current folder, as launchers do, or from the folder of ``beside``.

    Raises:
        ConfigError: neither has it.
    """
    for path in (Path(named), beside.parent / named):
        if path.is_file():
            return path
    raise ConfigError(f"{beside}: names '{named}', which is neither in the current folder nor beside it; allowed: a file")


class Fields:
    """A section of a file, whose values are read with their type and their origin.

    Args:
        values: the section.
        file: in which it is, for messages.
        path: of the section in the file, with a dot at the end; "" for the whole file.
        default_of: whose defaults stand in for what it does not say.
    """

    def __init__(self, values: Mapping[str, Any], file: Path, path: str = "", default_of: str = "DeepSpeed") -> None:
        self.values, self.file, self.path, self._default_of = values, file, path, default_of

    def refuse(self, key: str, allowed: str, hint: str = "") -> ConfigError:
        """Return the error about the value of a key."""
        return ConfigError(f"{self.file}: {self.path}{key}: got {self.values.get(key)!r}; {hint}allowed: {allowed}")

    def refuse_near_misses(self, read: Collection[str], others: Collection[str]) -> None:
        """Refuse keys that are almost one of those that are ``read``, in a file that may hold any keys beside them.

        Args:
            read: keys that count.
            others: keys that are something else, however alike.

        Raises:
            ConfigError: the first such key.
        """
        for key in self.values:
            close = [] if key in read or key in others else difflib.get_close_matches(key, read, n=1, cutoff=0.9)
            if close:
                raise ConfigError(
                    f"{self.file}: {self.path}{key}: unknown key; did you mean '{close[0]}'? allowed: that, or none"
                )

    def refuse_unknown(self, known: Collection[str]) -> None:
        """Refuse keys that are not known.

        Raises:
            ConfigError: the first such key, with the one that it resembles.
        """
        for key in self.values:
            if key not in known:
                listed = ", ".join(sorted(known))
                raise ConfigError(f"{self.file}: {self.path}{key}: unknown key; {did_you_mean(key, known)}allowed: {listed}")

    def section(self, key: str) -> dict[str, Any]:
        """Return an object inside the section; an empty one where there is none.

        Raises:
            ConfigError: something else.
        """
        found = self.values.get(key)
        if found is None:
            return {}
        if not isinstance(found, dict):
            raise self.refuse(key, "an object")
        return found

    def _given(self, key: str, default: Any) -> Given:
        if self.values.get(key) is None:
            return Given(default, f"the default of {self._default_of}")
        return Given(self.values[key], f"{self.path}{key}")

    def number(self, key: str, default: Any, auto: bool = False, low: float = 0.0) -> Given:
        """Return a finite number of at least ``low``; "auto" where ``auto`` allows it.

        YAML reads 1e-5 as a string; it counts as the number that frameworks make of it.

        Raises:
            ConfigError: anything else.
        """
        found = self._given(key, default)
        if found.value is default or (auto and found.value == AUTO):
            return found
        number = _number(found.value)
        if number is None or number < low:
            raise self.refuse(key, f"a number of at least {low:g}" + (f', or "{AUTO}"' if auto else ""))
        return found._replace(value=number)

    def pair(self, key: str, default: tuple[float, float], auto: bool = False) -> Given:
        """Return two numbers of at least 0 and below 1, as a list.

        Raises:
            ConfigError: anything else.
        """
        found = self._given(key, list(default))
        if auto and found.value == AUTO:
            return found
        numbers = [_number(value) for value in found.value] if isinstance(found.value, list | tuple) else []
        if len(numbers) != 2 or not all(number is not None and 0 <= number < 1 for number in numbers):
            raise self.refuse(key, "a list of two numbers from 0 to 1")
        return found._replace(value=numbers)

    def choice(self, key: str, default: str, allowed: Collection[str]) -> Given:
        """Return one of the ``allowed`` strings.

        Raises:
            ConfigError: anything else, with what it resembles.
        """
        found = self._given(key, default)
        if found.value not in allowed:
            raise self.refuse(key, f"{', '.join(allowed)}", did_you_mean(str(found.value), allowed))
        return found

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false.

        Raises:
            ConfigError: anything else.
        """
        found = self._given(key, default).value
        if not isinstance(found, bool):
            raise self.refuse(key, "true, false")
        return found


def _number(value: Any) -> float | int | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None
