"""The manifest of a portable checkpoint, its checksums, and the folder that it lies in."""

import fcntl
import hashlib
import json
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import ConfigDict, Field

from ds_optforge import reading
from ds_optforge.errors import CheckpointError, ConfigError
from ds_optforge.validation import Section, validate

MANIFEST = "checkpoint.json"
INCOMPLETE = ".incomplete"  # what a save in progress, or one that was killed, is called
VERSION = 1

_LOCK = "writer.lock"
_READ_BYTES = 2**22
_DIMENSIONS = 64  # torch has tensors of no more

Count: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]


class _Entry(Section):
    """An object of the manifest: a later version may add keys to it."""

    model_config = ConfigDict(extra="allow")


class _File(_Entry):
    bytes: Count = Field(description="the size of the file")
    sha256: str = Field(description="the SHA-256 of the file")


class _Group(_Entry):
    rule: str = Field(description="the name of a rule")
    step: Count = Field(description="the steps that were taken")
    scalars: dict[str, float] = Field(description="numbers of the state, by name")
    hyperparameters: dict[str, Any] = Field(description="values of the parameter group, by name")
    members: list[str] = Field(description="names of parameters")


class _Manifest(_Entry):
    """What every manifest has, whichever data belong to it."""

    files: dict[str, _File] = Field(description="files by name")
    shapes: dict[str, Annotated[list[Count], Field(max_length=_DIMENSIONS)]] = Field(description="shapes by name")
    groups: dict[str, _Group] = Field(description="parameter groups by name")
    block_cuts: dict[str, list[Count]] = Field(description="cuts by name")
    counters: dict[str, Count] = Field(description="counts by name")
    loss_scale: dict[str, float] = Field(description="numbers by name")
    scheduler: dict[str, Any] | None = Field(description="the state of a scheduler, or null")
    client_state: dict[str, Any] = Field(description="an object")


class WriterLock:
    """Held by the process that writes a checkpoint, for as long as that process lives and no longer."""

    def __init__(self, temporary: Path) -> None:
        """Take the lock of a folder that a checkpoint is written into, and remove what a killed job left there.

        Raises:
            BlockingIOError: another job has it.
        """
        path = temporary / _LOCK
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._close = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{temporary}: another job is writing it now; allowed: a folder for each job") from None
        except OSError:  # a file system without locks
            pass
        for left in temporary.iterdir():
            if left != path:
                left.unlink()

    def release(self, folder: Path) -> None:
        """Give the lock back once the checkpoint is in ``folder``. After the rename: before it, another job would begin."""
        (folder / _LOCK).unlink()
        self._close()


def incomplete(folder: Path) -> Path:
    """The folder that a checkpoint is written into before it is complete."""
    return folder.with_name(folder.name + INCOMPLETE)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, where the file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def digest_of(manifest: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest without its own checksum, in hexadecimal."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write plain data, with the version of the format and a checksum of itself."""
    manifest = {"version": VERSION, **json.loads(json.dumps(manifest))}
    written = json.dumps({**manifest, "sha256": digest_of(manifest)}, indent=1).encode()
    if len(written) > reading.DATA_BYTES:
        raise OSError(f"{path}: would have {len(written)} bytes; allowed: {reading.DATA_BYTES} (is the client_state so large?)")
    with path.open("wb") as file:
        file.write(written)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and verify the manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged, or its version is another.
    """
    path = folder / MANIFEST
    if not path.is_file():
        hint = f" ({incomplete(folder)} is what a save left that did not end)" if incomplete(folder).exists() else ""
        raise CheckpointError(
            f"{folder}: has no {MANIFEST}{hint}; allowed: a folder that save_checkpoint or 'ds-optforge convert' wrote"
        )
    try:
        manifest = reading.json_value(reading.content(path, reading.DATA_BYTES))
        written = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    if written != digest_of(manifest):
        raise CheckpointError(f"{path}: damaged: its checksum is not that of what was written")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{path}: got version {manifest.get('version')}; this ds_optforge reads version {VERSION}")
    try:
        validate(_Manifest, manifest, str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    found: dict[str, Any] = manifest
    return found


def plain(value: Any, what: str) -> Any:
    """Return plain data as JSON gives it back. Raises CheckpointError for values that it would change or refuse."""
    allowed = "allowed: numbers, strings, lists, and dicts with strings as keys"
    try:
        found = reading.json_value(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} cannot be saved: {error}; {allowed}") from None
    if odd := list(_odd_keys(value)):
        raise CheckpointError(f"{what} cannot be saved: got the key {odd[0]!r}; {allowed}")
    return found


def _odd_keys(value: Any) -> Iterator[Any]:
    """Keys that JSON would turn into strings."""
    if isinstance(value, Mapping):
        yield from (key for key in value if not isinstance(key, str))
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from _odd_keys(inner)
