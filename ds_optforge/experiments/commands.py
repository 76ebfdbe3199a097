"""The commands `ds-optforge compare` and `ds-optforge sweep`, after their arguments have been parsed."""

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from ds_optforge.experiments import report
from ds_optforge.experiments.changes import described
from ds_optforge.experiments.compare import METRIC, run_comparison
from ds_optforge.experiments.launching import ExperimentError, Launcher
from ds_optforge.experiments.live import Board
from ds_optforge.experiments.plain import plain_comparison, plain_plan, plain_sweep
from ds_optforge.experiments.spec import Search, Sweep, read_comparison, read_sweep
from ds_optforge.experiments.sweep import run_sweep

FAILED, INTERRUPTED = 1, 130  # exit statuses; 130 is what a shell gives for an interrupt


def compare(options: argparse.Namespace) -> int:
    """Run a comparison and write its table, results.tsv, plots and report.

    Returns:
        The exit status: 0, `FAILED` or `INTERRUPTED`.

    Raises:
        ConfigError: the file is invalid or unfair.
    """
    comparison = read_comparison(options.file, options.steps, options.out)
    settings, console = comparison.settings, _console(options.json)
    board = Board(f"compare {options.file}", METRIC, console, options.parallel)
    launcher = Launcher(settings.launcher, Path(settings.out), board, settings.timeout, options.parallel, options.retry)
    with _reported() as failure, launcher.opened():
        with board:
            outcome = run_comparison(comparison, launcher, board)
        console.print(report.comparison_table(outcome))
        page = report.write_comparison(outcome)
        console.print(f"{page}: the report", markup=False, highlight=False, soft_wrap=True)
        if options.json:
            print(json.dumps(plain_comparison(outcome, page), indent=2))
        failure.status = FAILED if any(standing.crashed for standing in outcome.standings) else 0
    return failure.status


def sweep(options: argparse.Namespace) -> int:
    """Run a sweep, and write results.tsv and the report after each decision.

    Returns:
        The exit status: 0, `FAILED` (also where no experiment of a phase finished) or `INTERRUPTED`.

    Raises:
        ConfigError: the file is invalid.
    """
    read = read_sweep(options.file, options.steps, options.out)
    settings, console = read.settings, _console(options.json)
    if options.dry_run:
        if options.json:
            print(json.dumps(plain_plan(read), indent=2))
        else:
            print_plan(read, console)
        return 0
    board = Board(f"sweep {options.file}", settings.metric, console, options.parallel)
    launcher = Launcher(settings.launcher, Path(settings.out), board, settings.timeout, options.parallel, options.retry)
    with _reported() as failure, launcher.opened():
        with board:
            for progress in run_sweep(read, launcher, board):
                page = report.write_sweep(progress)
        for table in report.sweep_tables(progress):
            console.print(table)
        console.print(report.sweep_summary(progress), markup=False, highlight=False)
        console.print(f"{page}: the report", markup=False, highlight=False, soft_wrap=True)
        if options.json:
            print(json.dumps(plain_sweep(progress, page), indent=2))
        if progress.unfinished:
            phases = ", ".join(f"'{result.phase.name}'" for result in progress.unfinished)
            raise ExperimentError(
                f"{options.file}: no experiment of {phases} finished; see the log.txt in their folders of "
                f"{Path(settings.out) / 'runs'}, then run again with --retry"
            )
    return failure.status


def print_plan(sweep: Sweep, console: Console) -> None:
    """Print the experiments of a sweep in their order."""
    settings = sweep.settings
    budget = f"{settings.steps} steps" if settings.steps else f"{settings.seconds:g} seconds"
    experiments = sum(phase.size for phase in sweep.phases)
    lines = [
        f"{experiments} experiments in {len(sweep.phases)} phases; {budget} and up to {len(settings.seeds)} seeds each",
        f"baseline: {settings.config}",
    ]
    for phase in sweep.phases:
        lines.append(f"{phase.name}:")
        if phase.search:
            lines += _described_search(phase.search)
        width = max((len(experiment.name) for experiment in phase.experiments), default=0)
        for experiment in phase.experiments:
            marks = experiment.priority + (", first" if experiment.first else "")
            text = described(experiment.changes)
            own = f"  ({experiment.description})" if experiment.description != text else ""
            lines.append(f"  {experiment.name:<{width}}  {marks:<13}  {text}{own}")
    lines.append("combined: all winners, against the first baseline, with other seeds")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _described_search(search: Search) -> Iterator[str]:
    yield f"  {search.trials} trials, {search.batch} at a time, of"
    for path, values in search.ranges.items():
        if isinstance(values, list):
            yield f"  {path}: one of {', '.join(map(str, values))}"
        else:
            yield f"  {path}: {values.low:g} to {values.high:g}{', in logarithms' if values.log else ''}"


def _console(as_json: bool) -> Console:
    """A console as wide as the terminal; without one, wide enough for the tables. JSON has standard output for itself."""
    terminal = (sys.stderr if as_json else sys.stdout).isatty()
    return Console(width=None if terminal else 160, stderr=as_json, force_terminal=terminal)


class _Status:
    """The exit status, which the `with` block may set."""

    status = 0


@contextmanager
def _reported() -> Iterator[_Status]:
    """Turn errors and interrupts into a message and an exit status; SIGTERM counts as an interrupt."""
    outcome = _Status()
    earlier = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield outcome
    except ExperimentError as error:
        print(error, file=sys.stderr)
        outcome.status = FAILED
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        outcome.status = INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
