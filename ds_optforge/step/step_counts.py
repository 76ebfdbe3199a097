"""Numbers of steps, which the host reads in every step and so keeps: DeepSpeed's `reload_states` puts them on the device."""

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from torch import Tensor


class StepCounts:
    """The numbers of steps that an optimizer's state had on the host when a step, or a load, last ended.

    `reload_states` replaces each by a copy on the device, and leaves the host's as it was: that one is put back, and nobody
    waits for the device. A tensor that was written to since, or that came from elsewhere, is read from the device, once.
    """

    def __init__(self) -> None:
        self._known: dict[Tensor, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: nothing known, as its tensors are others."""
        return {"_known": {}}

    def remember(self, states: Iterable[tuple[Tensor, Mapping[str, Any]]]) -> None:
        """Note the numbers of steps of (stepped tensor, its state) pairs that are on the host."""
        self._known.update((tensor, state["step"]) for tensor, state in states if "step" in state and _on_host(state["step"]))

    def bring_back(self, states: Iterable[tuple[Tensor, MutableMapping[str, Any]]]) -> None:
        """Put the numbers of steps of (stepped tensor, its state) pairs on the host, where they are not."""
        for tensor, state in states:
            if "step" in state and not _on_host(state["step"]):
                known, found = self._known.get(tensor), state["step"]
                moved = known is not None and _on_host(known) and found._version == 0
                state["step"] = known if moved else found.cpu()


def _on_host(step: Tensor) -> bool:
    return step.device.type == "cpu"
