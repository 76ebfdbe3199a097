"""`ds-optforge compare`: several optimizers, one workload, several seeds, the same protocol for all."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_optforge.experiments.changes import described, differences, prepared, steady_start
from ds_optforge.experiments.launching import ExperimentError, Launcher, Record, Run
from ds_optforge.experiments.live import Board
from ds_optforge.experiments.noise import standard_error
from ds_optforge.experiments.run_files import read_rows
from ds_optforge.experiments.spec import Comparison, Contender

METRIC = "validation_loss"


@dataclass(frozen=True, slots=True)
class Curve:
    """The losses of one run, and when each step ended, in seconds from the start of the first."""

    steps: list[int]
    losses: list[float]
    seconds: list[float]


@dataclass(frozen=True, slots=True)
class Figure:
    """The mean over the seeds and its standard error."""

    mean: float
    error: float


@dataclass(frozen=True, slots=True)
class Standing:
    """The results of one configuration.

    Attributes:
        name, lr: its name and learning rate.
        records, curves: its runs, one per seed.
        figures: mean and standard error over the seeds, by name.
        crashed: why there are no figures, or "".
    """

    name: str
    lr: float
    records: list[Record]
    figures: dict[str, Figure]
    curves: list[Curve]
    crashed: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished comparison.

    Attributes:
        comparison: the file.
        standings: the results, the lowest validation loss first.
        steady_after: the step after which the steady-state loss begins.
        notes: sentences for the report.
    """

    comparison: Comparison
    standings: list[Standing]
    steady_after: int
    notes: list[str]


def run_comparison(comparison: Comparison, launcher: Launcher, board: Board) -> Outcome:
    """Launch all runs that have no record yet, and compare the results.

    Raises:
        ConfigError: a configuration is invalid.
        ExperimentError: no configuration finished, or the runs were not made under the same conditions.
    """
    settings, contenders = comparison.settings, comparison.contenders
    configs = [prepared(contender.config, settings.steps) for contender in contenders]
    board.stage(f"{len(contenders)} configurations, {len(settings.seeds)} seeds, {settings.steps} steps")
    runs = [  # a seed at a time: an interrupted comparison has something of everybody
        Run(contender.name, config, seed, settings.steps)
        for seed in settings.seeds
        for contender, config in zip(contenders, configs, strict=True)
    ]
    board.expect(len(runs))
    records = launcher.run(runs)
    check_conditions(records)
    steady_after = max(map(steady_start, configs))
    standings = [
        _standing(contender, records[index :: len(contenders)], steady_after) for index, contender in enumerate(contenders)
    ]
    if all(standing.crashed for standing in standings):
        reasons = "\n".join(f"  {standing.name}: {standing.crashed}" for standing in standings)
        raise ExperimentError(f"{comparison.file}: no configuration finished; run again with --retry\n{reasons}")
    standings.sort(key=lambda standing: standing.figures[METRIC].mean if METRIC in standing.figures else float("inf"))
    return Outcome(comparison, standings, steady_after, _notes(comparison, records, steady_after))


def check_conditions(records: Sequence[Record]) -> None:
    """Raise ExperimentError where finished runs were not made under the same conditions: ranks, data, model, versions."""
    finished = [record for record in records if record.finished]
    for record in finished[1:]:
        for path, one, other in differences(finished[0].conditions, record.conditions):
            raise ExperimentError(
                f"not a fair comparison: {path} is {other!r} in {record.folder}, but {one!r} in {finished[0].folder}; "
                "remove the folder that is out of date, and run again"
            )


def _standing(contender: Contender, records: list[Record], steady_after: int) -> Standing:
    failed = next((record for record in records if not record.finished), None)
    if failed:
        reason = f"seed {failed.seed} {failed.status}: {failed.reason} ({failed.folder})"
        return Standing(contender.name, contender.lr, records, {}, [], reason)
    curves = [curve_of(record, contender.config) for record in records]
    measured = [{**record.measured, **times(record)} for record in records]
    by_name = {name: [each[name] for each in measured if name in each] for name in measured[0]}
    steady = [_steady_loss(curve, steady_after) for curve in curves]
    by_name["steady_loss"] = [loss for loss in steady if loss is not None]
    figures = {
        name: Figure(statistics.mean(values), standard_error(values))
        for name, values in by_name.items()
        if len(values) == len(records)
    }
    return Standing(contender.name, contender.lr, records, figures, curves, "")


def curve_of(record: Record, config: dict[str, Any]) -> Curve:
    """Read the losses of a run's metrics.jsonl against steps and time."""
    rows = read_rows(record.folder)
    tokens = tokens_per_step(record, config)
    seconds, now = [], 0.0
    for row in rows:
        now += tokens / row["tokens_per_second"]
        seconds.append(now)
    return Curve([row["step"] for row in rows], [row["loss"] for row in rows], seconds)


def tokens_per_step(record: Record, config: dict[str, Any]) -> float:
    """Tokens of a global batch, from the configuration and the conditions in summary.json."""
    batch = config.get("train_batch_size")
    if batch is None:
        micro, accumulation = config.get("train_micro_batch_size_per_gpu", 1), config.get("gradient_accumulation_steps", 1)
        batch = micro * accumulation * record.conditions.get("world_size", 1)
    return float(batch * record.conditions.get("sequence_length", 1))


def times(record: Record) -> dict[str, float]:
    """Seconds of a finished run: from its launch to its end, and of the median step, where it wrote its tokens_per_second."""
    found, speed = {"wall_seconds": record.seconds}, record.measured.get("tokens_per_second")
    if speed:
        config = json.loads((record.folder / "config.json").read_text(encoding="utf-8"))
        found["step_seconds"] = tokens_per_step(record, config) / speed
    return found


def _steady_loss(curve: Curve, after: int) -> float | None:
    losses = [loss for step, loss in zip(curve.steps, curve.losses, strict=True) if step > after]
    return statistics.mean(losses) if losses else None


def _notes(comparison: Comparison, records: Sequence[Record], steady_after: int) -> list[str]:
    notes = []
    if comparison.settings.steps <= steady_after:
        notes.append(
            f"There is no steady-state loss: it begins after step {steady_after} (max of 3 x warm-up and 200), and the runs "
            f"have {comparison.settings.steps}."
        )
    commits = sorted({record.commit for record in records})
    if len(commits) > 1:
        notes.append(f"The runs are of different commits: {', '.join(commits)}.")
    return notes


def conditions_of(outcome: Outcome) -> str:
    """Describe the conditions that all runs had in common, in a line."""
    settings = outcome.comparison.settings
    finished = next(record for standing in outcome.standings for record in standing.records if record.finished)
    same = {key: value for key, value in finished.conditions.items() if key != "versions"}
    versions = finished.conditions.get("versions", {})
    seeds = ", ".join(map(str, settings.seeds))
    return f"{settings.steps} steps, seeds {seeds}; {described({**same, **versions})}; commit {finished.commit}"


def folder_of(comparison: Comparison) -> Path:
    """The folder for the results."""
    return Path(comparison.settings.out)
