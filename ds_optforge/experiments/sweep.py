"""`ds-optforge sweep`: named experiments in phases; a phase's winner becomes the next phase's baseline.

The only memory is the records of the runs: an interrupted sweep starts again from its beginning, and launches only the runs
that have no record.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from ds_optforge.errors import ConfigError
from ds_optforge.experiments.changes import changed, described, prepared
from ds_optforge.experiments.compare import check_conditions, tokens_per_step
from ds_optforge.experiments.launching import ExperimentError, Launcher, Record, Run
from ds_optforge.experiments.live import Board
from ds_optforge.experiments.noise import beats, hopeless, threshold
from ds_optforge.experiments.run_files import read_rows
from ds_optforge.experiments.spec import CALIBRATION_STEPS, Experiment, Phase, Search, Sweep

Verdict: TypeAlias = Literal["keep", "discard", "crash"]
BASELINE, COMBINED = "baseline", "combined"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the results: an experiment and its verdict.

    Attributes:
        phase, experiment, priority, description: those of the file.
        verdict, reason: the decision, and its grounds.
        values: the metric, one number per seed.
        records: the runs, one per seed.
    """

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
        """Mean of the metric over the seeds; None without values."""
        return statistics.mean(self.values) if self.values else None


@dataclass(frozen=True, slots=True)
class PhaseResult:
    """A phase that has ended: the baseline that it began with, its threshold, and its experiments in the order they ran."""

    phase: Phase
    baseline: Row
    threshold: float
    rows: list[Row]
    winner: Experiment | None


@dataclass(slots=True)
class Progress:
    """A sweep in progress.

    Attributes:
        sweep: the file.
        phases: the phases that have ended.
        first: the first baseline.
        winners: the winner of each phase that has one.
        final: the first baseline and all winners together, on seeds that chose none of them.
    """

    sweep: Sweep
    phases: list[PhaseResult] = field(default_factory=list)
    first: Row | None = None
    winners: list[Experiment] = field(default_factory=list)
    final: list[Row] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        """All lines of the results, in the order they ran."""
        first = [self.first] if self.first else []
        return [*first, *(row for result in self.phases for row in result.rows), *self.final]

    @property
    def unfinished(self) -> list[PhaseResult]:
        """The phases in which no experiment finished."""
        return [result for result in self.phases if all(row.verdict == "crash" for row in result.rows)]


def run_sweep(sweep: Sweep, launcher: Launcher, board: Board) -> Iterator[Progress]:
    """Run the phases in order; yield the progress after each decision.

    Raises:
        ExperimentError: a baseline did not finish, or runs lack the metric or were not made under the same conditions.
    """
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
class _Race:
    """The experiments of a phase under way.

    Attributes:
        config, baseline: what they change, and what they have to beat.
        experiments: in the order they run.
        configs: by name, of those that are possible.
        impossible: by name, why others are not.
        records: by name, the runs so far.
    """

    config: Mapping[str, Any]
    baseline: Row
    experiments: list[Experiment] = field(default_factory=list)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    impossible: dict[str, str] = field(default_factory=dict)
    records: dict[str, list[Record]] = field(default_factory=dict)


