"""Refuses gradients that are not finite before anything has changed. The host waits once for all groups and devices."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_optforge.zero.agreement import any_rank, sum_over_ranks
from ds_optforge.zero.layout import Binding


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """The gradients of one group on one device.

    Attributes:
        values: flat, (elements,) each.
        names: of their parameters.
        binding: of the group.
    """

    values: Sequence[Tensor]
    names: Sequence[str]
    binding: Binding

    def overflow(self) -> Tensor:
        """Return a flag, (): whether a gradient is not finite, or only the square of an element of it."""
        return torch.stack(torch._foreach_norm(list(self.values))).isfinite().all().logical_not()

    def refuse(self) -> None:
        """Look at each gradient. Collective over the ranks that hold the group's parameters.

        Raises:
            RuntimeError: one that is not finite; the message names its parameter.
        """
        index = next((index for index, found in enumerate(self.values) if not found.isfinite().all()), None)
        if any_rank(index is not None, self.binding):
            name = "a parameter of another tensor rank" if index is None else self.names[index]
            raise RuntimeError(f"{name}: its gradient is not finite; nothing was changed")


def refuse_nonfinite(groups: Sequence[Gradients]) -> None:
    """Refuse gradients that are not finite. Collective, in the same order of groups on all ranks.

    Raises:
        RuntimeError: see `Gradients.refuse`.
    """
    flags = [gradients.overflow() for gradients in groups]
    by_ranks: dict[int, list[int]] = {}
    for index, gradients in enumerate(groups):
        if gradients.binding.process_group is not None:
            by_ranks.setdefault(id(gradients.binding.process_group), []).append(index)
    for members in by_ranks.values():
        binding = groups[members[0]].binding
        joined = torch.stack([flags[index].to(binding.device) for index in members]).float()
        sum_over_ranks(joined, binding)
        for index, flag in zip(members, joined.unbind(), strict=True):
            flags[index] = flag
    for gradients, doubtful in zip(groups, _read(flags), strict=True):
        if doubtful:
            gradients.refuse()


def _read(flags: Sequence[Tensor]) -> list[bool]:
    """Read flags, () each, that lie on any devices, by one copy to the host."""
    far = [flag for flag in flags if flag.device.type != "cpu"]
    found = iter(torch.stack([flag.to(far[0].device, far[0].dtype) for flag in far]).tolist() if far else ())
    return [bool(flag if flag.device.type == "cpu" else next(found)) for flag in flags]
