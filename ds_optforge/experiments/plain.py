"""The results of a comparison or a sweep as JSON's types, for programs."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_optforge.experiments.compare import Outcome, times
from ds_optforge.experiments.launching import Record
from ds_optforge.experiments.noise import standard_error
from ds_optforge.experiments.spec import Phase, Sweep
from ds_optforge.experiments.sweep import PhaseResult, Progress, Row


def plain_comparison(outcome: Outcome, page: Path) -> dict[str, Any]:
    """Return the configurations, the best first, with their figures and runs; ``page`` is the report."""
    return {
        "file": outcome.comparison.file,
        "report": str(page),
        "steady_after": outcome.steady_after,
        "notes": outcome.notes,
        "results": [
            {
                "optimizer": standing.name,
                "lr": standing.lr,
                "crashed": standing.crashed or None,
                "figures": {
                    name: {"mean": figure.mean, "standard_error": figure.error} for name, figure in standing.figures.items()
                },
                "runs": _runs(standing.records),
            }
            for standing in outcome.standings
        ],
    }


def plain_sweep(progress: Progress, page: Path) -> dict[str, Any]:
    """Return the baseline, the phases with their experiments and winners, and the final comparison; ``page`` is the report."""
    return {
        "file": progress.sweep.file,
        "report": str(page),
        "metric": progress.sweep.settings.metric,
        "baseline": _row(progress.first) if progress.first else None,
        "phases": [_phase_result(result) for result in progress.phases],
        "winners": [{"experiment": winner.name, "changes": winner.changes} for winner in progress.winners],
        "final": [_row(row) for row in progress.final],
    }


def plain_plan(sweep: Sweep) -> dict[str, Any]:
    """Return the experiments of a sweep in their order, as ``--dry-run`` does."""
    return {"file": sweep.file, "config": sweep.settings.config, "phases": [_phase(phase) for phase in sweep.phases]}


def _phase(phase: Phase) -> dict[str, Any]:
    found: dict[str, Any] = {"name": phase.name, "experiments": [asdict(experiment) for experiment in phase.experiments]}
    if phase.search:
        ranges = {path: each if isinstance(each, list) else each.model_dump() for path, each in phase.search.ranges.items()}
        found["search"] = {"trials": phase.search.trials, "batch": phase.search.batch, "ranges": ranges}
    return found


def _phase_result(result: PhaseResult) -> dict[str, Any]:
    return {
        "name": result.phase.name,
        "baseline": result.baseline.experiment,
        "threshold": result.threshold,
        "winner": result.winner.name if result.winner else None,
        "experiments": [_row(row) for row in result.rows],
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "experiment": row.experiment,
        "verdict": row.verdict,
        "description": row.description,
        "reason": row.reason,
        "mean": row.mean,
        "standard_error": standard_error(row.values) if row.values else None,
        "runs": _runs(row.records),
    }


def _runs(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [
        {
            "seed": record.seed,
            "status": record.status,
            "reason": record.reason,
            "folder": str(record.folder),
            "measured": {**record.measured, **times(record)} if record.finished else {},
        }
        for record in records
    ]
