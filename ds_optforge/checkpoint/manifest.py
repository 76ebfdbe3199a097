"""The manifest of a portable checkpoint, its checksums, and the folder that it lies in."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ds_optforge.errors import CheckpointError

MANIFEST = "checkpoint.json"
INCOMPLETE = ".incomplete"  # what a save in progress, or one that was killed, is called
VERSION = 1

_READ_BYTES = 2**22


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
    with path.open("w") as file:
        json.dump({**manifest, "sha256": digest_of(manifest)}, file, indent=1)
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
        manifest = json.loads(path.read_bytes())
        written = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    if written != digest_of(manifest):
        raise CheckpointError(f"{path}: damaged: its checksum is not that of what was written")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{path}: got version {manifest.get('version')}; this ds_optforge reads version {VERSION}")
    found: dict[str, Any] = manifest
    return found


def plain(value: Any, what: str) -> Any:
    """Return plain data as JSON gives it back. Raises CheckpointError for values that it would change or refuse."""
    allowed = "allowed: numbers, strings, lists, and dicts with strings as keys"
    if odd := list(_odd_keys(value)):
        raise CheckpointError(f"{what} cannot be saved: got the key {odd[0]!r}; {allowed}")
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what} cannot be saved: {error}; {allowed}") from None


def _odd_keys(value: Any) -> Iterator[Any]:
    """Keys that JSON would turn into strings."""
    if isinstance(value, Mapping):
        yield from (key for key in value if not isinstance(key, str))
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from _odd_keys(inner)
