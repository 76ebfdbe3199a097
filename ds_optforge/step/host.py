"""Copies of small tensors between the host and a device for which the host does not wait."""

import torch
from torch import Tensor


def onto(values: Tensor, device: torch.device) -> Tensor:
    """Return ``values`` on ``device``; from the host through pinned memory, which torch keeps until the copy is done."""
    if values.device.type == "cpu" and device.type != "cpu" and torch.accelerator.is_available():
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def to_host(values: Tensor) -> tuple[Tensor, torch.Event | None]:
    """Return ``values`` on the host, and the event to wait for before they are read; None if they are there."""
    if values.device.type == "cpu":
        return values, None
    pinned = torch.accelerator.is_available()
    there = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
    there.copy_(values, non_blocking=True)
    if not pinned:
        return there, None
    arrived = torch.Event(values.device)
    arrived.record()
    return there, arrived
