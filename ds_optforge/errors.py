"""The errors that callers catch. This file imports neither torch nor pydantic, since the command line needs neither."""


class ConfigError(ValueError):
    """A configuration that cannot be used. The message has a line per problem: path, what was found, what is allowed."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read, or used by this run. Nothing was changed when it is raised."""
