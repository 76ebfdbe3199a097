"""What travels of a bucket where rows are chosen: the elements of its buffers that are in them, one behind the other."""

from collections.abc import Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from ds_optforge.zero.buckets import BufferPlace


class Packing:
    """The chosen elements of one bucket's send and receive buffer, in the order of the buffers, which stay whole.

    All ranks know every row that is chosen, so that each knows what it is sent. How many elements a rank sends another one
    differs from step to step, and a collective wants such numbers on the host: `choose` waits for the device, once.

    Args:
        sends: elements of the send buffer, per destination rank.
        receives: elements of the receive buffer, per source rank.
        device: of the buffers that travel.
        pattern: integer dtype of the wire's size; elements are copied as it, since some are halves of float32 values.
    """

    def __init__(self, sends: Sequence[int], receives: Sequence[int], device: torch.device, pattern: torch.dtype) -> None:
        self._pattern = pattern
        self._counts = len(sends)
        self._bounds = [
            torch.tensor(list(accumulate(sizes, initial=0)), dtype=torch.long, device=device) for sizes in (sends, receives)
        ]
        self._splits: list[list[int]] = [[], []]  # of what is sent, and received
        self._places: list[Tensor] = []  # of the same in the buffers
        self._arriving: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def choose(self, sent: Tensor, received: Tensor) -> None:
        """Take the elements of the send buffer, and of the receive buffer, that are to travel both ways. Waits for the device.

        Args:
            sent: (send_numel,) bool.
            received: (receive_numel,) bool.
        """
        masks = [sent, received]
        counts = torch.cat([_count_up_to(mask, bounds).diff() for mask, bounds in zip(masks, self._bounds, strict=True)])
        found: list[int] = counts.cpu().tolist()
        self._splits = [found[: self._counts], found[self._counts :]]
        self._places = [
            torch.nonzero_static(mask, size=sum(splits)).view(-1) for mask, splits in zip(masks, self._splits, strict=True)
        ]

    def packed(self, out: Tensor, into: Tensor, back: bool) -> tuple[Tensor, Tensor, list[int], list[int]]:
        """Return the arguments of an all-to-all of the chosen elements alone; `unpack` comes when it is done.

        Args:
            out: the whole buffer that is received.
            into: the whole buffer that is sent.
            back: whether these are the send and the receive buffer, not the receive and the send buffer.
        """
        here, there = (1, 0) if back else (0, 1)
        outgoing = into.view(self._pattern).index_select(0, self._places[here]).view(into.dtype)
        incoming = out.new_empty(sum(self._splits[there]))
        self._arriving = out, self._places[there], incoming, outgoing  # all of them stay referenced
        return incoming, outgoing, self._splits[there], self._splits[here]

    def unpack(self) -> None:
        """Put what has arrived into the whole buffer, and zeros between."""
        if self._arriving is not None:
            out, places, incoming, _ = self._arriving
            self._arriving = None
            out.zero_().view(self._pattern).index_copy_(0, places, incoming.view(self._pattern))


def positions_beside(places: Sequence[BufferPlace], words: int) -> list[int]:
    """Return the positions of the statistics, of ``words`` elements a value, and flags of fragments: they travel anyway."""
    values = (kept for place in places for kept in place.statistics)
    found = [range(kept.position, kept.position + words * kept.within.numel) for kept in values]
    return [*chain.from_iterable(found), *(place.flag for place in places)]


def _count_up_to(mask: Tensor, bounds: Tensor) -> Tensor:
    """Return how many of the elements before each of the ``bounds`` are true."""
    counts = torch.nn.functional.pad(mask.cumsum(0, dtype=torch.int32), (1, 0))
    return counts.index_select(0, bounds)
