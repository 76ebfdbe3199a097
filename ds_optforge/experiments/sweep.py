"""`ds-optforge sweep`: named experiments in phases; a phase's winner becomes the next phase's baseline.

Nothing is remembered but the records of the runs: a sweep that was interrupted is walked through again from its beginning, and
launches only what has no record.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from ds_optforge.experiments.changes import changed, described, prepared
from ds_optforge.experiments.compare import check_conditions, tokens_per_step
from ds_optforge.experiments.launching import ExperimentError, Launcher, Record, Run
from ds_optforge.experiments.live import Board
from ds_optforge.experiments.noise import beats, hopeless, threshold
from ds_optforge.experiments.run_files import read_rows
from ds_optforge.experiments.spec import CALIBRATION_STEPS, Experiment, Phase, Sweep
from ds_optforge.validation import ConfigError

Verdict: TypeAlias = Literal["keep", "discard", "crash"]
BASELINE, COMBINED = "baseline", "combined"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the results: an experiment's runs and what became of it. ``values``: the metric, a number a seed."""

    phase: str
    experiment: str
    verdict: Verdict
    values: list[float]
    records: list[Record]
    description: str
    reason: str
    priority: str = ""

    @property
    def mean(self) -> float | None:
        return statistics.mean(self.values) if self.values else None


@dataclass(frozen=True, slots=True)
class PhaseResult:
    """A phase: the baseline that it began with, its threshold, and its experiments in the order they ran."""

    phase: Phase
    baseline: Row
    threshold: float
    rows: list[Row]
    winner: Experiment | None


@dataclass(slots=True)
class Progress:
    """A sweep as far as it has come. ``final``: the first baseline and the combination, on seeds that chose nothing."""

    sweep: Sweep
    phases: list[PhaseResult] = field(default_factory=list)
    first: Row | None = None
    winners: list[Experiment] = field(default_factory=list)
    final: list[Row] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        first = [self.first] if self.first else []
        return [*first, *(row for result in self.phases for row in result.rows), *self.final]

    @property
    def unfinished(self) -> list[PhaseResult]:
        """The phases of which no experiment finished."""
        return [result for result in self.phases if all(row.verdict == "crash" for row in result.rows)]


def run_sweep(sweep: Sweep, launcher: Launcher, board: Board) -> Iterator[Progress]:
    """Walk through the phases; yields after each decision. Raises ExperimentError where there is no baseline to go on with."""
    walk = _Walk(sweep, launcher, board)
    progress = Progress(sweep)
    config = sweep.config
    progress.first = walk.baseline(config)
    yield progress
    baseline = progress.first
    for phase in sweep.phases:
        board.stage(phase.name)
        result = walk.phase(phase, config, baseline)
        progress.phases.append(result)
        if result.winner:
            config = changed(config, result.winner.changes)
            progress.winners.append(result.winner)
            baseline = next(row for row in result.rows if row.verdict == "keep")
        yield progress
    if progress.winners:
        board.stage("all winners together")
        progress.final = walk.final(sweep.config, config, progress.winners)
        yield progress


