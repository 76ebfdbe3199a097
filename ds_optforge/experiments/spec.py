"""The YAML files of `ds-optforge compare` and `ds-optforge sweep`, checked before anything is launched.

Paths in them, those of the launcher included, are relative to the folder that the command is run in.
"""

import itertools
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field, Strict, model_validator

from ds_optforge.config.deepspeed import load_config
from ds_optforge.errors import ConfigError
from ds_optforge.experiments.changes import changed, described, differences, prepared
from ds_optforge.experiments.documents import Document, Location
from ds_optforge.rules.registry import rule_settings
from ds_optforge.validation import Section

REQUIRED = ("config", "out", "seed", "steps")
PLACEHOLDERS = (*REQUIRED, "port", "slot")
PLACEHOLDER = re.compile(r"\{(\w*)\}")
PRIORITIES = ("high", "medium", "low")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,-]*")  # of an experiment: it becomes the name of a folder
CALIBRATION_STEPS = 20
GRID_POINTS = 10_000  # of one phase: more are a slip, or somebody's joke


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("seeds that differ")
    return seeds


Seed: TypeAlias = Annotated[int, Field(ge=0)]
Seeds: TypeAlias = Annotated[tuple[Seed, ...], Strict(False), Field(min_length=2), AfterValidator(_distinct)]
Template: TypeAlias = Annotated[tuple[str, ...], Strict(False), Field(min_length=1)]
Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Priority: TypeAlias = Literal["high", "medium", "low"]


class Launches(Section):
    """Fields that both kinds of file have."""

    out: str = Field(min_length=1, description="a folder for the runs, results.tsv and the report")
    launcher: Template = Field(description="the command, a list of arguments with {config}, {out}, {seed} and {steps} in it")
    seeds: Seeds = Field(description="two or more seeds, a run each")
    timeout: Positive | None = Field(None, description="seconds after which a run is ended and counted as crashed")

    @model_validator(mode="after")
    def _launchable(self) -> "Launches":
        used = {name for argument in self.launcher for name in PLACEHOLDER.findall(argument)}
        unknown, missing = sorted(used.difference(PLACEHOLDERS)), [name for name in REQUIRED if name not in used]
        if unknown:
            raise ValueError(f"launcher: got {{{unknown[0]}}}; allowed: {', '.join(f'{{{name}}}' for name in PLACEHOLDERS)}")
        if missing:
            raise ValueError(f"launcher: {{{missing[0]}}} is in none of its arguments; the program must be told it")
        if shutil.which(self.launcher[0]) is None:
            raise ValueError(f"launcher: got the program {self.launcher[0]!r}, which is not on the path; allowed: one that is")
        return self


class ContenderSection(Section):
    """One configuration of a comparison."""

    config: str = Field(description="a DeepSpeed configuration file")
    lr: Positive = Field(description="its learning rate (optimizer.params.lr): the rules' conventions differ, so no default")
    changes: dict[str, Any] = Field(default_factory=dict, description="values by dotted path, in place of the file's")


class CompareSection(Launches):
    """A file of `ds-optforge compare`."""

    steps: int = Field(ge=1, description="of every run")
    runs: dict[str, Any] = Field(min_length=2, description="the configurations, by name")


class ExperimentSection(Section):
    """One experiment of a phase."""

    changes: dict[str, Any] = Field(min_length=1, description="values by dotted path, in place of the baseline's")
    priority: Priority = "medium"
    first: bool = Field(False, description="try it before the others of its phase")
    description: str = ""


class RangeSection(Section):
    """The values that a search may try at one path."""

    low: int | float = Field(description="the lowest value")
    high: int | float = Field(description="the highest value; where both are whole numbers, all values are")
    log: bool = Field(False, description="as many trials from 0.001 to 0.01 as from 0.01 to 0.1")

    @model_validator(mode="after")
    def _ordered(self) -> "RangeSection":
        if not math.isfinite(self.low) or not math.isfinite(self.high) or self.low >= self.high:
            raise ValueError(f"high: got {self.high} with low {self.low}; allowed: a number above it")
        if self.log and self.low <= 0:
            raise ValueError(f"low: got {self.low} with log; allowed: a number above 0")
        return self


class SearchSection(Section):
    """A search of ranges by Optuna's sampler (TPE)."""

    trials: int = Field(ge=1, description="number of points to try")
    batch: int = Field(1, ge=1, description="points that are proposed together, and so can run at the same time")
    ranges: dict[str, Any] = Field(min_length=1, description="by dotted path: low, high and log, or a list of values")


