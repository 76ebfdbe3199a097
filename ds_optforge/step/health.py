"""What the numbers of telemetry should be, and the warning where they are not for a while."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ds_optforge.routing.roles import Route
from ds_optforge.rules.base import ElementwiseRule, Hyperparameters, MatrixRule
from ds_optforge.zero.partition import chosen_shape, part_shape

logger = logging.getLogger("ds_optforge")

# Records in a row that must be outside of a range before there is a warning: the first steps of a run often are.
PATIENCE = 20

# A step of 1/10,000 of a float32 weight is rounded by up to 1/1,700 of itself, and an update travels in bfloat16.
_ROUNDED = 1.01

# Names of the sums that `Expected.sums` returns.
EXPECTED = ("expected_elements", "smallest", "largest", "decay", "defect_at_most", "sampled")


@dataclass(frozen=True, slots=True)
class Expected:
    """What a group's update and orthogonality error should be, as sums over its parameters, for a learning rate of 1.

    Attributes:
        elements: of the parameters of which something is known; the sums of squares below are over them.
        smallest: sum of the squares of the smallest healthy update.
        largest: sum of the squares of the largest one.
        defect: sum of the squares of the largest healthy orthogonality error, over the matrices that are sampled.
        sampled: number of these matrices.
    """

    elements: int = 0
    smallest: float = 0.0
    largest: float = 0.0
    defect: float = 0.0
    sampled: int = 0

    def sums(self, now: Hyperparameters) -> tuple[float, ...]:
        """Return the values of `EXPECTED` for one step's hyperparameters; the stages of a pipeline add them up."""
        rate = now["lr"]
        decay = rate * now.get("weight_decay", 0.0) * self.elements
        return self.elements, rate**2 * self.smallest, rate**2 * self.largest, decay, self.defect, self.sampled


def expected(rule: ElementwiseRule | MatrixRule, routes: Sequence[Route], sample: frozenset[tuple[str, int]]) -> Expected:
    """Return what the numbers of a group should be.

    Args:
        rule: of the group.
        routes: of its parameters.
        sample: (parameter's name, start) of the matrices of which the orthogonality error is taken.
    """
    if isinstance(rule, ElementwiseRule):
        if rule.update_at_most is None:
            return Expected()
        elements = sum(route.numel for route in routes)
        return Expected(elements, largest=elements * rule.update_at_most**2)
    elements, smallest, largest, defect, sampled = 0, 0.0, 0.0, 0.0, 0
    for route in routes:
        for start, stored_rows, stored_cols in route.matrices:
            rows, cols = part_shape(stored_rows, stored_cols, route.transposed, route.joins)
            count = rule.choice.count if rule.choice else None
            bounds = rule.healthy(*chosen_shape(rows, cols, route.transposed, count))
            if bounds is None:
                continue
            if (route.name, start) in sample:
                defect, sampled = defect + bounds.error**2, sampled + 1
            if rule.resizes:
                continue
            numel = stored_rows * stored_cols
            square = numel * rule.rms(rows, cols, route.transposed) ** 2
            elements += numel
            smallest += square * bounds.smallest**2
            largest += square * bounds.largest**2
    return Expected(elements, smallest, largest, defect, sampled)


def healthy_ranges(numbers: Mapping[str, float], sums: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Return the (lowest, highest) healthy value of those ``numbers`` of a group's record of which something is known.

    Args:
        numbers: of the record.
        sums: the values of `EXPECTED`, over the whole model.
    """
    ranges = {}
    if elements := sums["expected_elements"]:
        decay = sums["decay"] / elements * numbers["parameter_rms"]  # may be along the update or against it
        smallest, largest = (math.sqrt(sums[name] / elements) for name in ("smallest", "largest"))
        ranges["update_rms"] = (max(smallest - decay, 0.0), (largest + decay) * _ROUNDED)
    if sums["sampled"] and "orthogonality_error" in numbers:
        ranges["orthogonality_error"] = (0.0, math.sqrt(sums["defect_at_most"] / sums["sampled"]))
    return ranges


class Health:
    """Counter of the records in a row in which a number is outside of its range; warns once of each number of each group."""

    def __init__(self) -> None:
        self._outside: dict[tuple[str, str], int] = {}

    def look(self, step: int, group: str, numbers: Mapping[str, float], ranges: Mapping[str, tuple[float, float]]) -> None:
        """Take one record of a group into account.

        Args:
            step: of the record.
            group: identifier of the group.
            numbers: of the record.
            ranges: see `healthy_ranges`.
        """
        for name, (low, high) in ranges.items():
            count = self._outside.get((group, name), 0)
            if count == PATIENCE:  # warned of already
                continue
            healthy = low <= numbers[name] <= high  # not NaN
            self._outside[group, name] = count = 0 if healthy else count + 1
            if count == PATIENCE:
                logger.warning(
                    "%s: %s is %.3g in step %d, and has been outside of its healthy range (here %.3g to %.3g) for %d records; "
                    "docs/telemetry.md says what to do",
                    *(group, name, numbers[name], step, low, high, PATIENCE),
                )
