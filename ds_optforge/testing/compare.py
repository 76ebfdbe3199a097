"""Differences of runs, as sentences with numbers; none where they are what they should be."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ds_optforge.testing.engines import Run, Weights


def far_weights(found: Weights, expected: Weights, tolerance: float) -> Iterator[str]:
    """The parameter that is farthest off, if it is too far."""
    errors = {name: _error(found[name], weight) for name, weight in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] > tolerance:
        off = (found[worst] - expected[worst]).abs()
        yield (
            f"{worst}: relative difference {errors[worst]:.2e}, allowed {tolerance:g} ({int((off > 0).sum())} of {off.numel()} "
            f"elements differ, by up to {off.max().item():.2e}; {sum(e > tolerance for e in errors.values())} of {len(errors)} "
            "parameters are too far off)"
        )


def far_losses(found: Sequence[float], expected: Sequence[float], tolerance: float) -> Iterator[str]:
    """The first loss that is too far off."""
    for step, (loss, reference) in enumerate(zip(found, expected, strict=True), 1):
        if not abs(loss - reference) <= tolerance * abs(reference):
            off = abs(loss / reference - 1)
            yield f"loss {step} of {len(found)}: {loss:.7g} for {reference:.7g}, off by {off:.2e}, allowed {tolerance:g}"
            return


def other_bits(found: Weights, expected: Weights) -> Iterator[str]:
    """The parameters that are not the same bit for bit."""
    names = [name for name, weight in expected.items() if not torch.equal(found[name], weight)]
    if names:
        most = max((found[name] - expected[name]).abs().max().item() for name in names)
        yield f"{', '.join(names)}: not the same bit for bit, off by up to {most:.2e}"


def other_run(found: Run, expected: Run, last: int) -> Iterator[str]:
    """What is not the same bit for bit at the end, and in the last losses."""
    if found.losses[-last:] != expected.losses[-last:]:
        yield f"losses {found.losses[-last:]} for {expected.losses[-last:]}: not the same bit for bit"
    yield from other_bits(found.end, expected.end)


def other_numbers(found: dict[str, Any], expected: dict[str, Any], tolerance: dict[str, float]) -> Iterator[str]:
    """Numbers by name that are missing, new, or too far off."""
    if found.keys() != expected.keys():
        yield f"holds {sorted(found)}, expected {sorted(expected)}"
        return
    for name, value in expected.items():
        allowed = tolerance.get(name, tolerance[""])
        if not abs(found[name] - value) <= allowed * abs(value):
            yield f"{name}: {found[name]:.7g} for {value:.7g}, allowed {allowed:g} relative"


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||; infinite for what is not a number."""
    error = ((found - expected).norm() / expected.norm()).item() if expected.any() else float(found.norm())
    return error if error == error else float("inf")
