"""The curves of pictures."""

import pytest

from ds_optforge.experiments.plots import smoothed


def test_the_curve_ends_with_the_mean_of_a_whole_window() -> None:
    """100 values, two on each side: the last window is that of the last five values, whatever the last one is."""
    values = [1.0] * 99 + [6.0]
    assert smoothed(values)[-3:] == [2.0, 2.0, 2.0]
    assert smoothed(values)[-4] == 1.0


def test_the_start_is_not_smoothed_away() -> None:
    assert smoothed([10.0, 4.0, 2.0, *[1.0] * 97])[:3] == pytest.approx([10.0, 16 / 3, 18 / 5])


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_short_run_has_as_many_values_as_steps(count: int) -> None:
    assert smoothed([2.0] * count) == [2.0] * count
