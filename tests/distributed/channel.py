"""What a pool and its ranks say to each other: whole messages of bytes, with tensors inside."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch

READY = b"ready"
RESET = b"reset"


@dataclass(frozen=True, slots=True)
class Returned:
    """A rank's answer to a job whose function returned."""

    value: Any


@dataclass(frozen=True, slots=True)
class Failed:
    """What went wrong on one rank. Text only, so that every exception can travel."""

    type: str
    message: str
    traceback: str


def dump(message: object) -> bytes:
    """Serialise by value: connection.send() would put tensors into shared memory, whose owner may be killed."""
    buffer = io.BytesIO()
    torch.save(message, buffer)
    return buffer.getvalue()


def load(data: bytes) -> Any:
    """Undo dump(). Functions travel by qualified name, so this imports their modules."""
    return torch.load(io.BytesIO(data), weights_only=False)