class PhaseSection(Section):
    """A phase: experiments, a grid of values or a search, of which one may become the next baseline."""

    name: str = Field(min_length=1, description="a title")
    experiments: dict[str, Any] | None = Field(None, min_length=1, description="by name")
    grid: dict[str, list[Any]] | None = Field(None, min_length=1, description="dotted paths, a list of values each")
    search: dict[str, Any] | None = Field(None, description="trials, and ranges of values for Optuna to choose from")

    @model_validator(mode="after")
    def _one(self) -> "PhaseSection":
        given = [name for name in ("experiments", "grid", "search") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"experiments: got {' and '.join(given) or 'none'} of experiments, grid and search; allowed: one of them"
            )
        return self


class SweepSection(Launches):
    """A file of `ds-optforge sweep`."""

    config: str = Field(description="the first baseline, a DeepSpeed configuration file")
    metric: str = Field("validation_loss", description="a number of summary.json, the lower the better")
    steps: int | None = Field(None, ge=1, description="of every run")
    seconds: Positive | None = Field(None, description="of training in every run, in place of steps")
    phases: list[Any] = Field(min_length=1, description="in the order to run them in")

    @model_validator(mode="after")
    def _one_budget(self) -> "SweepSection":
        if (self.steps is None) == (self.seconds is None):
            raise ValueError("steps: got both of or none of steps and seconds; allowed: one of them")
        return self


@dataclass(frozen=True, slots=True)
class Contender:
    """A configuration of a comparison, with its learning rate and changes applied."""

    name: str
    config: dict[str, Any]
    lr: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """A checked file of `ds-optforge compare`."""

    file: str
    settings: CompareSection
    contenders: tuple[Contender, ...]


@dataclass(frozen=True, slots=True)
class Experiment:
    """Named changes to the baseline."""

    name: str
    changes: dict[str, Any]
    priority: Priority
    first: bool
    description: str


@dataclass(frozen=True, slots=True)
class Search:
    """How many points to try, how many together, and of what: by dotted path a range or a list of values."""

    trials: int
    batch: int
    ranges: dict[str, RangeSection | list[Any]]


@dataclass(frozen=True, slots=True)
class Phase:
    """Experiments in the order to run them in, and the axes where they are a grid; or a search, which makes them as it goes."""

    name: str
    experiments: tuple[Experiment, ...]
    grid: dict[str, list[Any]] | None = None
    search: Search | None = None

    @property
    def size(self) -> int:
        """The number of experiments."""
        return self.search.trials if self.search else len(self.experiments)


@dataclass(frozen=True, slots=True)
class Sweep:
    """A checked file of `ds-optforge sweep`."""

    file: str
    settings: SweepSection
    config: dict[str, Any]
    phases: tuple[Phase, ...]


def read_comparison(path: Path, steps: int | None = None, out: str | None = None) -> Comparison:
    """Read and check a file of `ds-optforge compare`.

    Args:
        path: the file.
        steps, out: replace the file's values unless they are None.

    Raises:
        ConfigError: the file or a configuration is invalid, or the comparison is not fair.
    """
    document = Document.read(path)
    settings = document.section(CompareSection, _replaced(document.content, steps=steps, out=out))
    contenders = tuple(_contender(document, name, value, settings.steps) for name, value in settings.runs.items())
    for other in contenders[1:]:
        _check_fair(document, contenders[0], other)
    return Comparison(str(path), settings, contenders)


def read_sweep(path: Path, steps: int | None = None, out: str | None = None) -> Sweep:
    """Read and check a file of `ds-optforge sweep`.

    Args:
        path: the file.
        steps, out: replace the file's values unless they are None; ``steps`` also replaces ``seconds``.

    Raises:
        ConfigError: the file, the baseline or an experiment is invalid.
    """
    document = Document.read(path)
    content = _replaced(document.content, steps=steps, out=out)
    if steps:
        content.pop("seconds", None)
    settings = document.section(SweepSection, content)
    config = _configured(document, settings.config, {}, settings.steps, "config")
    phases = tuple(_phase(document, index, value, config, settings.steps) for index, value in enumerate(settings.phases))
    _check_names(document, phases)
    return Sweep(str(path), settings, config, phases)


