"""What counts as better than the baseline."""

import math
import random

import pytest

from ds_optforge.experiments.noise import STUDENT_95, beats, hopeless, standard_error, threshold


def within(quantile: float, freedom: int) -> float:
    """The probability that Student's t lies between 0 and a quantile: its density, integrated in 10,000 steps."""
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    step = quantile / 10_000
    middles = ((index + 0.5) * step for index in range(10_000))
    return step * sum(scale * (1 + t * t / freedom) ** (-(freedom + 1) / 2) for t in middles)


def test_the_quantiles_are_students() -> None:
    """Half of 90% lies between 0 and each. 5e-5: three digits of them."""
    found = [within(quantile, index + 1) for index, quantile in enumerate(STUDENT_95)]
    assert found == pytest.approx([0.45] * 9, abs=5e-5)


@pytest.mark.parametrize(("seeds", "quantile"), [(2, 6.314), (3, 2.920), (9, 1.860), (10, 1.833), (11, 1.833), (12, 1.833)])
def test_the_quantile_is_that_of_one_less_than_the_seeds(seeds: int, quantile: float) -> None:
    """Of n seeds, one at 1 and the others at 0, the variance is 1 / n."""
    assert threshold([1.0] + [0.0] * (seeds - 1)) == pytest.approx(quantile * math.sqrt(2) / seeds)


def test_the_threshold_is_students_quantile_times_the_error_of_a_difference() -> None:
    """s = 1 over three seeds; t(95%, 2) = 2.920."""
    assert threshold([1.0, 2.0, 3.0]) == pytest.approx(2.920 * math.sqrt(2 / 3))
    assert threshold([1.0, 1.0]) == 0.0
    assert threshold([float(seed % 2) for seed in range(20)]) == pytest.approx(1.833 * 0.51299 * math.sqrt(2 / 20), rel=1e-4)


def test_the_standard_error_is_that_of_the_mean() -> None:
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)  # s = sqrt(2)
    assert standard_error([1.0]) == 0.0


def test_a_candidate_wins_by_more_than_the_threshold_only() -> None:
    baseline = [1.00, 1.02, 0.98]
    edge = threshold(baseline)
    assert beats([1 - edge - 0.001] * 3, baseline)
    assert not beats([1 - edge + 0.001] * 3, baseline)


def test_one_lucky_seed_does_not_win() -> None:
    """Nor where the others are just as good as the baseline, or one of them is far behind."""
    assert not beats([1.0, 1.01, 0.1], [1.0, 1.001, 0.999])
    assert not beats([0.1, 1.0, 1.0], [1.0, 1.0, 1.0])
    assert beats([0.1, 0.9, 1.0], [1.0, 1.0, 1.0])
    assert not beats([0.1, 0.5, 1.6], [1.0, 1.0, 1.0])


def test_a_difference_of_exactly_the_threshold_neither_wins_nor_loses() -> None:
    """s = 2 over eight seeds, whose squares sum up to 28, and t(95%, 7) = 1.895: the threshold is 1.895 x 2 x sqrt(2 / 8)."""
    baseline = [0.0, 0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0]
    assert not beats([-1.895] * 8, baseline)
    assert beats([-1.896] * 8, baseline)
    assert not hopeless([1.895], baseline)
    assert hopeless([1.896], baseline)


def test_where_nothing_varies_the_same_is_neither_better_nor_hopeless() -> None:
    assert not beats([1.0, 1.0], [1.0, 1.0])
    assert beats([0.5, 0.5], [1.0, 1.0])
    assert not hopeless([1.0], [1.0, 1.0])
    assert hopeless([1.5], [1.0, 1.0])


def test_hopeless_counts_the_baselines_first_seeds_alone() -> None:
    """The baseline's first seed is at 0, the mean of all at 2; its threshold is 2.920 x 2 x sqrt(2 / 3) = 4.768."""
    baseline = [0.0, 2.0, 4.0]
    assert hopeless([4.8], baseline)
    assert not hopeless([4.7], baseline)
    assert hopeless([4.8, 6.8], baseline)
    assert not hopeless([4.8, 6.6], baseline)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_what_changes_nothing_wins_in_one_of_twenty_sweeps_at_most(seeds: int) -> None:
    noise = random.Random(0)
    trials = 4000
    wins = sum(
        beats([noise.gauss(0, 1) for _ in range(seeds)], [noise.gauss(0, 1) for _ in range(seeds)]) for _ in range(trials)
    )
    assert wins / trials <= 0.06


def test_hopeless_is_behind_on_the_same_seeds_by_more_than_the_threshold() -> None:
    baseline = [1.0, 2.0, 3.0]
    assert not hopeless([1.0 + threshold(baseline) - 0.01], baseline)
    assert hopeless([1.0 + threshold(baseline) + 0.01], baseline)
