"""The errors that callers catch. This file imports neither torch nor pydantic, since the command line needs neither."""

from collections.abc import Collection
from difflib import get_close_matches


class ConfigError(ValueError):
    """A configuration that cannot be used. The message has a line per problem: path, what was found, what is allowed."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read, or used by this run. Nothing was changed when it is raised."""


def did_you_mean(name: str, known: Collection[str], cutoff: float = 0.7) -> str:
    """Return "did you mean ...? ", for a message, where one of the ``known`` names is close; else nothing.

    Args:
        name: what was found.
        known: what is allowed.
        cutoff: how alike the two have to be, from 0 to 1.
    """
    close = get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean '{close[0]}'? " if close else ""