def _replaced(content: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    return {**content, **{key: value for key, value in given.items() if value is not None}}


def _configured(document: Document, file: str, changes: Mapping[str, Any], steps: int | None, *location: str) -> dict[str, Any]:
    try:
        config = changed(load_config(file), changes)
        prepared(config, steps or CALIBRATION_STEPS)
    except ConfigError as error:
        document.fail(f"no configuration to run: {error}", *location)
    return config


def _contender(document: Document, name: str, value: Any, steps: int) -> Contender:
    place = ("runs", name)
    _check_name(document, name, *place)
    section = document.section(ContenderSection, value, *place)
    changes = {"optimizer.params.lr": section.lr, **section.changes}
    return Contender(name, _configured(document, section.config, changes, steps, *place), section.lr)


def _check_fair(document: Document, one: Contender, other: Contender) -> None:
    """Refuse differences outside the optimizer section; the schedule may differ where a rule must have none."""
    free = {"optimizer"}
    if any(_replaces_schedule(contender) for contender in (one, other)):
        free.add("scheduler")
    for path, ours, theirs in differences(one.config, other.config):
        if path.partition(".")[0] not in free:
            document.fail(
                f"not a fair comparison: {path} is {theirs!r}, but {ours!r} for '{one.name}'; "
                "allowed: the same (only the optimizer section may differ)",
                "runs",
                other.name,
            )


def _replaces_schedule(contender: Contender) -> bool:
    match contender.config:
        case {"optimizer": {"params": {"name": name}}}:
            settings = rule_settings(name)
            return settings is not None and settings.builds.replaces_schedule
    return False


def _phase(document: Document, index: int, value: Any, config: Mapping[str, Any], steps: int | None) -> Phase:
    place: Location = ("phases", index)
    section = document.section(PhaseSection, value, *place)
    if section.search is not None:
        return Phase(section.name, (), search=_search(document, section.search, config, steps, *place, "search"))
    locations: list[Location]
    if section.grid is not None:
        experiments = _grid(document, section.grid, *place, "grid")
        locations = [(*place, "grid")] * len(experiments)
    else:
        items = (section.experiments or {}).items()
        locations = [(*place, "experiments", name) for name, _ in items]
        experiments = [_experiment(document, name, item, *place, "experiments", name) for name, item in items]
    for experiment, location in zip(experiments, locations, strict=True):
        _check_possible(document, config, experiment.changes, steps, *location)
    ordered = sorted(experiments, key=lambda experiment: (not experiment.first, PRIORITIES.index(experiment.priority)))
    return Phase(section.name, tuple(ordered), section.grid)


def _check_possible(
    document: Document, config: Mapping[str, Any], changes: Mapping[str, Any], steps: int | None, *place: str | int
) -> None:
    try:
        prepared(changed(config, changes), steps or CALIBRATION_STEPS)
    except ConfigError as error:
        document.fail(f"no configuration to run: {error}", *place)


def _search(document: Document, value: Any, config: Mapping[str, Any], steps: int | None, *place: str | int) -> Search:
    """Read a search, and check both ends of each range and each listed value, one at a time."""
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError:
        document.fail("needs Optuna, which is not installed; run: pip install 'ds-optforge[optuna]'", *place)
    section = document.section(SearchSection, value, *place)
    ranges: dict[str, RangeSection | list[Any]] = {}
    for path, given in section.ranges.items():
        where = (*place, "ranges", path)
        if given == []:
            document.fail("got an empty list; allowed: one value or more", *where)
        found = given if isinstance(given, list) else document.section(RangeSection, given, *where)
        ranges[path] = found
        for end in found if isinstance(found, list) else (found.low, found.high):
            _check_possible(document, config, {path: end}, steps, *where)
    return Search(section.trials, section.batch, ranges)


def _experiment(document: Document, name: str, value: Any, *place: str | int) -> Experiment:
    _check_name(document, name, *place)
    section = document.section(ExperimentSection, value, *place)
    description = " ".join(section.description.split()) or described(section.changes)
    return Experiment(name, section.changes, section.priority, section.first, description)


def _grid(document: Document, grid: Mapping[str, list[Any]], *place: str | int) -> list[Experiment]:
    for path, values in grid.items():
        if not values:
            document.fail("got an empty list; allowed: one value or more", *place, path)
    if (points := math.prod(map(len, grid.values()))) > GRID_POINTS:
        document.fail(f"got {points} experiments; allowed: {GRID_POINTS}", *place)
    experiments = []
    for point in itertools.product(*grid.values()):
        changes = dict(zip(grid, point, strict=True))
        name = ",".join(f"{path.rpartition('.')[2]}={value}" for path, value in changes.items())
        _check_name(document, name, *place)
        experiments.append(Experiment(name, changes, "medium", False, described(changes)))
    return experiments


def _check_name(document: Document, name: str, *place: str | int) -> None:
    if not NAME.fullmatch(name) or name == "baseline":
        document.fail(f"got the name {name!r}; allowed: letters, digits and . _ + = , - (it names a folder)", *place)


def _check_names(document: Document, phases: tuple[Phase, ...]) -> None:
    seen: dict[str, int] = {}
    for index, phase in enumerate(phases):
        for experiment in phase.experiments:
            if experiment.name in seen and phase.grid is None:
                document.fail(
                    f"a second '{experiment.name}', the first is in phases[{seen[experiment.name]}]; allowed: other names",
                    *("phases", index, "experiments", experiment.name),
                )
            seen.setdefault(experiment.name, index)
