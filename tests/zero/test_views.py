"""Views of many ranges by one call."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_optforge.zero.views import Views
from tests.launches import Launches


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 4)), max_size=12), st.randoms())
def test_they_are_what_narrow_makes_in_any_order(gaps: list[tuple[int, int, int]], random: object) -> None:
    """(tensor, gap before the range, elements)."""
    ends, ranges = [0, 0, 0], []
    for tensor, gap, numel in gaps:
        ranges.append((tensor, ends[tensor] + gap, numel))
        ends[tensor] += gap + numel
    random.shuffle(ranges)  # type: ignore[attr-defined]
    tensors = [torch.arange(end + 2) + 100 * tensor for tensor, end in enumerate(ends)]
    found = Views(ranges).of(tensors)
    expected = [tensors[tensor].narrow(0, start, numel) for tensor, start, numel in ranges if numel]
    assert [(view.data_ptr(), view.tolist()) for view in found] == [(view.data_ptr(), view.tolist()) for view in expected]


def test_a_range_may_be_given_twice() -> None:
    assert [view.tolist() for view in Views([(0, 1, 2), (0, 1, 2)]).of([torch.arange(3)])] == [[1, 2], [1, 2]]


@pytest.mark.parametrize("count", [1, 500])
def test_a_tensor_is_viewed_by_one_call(count: int) -> None:
    flat, views = torch.empty(4 * count, device="meta"), Views([(0, 4 * index, 3) for index in range(count)])
    with Launches() as counter:
        assert len(views.of([flat])) == count
    assert counter.views == 1
