"""The errors that callers catch, in a module that needs neither torch nor pydantic: the command line imports it."""


class ConfigError(ValueError):
    """A configuration that cannot be used. The message has a line per problem: path, what was found, what is allowed."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read, or used by this run. Nothing was changed."""