@dataclass(slots=True)
class _Walk:
    """Runs the steps of a sweep."""

    sweep: Sweep
    launcher: Launcher
    board: Board

    def baseline(self, config: Mapping[str, Any]) -> Row:
        """Run the first baseline, all of whose seeds must finish."""
        settings = self.sweep.settings
        self.board.stage(f"baseline, {len(settings.seeds)} seeds")
        self.board.expect(len(settings.seeds) + self._runs_after(None))
        records = self._launch(((BASELINE, config),), settings.seeds)[0]
        self._check_finished(records)
        row = self._row(BASELINE, BASELINE, "keep", records, described_file(self.sweep), "")
        noise = threshold(row.values)
        self.board.decided(f"baseline: {settings.metric} {row.mean:.4f}; to win is to be better by more than {noise:.4f}")
        return row

    def phase(self, phase: Phase, config: Mapping[str, Any], baseline: Row) -> PhaseResult:
        """Run a phase's experiments seed by seed, dropping those that crashed or are hopeless (`noise.hopeless`)."""
        first, *others = self.sweep.settings.seeds
        race, later = _Race(config, baseline), self._runs_after(phase)
        if phase.search:
            self._search(phase.search, race, first, later)
        else:
            self._enter(race, phase.experiments)
            self.board.expect(len(race.configs) * len(self.sweep.settings.seeds) + later)
            self._run(race, list(race.configs), first)
        for index, seed in enumerate(others):
            racing = [name for name in race.configs if self._races(race.records[name], baseline.values)]
            self.board.expect(len(racing) * (len(others) - index) + later)
            self._run(race, racing, seed)
        check_conditions([*baseline.records, *(record for group in race.records.values() for record in group)])
        return self._decide(phase, race)

    def _runs_after(self, phase: Phase | None) -> int:
        """The most runs that the phases after this one (None: all of them) and the final comparison have."""
        phases = self.sweep.phases
        left = phases if phase is None else phases[[each is phase for each in phases].index(True) + 1 :]
        return len(self.sweep.settings.seeds) * (sum(each.size for each in left) + 2)

    def _search(self, search: Search, race: "_Race", seed: int, later: int) -> None:
        """Run the points that a searcher proposes with the first seed, whose results it chooses the next ones by."""
        from ds_optforge.experiments.search import Searcher  # Optuna takes a second to import, and is an extra

        searcher, others = Searcher(search, seed), len(self.sweep.settings.seeds) - 1
        for begun in range(0, search.trials, search.batch):
            proposed = searcher.propose(min(search.batch, search.trials - begun))
            self._enter(race, proposed)
            self.board.expect(search.trials * (1 + others) - begun + later)
            self._run(race, [experiment.name for experiment in proposed if experiment.name in race.configs], seed)
            for experiment in proposed:
                finished = self._values(race.records[experiment.name])
                searcher.tell(experiment.name, finished[0] if finished else None)

    def _enter(self, race: "_Race", experiments: Sequence[Experiment]) -> None:
        for experiment in experiments:
            race.experiments.append(experiment)
            race.records[experiment.name] = []
            try:  # it was checked against the first baseline; with the winners since then it may be impossible
                config = changed(race.config, experiment.changes)
                prepared(config, self.sweep.settings.steps or CALIBRATION_STEPS)
            except ConfigError as error:
                race.impossible[experiment.name] = " ".join(str(error).split())
            else:
                race.configs[experiment.name] = config

    def _run(self, race: "_Race", names: Sequence[str], seed: int) -> None:
        """Run one seed of these experiments."""
        for name, done in zip(names, self._launch([(name, race.configs[name]) for name in names], [seed]), strict=True):
            race.records[name] += done

    def _races(self, records: Sequence[Record], baseline: Sequence[float]) -> bool:
        if not all(record.finished for record in records):
            return False
        values = self._values(records)
        return not values or not hopeless(values, baseline)

    def _decide(self, phase: Phase, race: "_Race") -> PhaseResult:
        baseline, records = race.baseline, race.records
        complete = {
            name: self._values(group)
            for name, group in records.items()
            if len(group) == len(baseline.values) and all(record.finished for record in group)
        }
        able = [name for name, values in complete.items() if beats(values, baseline.values)]
        best = min(able, key=lambda name: statistics.mean(complete[name]), default=None)
        rows = []
        for experiment in race.experiments:
            name = experiment.name
            verdict, reason = self._verdict(name, records[name], baseline, best, race.impossible)
            row = self._row(phase.name, name, verdict, records[name], experiment.description, reason, experiment.priority)
            rows.append(row)
            shown = "no result" if row.mean is None else f"{row.mean:.4f}"
            self.board.decided(f"{name}: {verdict}, {shown}; {reason}")
        winner = next((experiment for experiment in race.experiments if experiment.name == best), None)
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
        """Run the first baseline and the combination with other seeds: those that chose the winners would flatter them."""
        seeds = self.sweep.settings.seeds
        fresh = [max(seeds) + 1 + index for index in range(len(seeds))]
        self.board.expect(2 * len(seeds))
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
        """Launch all configurations with all seeds together; return the records of each configuration, one per seed."""
        timed = [(name, dict(config), self._steps(name, config)) for name, config in configs]
        runs = [Run(name, prepared(config, steps), seed, steps) for name, config, steps in timed for seed in seeds]
        records = self.launcher.run(runs)
        count = len(seeds)
        return [records[index * count : (index + 1) * count] for index in range(len(configs))]

    def _steps(self, name: str, config: Mapping[str, Any]) -> int:
        """The budget in steps; a budget in seconds is divided by the time of a step, measured in a short run."""
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
    """Describe the first baseline."""
    return f"{sweep.settings.config} as it is"
