"""What the members of a team send each other: the rows of a product that each has computed."""

from collections.abc import Sequence
from itertools import accumulate

import torch.distributed as dist
from torch import Tensor

from ds_optforge.zero.layout import Binding
from ds_optforge.zero.plan import Team


class TeamGather:
    """This rank's place in a team, and the way to the other members.

    Members send to each other within the process group of the exchange, so that no team needs a group of its own and ranks
    outside of it take no part. Between two exchanges all members take the teams in one order, and nobody waits in a circle.

    Args:
        team: of one matrix.
        binding: tells the process group.

    Attributes:
        place: number of this rank among the members.
        rows: stored rows of the matrix that each member owns.
    """

    def __init__(self, team: Team, binding: Binding) -> None:
        assert binding.process_group is not None  # there is more than one rank
        self.place, self.rows = team.ranks.index(binding.rank), team.rows
        self._group = binding.process_group
        self._peers = [
            (member, dist.get_global_rank(binding.process_group, rank))
            for member, rank in enumerate(team.ranks)
            if rank != binding.rank
        ]

    @property
    def own(self) -> tuple[int, int]:
        """First row, and number of rows, that this rank owns."""
        return sum(self.rows[: self.place]), self.rows[self.place]

    def whole(self, block: Tensor) -> Tensor:
        """Return (1, rows, cols) from this rank's rows of it, (1, own rows, cols). Collective over the team."""
        found = block.new_empty(1, sum(self.rows), block.shape[2])
        found.narrow(1, *self.own).copy_(block)
        self.gather(found, self.rows)
        return found

    def gather(self, whole: Tensor, counts: Sequence[int]) -> None:
        """Fill ``whole``, (1, n, m) and contiguous, of which this member has written its rows. Collective over the team.

        Args:
            whole: of any dtype.
            counts: rows of each member, from the first row on.
        """
        self.gather_all([(whole, counts)])

    def gather_all(self, wanted: Sequence[tuple[Tensor, Sequence[int]]]) -> None:
        """Do as `gather` does for several (whole, counts) at once."""
        operations = []
        for whole, counts in wanted:
            starts = list(accumulate(counts, initial=0))
            blocks = [whole.narrow(1, start, count) for start, count in zip(starts, counts, strict=False)]
            for member, peer in self._peers:
                operations.append(dist.P2POp(dist.isend, blocks[self.place], peer, self._group))
                operations.append(dist.P2POp(dist.irecv, blocks[member], peer, self._group))
        for work in dist.batch_isend_irecv(operations):
            work.wait()
