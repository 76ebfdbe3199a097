"""One matrix by several ranks: the members of a team are threads here, and processes in tests/distributed/test_teams.py."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from threading import Barrier

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ds_optforge.orthogonalize import COEFFICIENT_SETS, Method, accurate_method, orthogonalize, orthogonalize_rows

# One member's rows, from a start: a rounding of bfloat16 apart where a kernel adds up in another order, with the five steps
# that follow it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}


@dataclass
class Threads:
    """A member of a team of threads, which counts what it gathers."""

    place: int
    rows: Sequence[int]
    board: list[Tensor]
    barrier: Barrier
    gathered: list[int] = field(default_factory=list)

    def gather(self, whole: Tensor, counts: Sequence[int]) -> None:
        assert whole.is_contiguous()
        assert sum(counts) == whole.shape[1]
        self.gathered.append(whole.numel())
        self.board[self.place] = whole
        self.barrier.wait(60)
        starts = list(accumulate(counts, initial=0))
        for member, count in enumerate(counts):
            if member != self.place:
                whole.narrow(1, starts[member], count).copy_(self.board[member].narrow(1, starts[member], count))
        self.barrier.wait(60)


def in_threads(blocks: Sequence[int], job: Callable[[Threads], Tensor]) -> tuple[list[Tensor], list[Threads]]:
    """What each member returns, and the members."""
    board, barrier = [torch.empty(0)] * len(blocks), Barrier(len(blocks))
    members = [Threads(place, blocks, board, barrier) for place in range(len(blocks))]
    with ThreadPoolExecutor(len(blocks)) as pool:
        return list(pool.map(job, members)), members


def matrix(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, rows, cols, generator=torch.Generator().manual_seed(rows + cols), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize(("rows", "cols"), [(24, 24), (16, 40), (40, 16)])
@pytest.mark.parametrize("parts", [(1,), (1, 1), (2, 1, 1)], ids=["alone", "two", "three"])
def test_the_rows_of_the_members_are_those_of_one_rank(
    parts: tuple[int, ...], rows: int, cols: int, method: Method, dtype: torch.dtype
) -> None:
    given = matrix(rows, cols, dtype)
    blocks = [rows * part // sum(parts) for part in parts]
    expected = orthogonalize(given, "quintic", None, method, dtype)
    found, _ = in_threads(blocks, lambda team: orthogonalize_rows(given.clone(), team, "quintic", None, method, dtype))
    assert [tuple(block.shape) for block in found] == [(1, block, cols) for block in blocks]
    assert all(block.dtype == dtype for block in found)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=TOLERANCE[dtype])
