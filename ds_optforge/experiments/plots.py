"""Pictures of comparisons and sweeps, as PNG files; no display is needed."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure

from ds_optforge.experiments.compare import Curve, Standing
from ds_optforge.experiments.noise import standard_error
from ds_optforge.experiments.sweep import PhaseResult, Progress, Row

COLORS = ("#2a6f97", "#d1495b", "#edae49", "#66a182", "#8d5a97", "#3d405b", "#9c6644", "#00a6a6", "#7f7f7f", "#b5179e")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (2, 1.5)))  # lines that lie on each other are told apart
KEEP, DISCARD, CRASH = "#2e7d32", "#8a8f98", "#c62828"
SKIPPED = 0.1  # of a run, at its start: the vertical axis begins at the loss after it
ASTRAY = 4.0  # times as far above the median as the best is below it
DPI = 120


def draw_losses(
    path: Path, standings: Sequence[Standing], against: Literal["steps", "seconds"], steady_after: int = 0
) -> Figure:
    """Draw the smoothed training loss of each configuration: the mean over the seeds, and a band from lowest to highest.

    Returns:
        What was drawn, after it was written to ``path``.
    """
    figure = Figure(figsize=(8.5, 5.0), layout="constrained")
    axes = figure.subplots()
    highest, lowest = -math.inf, math.inf
    for index, standing in enumerate(standings):
        if not standing.curves or not standing.curves[0].losses:
            continue
        smooth = [smoothed(curve.losses) for curve in standing.curves]
        means, low, high = (
            [combine(values) for values in zip(*smooth, strict=False)] for combine in (statistics.mean, min, max)
        )
        x = _along(standing.curves, against)[: len(means)]
        color, dashes = COLORS[index % len(COLORS)], DASHES[index % len(DASHES)]
        axes.plot(x, means, color=color, linestyle=dashes, linewidth=1.8, label=standing.name)
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        highest = max(highest, means[int(SKIPPED * len(means))])
        lowest = min(lowest, *low)
    if math.isfinite(highest):
        axes.set_ylim(lowest - 0.04 * (highest - lowest), highest)
    if against == "steps" and 0 < steady_after < axes.get_xlim()[1]:
        axes.axvline(steady_after, color="0.6", linewidth=0.9, linestyle="--")
        axes.annotate(" steady state", (steady_after, highest), va="top", color="0.4", fontsize=9)
    label = "step" if against == "steps" else "seconds of training"
    _finish(figure, axes, path, xlabel=label, ylabel="training loss, smoothed")
    return figure


def _along(curves: Sequence[Curve], against: Literal["steps", "seconds"]) -> list[float]:
    columns = zip(*(curve.steps if against == "steps" else curve.seconds for curve in curves), strict=False)
    return [statistics.mean(column) for column in columns]


def smoothed(values: Sequence[float]) -> list[float]:
    """Smooth by the mean over 2% of all values on each side.

    At the start, where a loss falls fast, the window shrinks evenly; at the end it keeps its width and stands still, because a
    window that shrinks to the last value shows the noise of one batch as a turn of the curve.
    """
    reach = min(max(1, len(values) // 50), (len(values) - 1) // 2)
    means = []
    for index in range(len(values)):
        middle = min(index, len(values) - 1 - reach)
        near = min(reach, middle)
        means.append(statistics.mean(values[middle - near : middle + near + 1]))
    return means


def draw_sweep(path: Path, progress: Progress) -> None:
    """Draw the metric of every experiment in the order they ran, with standard errors and the baseline of each phase."""
    rows = progress.rows
    figure = Figure(figsize=(max(8.5, 2.0 + 0.3 * len(rows)), 5.2), layout="constrained")
    axes = figure.subplots()
    _draw_baselines(axes, progress)
    seen: set[str] = set()
    for index, row in enumerate(rows):
        color = {"keep": KEEP, "discard": DISCARD, "crash": CRASH}[row.verdict]
        label = row.verdict if row.verdict not in seen else None
        seen.add(row.verdict)
        if row.mean is None or row.verdict == "crash":
            axes.plot(index, 0.97, "x", color=color, markersize=8, label=label, transform=axes.get_xaxis_transform())
            continue
        error = standard_error(row.values)
        axes.errorbar(index, row.mean, yerr=error, fmt="o", color=color, markersize=6, capsize=3, linewidth=1, label=label)
    _limit(axes, rows, progress.phases)
    axes.set_xticks(range(len(rows)), [row.experiment for row in rows], rotation=60, ha="right", fontsize=8)
    _finish(figure, axes, path, xlabel="", ylabel=progress.sweep.settings.metric)


def _draw_baselines(axes: Any, progress: Progress) -> None:
    index = 1
    for result in progress.phases:
        mean, left, right = statistics.mean(result.baseline.values), index - 0.5, index + len(result.rows) - 0.5
        axes.hlines(mean, left, right, color="#2a6f97", linewidth=1.4)
        noise = result.threshold
        axes.fill_between([left, right], mean - noise, mean + noise, color="#2a6f97", alpha=0.1, linewidth=0)
        axes.text((left + right) / 2, 1.01, result.phase.name, transform=axes.get_xaxis_transform(), fontsize=7, **_SLANTED)
        index += len(result.rows)


_SLANTED = {"rotation": 20, "ha": "left", "va": "bottom", "color": "0.35"}


def _limit(axes: Any, rows: Sequence[Row], phases: Sequence[PhaseResult]) -> None:
    """Limit the vertical axis: outliers, which would flatten the rest, become arrows at the upper edge, with their values."""
    means = {index: row.mean for index, row in enumerate(rows) if row.mean is not None and row.verdict != "crash"}
    bands = [statistics.mean(result.baseline.values) + sign * result.threshold for result in phases for sign in (-1, 1)]
    low = min([*means.values(), *bands])
    middle = statistics.median(means.values())
    edge = max([middle + ASTRAY * max(middle - low, 1e-9), *bands])
    near = [mean for mean in means.values() if mean <= edge]
    errors = [standard_error(row.values) for row in rows if row.values and row.mean is not None and row.mean <= edge]
    top = max([*near, *bands]) + max(errors)
    margin = 0.08 * (top - low) + 1e-9
    axes.set_ylim(low - max(errors) / 2 - margin, top + margin)
    for index, mean in means.items():
        if mean > top + margin:
            place = {"xy": (index, 1.0), "xytext": (index, 0.93), "xycoords": axes.get_xaxis_transform()}
            axes.annotate(f"{mean:.3g}", **place, arrowprops={"arrowstyle": "->", "color": "0.4"}, fontsize=7, ha="center")


def draw_final(path: Path, rows: Sequence[Row], curves: Sequence[list[Curve]]) -> None:
    """Draw the training loss of the first baseline and of all winners together."""
    standings = [
        Standing(row.experiment, 0.0, row.records, {}, ours, "") for row, ours in zip(rows, curves, strict=True) if ours
    ]
    draw_losses(path, standings, "steps")


def _finish(figure: Figure, axes: Any, path: Path, xlabel: str, ylabel: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside right upper")
    figure.savefig(path, dpi=DPI)