@dataclass(slots=True)
class _Walk:
    sweep: Sweep
    launcher: Launcher
    board: Board

    def baseline(self, config: Mapping[str, Any]) -> Row:
        """The runs of the first baseline: there is nothing to compare with unless all of its seeds finish."""
        settings = self.sweep.settings
        self.board.stage(f"baseline, {len(settings.seeds)} seeds")
        records = self._launch(((BASELINE, config),), settings.seeds)[0]
        self._check_finished(records)
        row = self._row(BASELINE, BASELINE, "keep", records, described_file(self.sweep), "")
        noise = threshold(row.values)
        self.board.decided(f"baseline: {settings.metric} {row.mean:.4f}; to win is to be better by more than {noise:.4f}")
        return row

    def phase(self, phase: Phase, config: Mapping[str, Any], baseline: Row) -> PhaseResult:
        """Run a phase's experiments a seed at a time, without those that crashed or are behind beyond hope."""
        seeds, experiments = self.sweep.settings.seeds, list(phase.experiments)
        records: dict[str, list[Record]] = {experiment.name: [] for experiment in experiments}
        impossible: dict[str, str] = {}
        configs = {}
        for experiment in experiments:
            try:  # it was checked against the first baseline; with the winners since then it may be impossible
                configs[experiment.name] = changed(config, experiment.changes)
                prepared(configs[experiment.name], self.sweep.settings.steps or CALIBRATION_STEPS)
            except ConfigError as error:
                impossible[experiment.name] = " ".join(str(error).split())
        for seed in seeds:
            racing = [name for name in records if name not in impossible and self._races(records[name], baseline.values)]
            for name, done in zip(racing, self._launch([(name, configs[name]) for name in racing], [seed]), strict=True):
                records[name] += done
        check_conditions([*baseline.records, *(record for group in records.values() for record in group)])
        return self._decide(phase, baseline, records, impossible)

    def _races(self, records: Sequence[Record], baseline: Sequence[float]) -> bool:
        if not all(record.finished for record in records):
            return False
        values = self._values(records)
        return not values or not hopeless(values, baseline)

    def _decide(
        self, phase: Phase, baseline: Row, records: Mapping[str, list[Record]], impossible: Mapping[str, str]
    ) -> PhaseResult:
        complete = {
            name: self._values(group)
            for name, group in records.items()
            if len(group) == len(baseline.values) and all(record.finished for record in group)
        }
        able = [name for name, values in complete.items() if beats(values, baseline.values)]
        best = min(able, key=lambda name: statistics.mean(complete[name]), default=None)
        rows = []
        for experiment in phase.experiments:
            name = experiment.name
            verdict, reason = self._verdict(name, records[name], baseline, best, impossible)
            row = self._row(phase.name, name, verdict, records[name], experiment.description, reason, experiment.priority)
            rows.append(row)
            shown = "no result" if row.mean is None else f"{row.mean:.4f}"
            self.board.decided(f"{name}: {verdict}, {shown}; {reason}")
        winner = next((experiment for experiment in phase.experiments if experiment.name == best), None)
        return PhaseResult(phase, baseline, threshold(baseline.values), rows, winner)

    def _verdict(
        self, name: str, records: Sequence[Record], baseline: Row, best: str | None, impossible: Mapping[str, str]
    ) -> tuple[Verdict, str]:
        if name in impossible:
            return "crash", f"no configuration to run: {impossible[name]}"
        failed = next((record for record in records if not record.finished), None)
        if failed:
            return "crash", f"seed {failed.seed} {failed.status}: {failed.reason} ({failed.folder})"
        change = statistics.mean(self._values(records)) - statistics.mean(baseline.values[: len(records)])
        by = f"{change:+.4f} against the baseline, threshold {threshold(baseline.values):.4f}"
        if name == best:
            return "keep", f"{by}; the next baseline"
        if len(records) < len(baseline.values):
            return "discard", f"{by}; behind after {len(records)} of {len(baseline.values)} seeds"
        if beats(self._values(records), baseline.values):
            return "discard", f"{by}; better, but not as good as {best}"
        return "discard", by

    def final(self, first: Mapping[str, Any], last: Mapping[str, Any], winners: Sequence[Experiment]) -> list[Row]:
        """First baseline and combination once more, with other seeds: those that chose the winners flatter them."""
        seeds = self.sweep.settings.seeds
        fresh = [max(seeds) + 1 + index for index in range(len(seeds))]
        before, after = self._launch(((BASELINE, first), (COMBINED, last)), fresh)
        self._check_finished(before)
        names = " + ".join(winner.name for winner in winners)
        description = f"{names}: {described({path: value for winner in winners for path, value in winner.changes.items()})}"
        title = f"final, seeds {', '.join(map(str, fresh))}"
        row = self._row(title, f"{BASELINE}-again", "keep", before, described_file(self.sweep), "")
        failed = next((record for record in after if not record.finished), None)
        if failed:
            reason = f"seed {failed.seed} {failed.status}: {failed.reason} ({failed.folder})"
            return [row, self._row(title, COMBINED, "crash", after, description, reason)]
        change = statistics.mean(self._values(after)) - statistics.mean(row.values)
        better = beats(self._values(after), row.values)
        reason = f"{change:+.4f} against the first baseline, threshold {threshold(row.values):.4f}"
        self.board.decided(f"{COMBINED}: {reason}")
        return [row, self._row(title, COMBINED, "keep" if better else "discard", after, description, reason)]

    def _launch(self, configs: Sequence[tuple[str, Mapping[str, Any]]], seeds: Sequence[int]) -> list[list[Record]]:
        """The records of each configuration, one a seed; all are launched together."""
        timed = [(name, dict(config), self._steps(name, config)) for name, config in configs]
        runs = [Run(name, prepared(config, steps), seed, steps) for name, config, steps in timed for seed in seeds]
        records = self.launcher.run(runs)
        count = len(seeds)
        return [records[index * count : (index + 1) * count] for index in range(len(configs))]

    def _steps(self, name: str, config: Mapping[str, Any]) -> int:
        """The budget in steps; one in seconds is divided by what a step takes in a short run of its own."""
        settings = self.sweep.settings
        if settings.steps:
            return settings.steps
        config = prepared(config, CALIBRATION_STEPS)
        (record,) = self.launcher.run([Run(f"{name}-timing", config, settings.seeds[0], CALIBRATION_STEPS)])
        if not record.finished:
            return CALIBRATION_STEPS  # the runs themselves will show what is wrong
        late = read_rows(record.folder)[CALIBRATION_STEPS // 2 :]
        tokens = tokens_per_step(record, dict(config))
        step_seconds = statistics.median(tokens / row["tokens_per_second"] for row in late)
        return max(1, int((settings.seconds or 0) / step_seconds))

    def _values(self, records: Sequence[Record]) -> list[float]:
        return [self._value(record) for record in records if record.finished]

    def _value(self, record: Record) -> float:
        metric = self.sweep.settings.metric
        if metric not in record.measured:
            raise ExperimentError(
                f"{self.sweep.file}: metric: got '{metric}', which {record.name} with seed {record.seed} did not produce; "
                f"it has: {', '.join(record.measured) or 'nothing'}. Name one of them; or have the program write it to "
                f"summary.json, remove {record.folder.parent} and run again"
            )
        return record.measured[metric]

    def _row(
        self,
        phase: str,
        experiment: str,
        verdict: Verdict,
        records: Sequence[Record],
        description: str,
        reason: str,
        priority: str = "",
    ) -> Row:
        return Row(phase, experiment, verdict, self._values(records), list(records), description, reason, priority)

    def _check_finished(self, records: Sequence[Record]) -> None:
        for record in records:
            if not record.finished:
                raise ExperimentError(
                    f"{self.sweep.file}: the baseline {record.status} with seed {record.seed}: {record.reason}; see "
                    f"{record.folder / 'log.txt'}, then run again with --retry"
                )


def described_file(sweep: Sweep) -> str:
    """What the first baseline is."""
    return f"{sweep.settings.config} as it is"
