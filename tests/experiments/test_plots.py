"""The curves of pictures."""

from pathlib import Path

import numpy as np
import pytest

from ds_optforge.experiments.compare import Curve, Standing
from ds_optforge.experiments.plots import draw_losses, smoothed


def test_the_seeds_are_a_band_around_their_mean(tmp_path: Path) -> None:
    """Three seeds with constant losses of 1, 2 and 6."""
    curves = [Curve([1, 2, 3], [loss] * 3, [0.5, 1.0, 1.5]) for loss in (1.0, 2.0, 6.0)]
    standing = Standing("muon", 0.02, [], {}, curves, "")
    (axes,) = draw_losses(tmp_path / "loss.png", [standing], "seconds").axes
    (line,), (band,) = axes.lines, axes.collections
    assert np.array(line.get_ydata()).tolist() == [3.0, 3.0, 3.0]
    corners = band.get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (1.0, 6.0)
    assert (corners[:, 0].min(), corners[:, 0].max()) == (0.5, 1.5)


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
