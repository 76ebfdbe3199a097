"""What counts as better than the baseline."""

import math
import random

import pytest

from ds_optforge.experiments.noise import beats, hopeless, standard_error, threshold


def test_the_threshold_is_students_quantile_times_the_error_of_a_difference() -> None:
    """s = 1 over three seeds; t(95%, 2) = 2.920."""
    assert threshold([1.0, 2.0, 3.0]) == pytest.approx(2.920 * math.sqrt(2 / 3))
    assert threshold([1.0, 1.0]) == 0.0
    assert threshold([float(seed % 2) for seed in range(20)]) == pytest.approx(1.833 * 0.51299 * math.sqrt(2 / 20), rel=1e-4)


def test_the_standard_error_is_that_of_the_mean() -> None:
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
    assert standard_error([1.0]) == 0.0


def test_a_candidate_wins_by_more_than_the_threshold_only() -> None:
    baseline = [1.00, 1.02, 0.98]
    edge = threshold(baseline)
    assert beats([1 - edge - 0.001] * 3, baseline)
    assert not beats([1 - edge + 0.001] * 3, baseline)


def test_one_lucky_seed_does_not_win() -> None:
    assert not beats([1.0, 1.01, 0.1], [1.0, 1.001, 0.999])


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
