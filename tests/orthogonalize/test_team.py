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

from ds_optforge.orthogonalize import COEFFICIENT_SETS, Method, orthogonalize, orthogonalize_rows, team_cost
from tests.oracles import newton_schulz

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


@pytest.mark.parametrize("name", sorted(COEFFICIENT_SETS))
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize(("rows", "cols"), [(12, 12), (10, 40), (40, 10)])
def test_every_set_agrees_with_the_formula_in_float64(rows: int, cols: int, method: Method, name: str) -> None:
    chosen, given = COEFFICIENT_SETS[name], matrix(rows, cols, torch.float64)
    expected = newton_schulz(given[0], chosen.sequence(None), chosen.safety, chosen.eps)
    blocks = [rows // 2, rows - rows // 2]
    found, _ = in_threads(blocks, lambda team: orthogonalize_rows(given.clone(), team, name, None, method, torch.float64))
    torch.testing.assert_close(torch.cat(found, 1)[0], expected, rtol=0, atol=1e-9)  # steep sets magnify most


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_in_bfloat16_a_team_is_no_further_from_the_formula_than_one_rank(method: Method) -> None:
    """Which is what it can be held to: a kernel may add up fewer rows in another order, and each step magnifies that."""
    given = matrix(192, 320, torch.bfloat16)
    exact = newton_schulz(given[0])
    one = orthogonalize(given, "quintic", None, method)
    found, _ = in_threads([64, 64, 64], lambda team: orthogonalize_rows(given.clone(), team, "quintic", None, method))
    distance = torch.linalg.vector_norm(one.double()[0] - exact)
    assert torch.linalg.vector_norm(torch.cat(found, 1).double()[0] - exact) <= 1.1 * distance
    assert torch.linalg.vector_norm(torch.cat(found, 1).double() - one.double()) <= distance


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize(("rows", "cols"), [(24, 24), (16, 40), (40, 16)])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_what_it_costs_is_what_was_counted(steps: int, rows: int, cols: int, method: Method) -> None:
    """FLOPs of each of four members, and what each gathers."""

    def counted(team: Threads) -> Tensor:
        with FlopCounterMode(display=False) as counter:
            orthogonalize_rows(given.clone(), team, "quintic", steps, method, torch.float32)
        return torch.tensor(counter.get_total_flops())

    given, blocks = matrix(rows, cols, torch.float32), [rows // 4] * 4
    found, members = in_threads(blocks, counted)
    own, gathers, numel = team_cost(rows, cols, steps, method, blocks)
    assert [int(each) for each in found] == [own] * 4
    assert [len(member.gathered) for member in members] == [gathers] * 4
    assert [sum(member.gathered) for member in members] == [numel] * 4


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_zeros_stay_zeros(method: Method) -> None:
    found, _ = in_threads([4, 4], lambda team: orthogonalize_rows(torch.zeros(1, 8, 12), team, "quintic", None, method))
    assert not torch.cat(found, 1).any()


def test_more_steps_than_the_gram_form_bears_in_bfloat16_are_refused_as_for_one_rank() -> None:
    given, team = matrix(8, 16, torch.bfloat16), Threads(0, [8], [torch.empty(0)], Barrier(1))
    with pytest.raises(ValueError, match="method: got 'gram' with 6 steps"):
        orthogonalize_rows(given, team, [(3.4445, -4.7750, 2.0315)] * 6, 6, "gram")
