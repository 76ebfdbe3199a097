"""Matches overrides with parameter names, and looks through the prefixes that wrappers of a model put before them."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from ds_optforge.config.sections import Override
from ds_optforge.errors import ConfigError

# DDP's and an engine's, PEFT's.
_WRAPPERS = ("module.", "base_model.model.")
_NEAR = 3  # names in a message


class ParameterNames:
    """The names of all parameters of a model, as overrides match them.

    ``module.`` and ``base_model.model.`` are taken for a wrapper's where every name begins with them, since a model may have a
    submodule of its own that is called ``module``. torch.compile's ``_orig_mod.`` may stand anywhere, before a compiled layer.

    Args:
        names: qualified, of all parameters.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)
        self._prefix = ""
        while prefix := next((wrapper for wrapper in _WRAPPERS if self._all_begin(self._prefix + wrapper)), ""):
            self._prefix += prefix

    def _all_begin(self, prefix: str) -> bool:
        return bool(self._names) and all(_plain(name).startswith(prefix) for name in self._names)

    def _inner(self, name: str) -> str:
        return _plain(name).removeprefix(self._prefix)

    def matched(self, name: str, overrides: Sequence[Override]) -> list[int]:
        """Return the indices of the overrides that match ``name`` as it is, or as it is without a wrapper."""
        inner = self._inner(name)
        return [
            i for i, override in enumerate(overrides) if re.search(override.match, name) or re.search(override.match, inner)
        ]

    def refuse_unmatched(self, overrides: Sequence[Override], path: str = "optimizer.params") -> None:
        """Refuse an override that matches no parameter. Where ranks have different parameters, give it the names of all.

        Args:
            overrides: of the configuration.
            path: of the section that they are in.

        Raises:
            ConfigError: such an override; the message has its pattern and the names that come nearest.
        """
        used = {index for name in self._names for index in self.matched(name, overrides)} if overrides else set()
        problems = [
            f"{path}.overrides[{index}].match: '{override.match}' matches no parameter; nearest: "
            f"{', '.join(self._near(override.match))}; allowed: a regular expression that is found in a name "
            "(ds_optforge.explain lists them)"
            for index, override in enumerate(overrides)
            if index not in used
        ]
        if problems:
            raise ConfigError("\n".join(problems))

    def _near(self, pattern: str) -> list[str]:
        """Return the names with a part that resembles the pattern, or else the first names."""
        plain = re.sub(r"[^\w.]", "", pattern.replace(r"\d", "0")).strip(".")
        length = plain.count(".") + 1
        places: dict[str, str] = {}
        for name in map(self._inner, self._names):
            parts = name.split(".")
            for start in range(max(len(parts) - length + 1, 1)):
                places.setdefault(".".join(parts[start : start + length]), name)
        near = get_close_matches(plain, places, n=_NEAR)
        return list(dict.fromkeys(places[part] for part in near)) or list(map(self._inner, self._names[:_NEAR]))


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")
