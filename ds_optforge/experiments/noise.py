"""Statistics of runs that differ in their seeds alone: which differences are larger than chance."""

import math
import statistics
from collections.abc import Sequence

# 95% quantiles of Student's t for 1, 2, ... degrees of freedom; the last one serves for more (it is a little too strict).
STUDENT_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def threshold(baseline: Sequence[float]) -> float:
    """The difference of two means over n seeds that chance alone exceeds in one case of twenty.

    t(95%, n - 1) x s x sqrt(2 / n), with s the standard deviation over the baseline's n seeds: s x sqrt(2 / n) is the
    standard error of the difference of two means over n seeds, and Student's t makes up for s coming from few of them.
    """
    n = len(baseline)
    return STUDENT_95[min(n - 2, len(STUDENT_95) - 1)] * statistics.stdev(baseline) * math.sqrt(2 / n)


def beats(candidate: Sequence[float], baseline: Sequence[float]) -> bool:
    """Return True if the candidate is lower by more than the threshold, and lower at all without its best seed."""
    without_best = sorted(candidate)[1:]
    target = statistics.mean(baseline)
    return statistics.mean(candidate) < target - threshold(baseline) and statistics.mean(without_best) < target


def hopeless(candidate: Sequence[float], baseline: Sequence[float]) -> bool:
    """Return True if, after its first seeds, the candidate is above the baseline's same seeds by more than the threshold."""
    return statistics.mean(candidate) > statistics.mean(baseline[: len(candidate)]) + threshold(baseline)
