"""The results of a comparison or a sweep: tables, results.tsv, results.md, pictures, and a page that needs no server."""

import base64
import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.table import Table
from rich.text import Text

from ds_optforge.experiments import plots
from ds_optforge.experiments.compare import Outcome, Standing, conditions_of, curve_of, times
from ds_optforge.experiments.noise import standard_error
from ds_optforge.experiments.run_files import replace_text
from ds_optforge.experiments.sweep import COMBINED, PhaseResult, Progress, Row

STYLES = {"keep": "green", "crash": "red"}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. ``text`` aligns it left; ``wide`` lets its text take several lines."""

    heading: str
    text: bool = False
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A row of a table. ``kind`` is "keep", "crash" or "" and sets its color."""

    cells: list[str]
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Grid:
    """The metric over the two axes of a grid; a grid of more axes has its table alone."""

    rows_name: str
    columns_name: str
    columns: list[str]
    rows: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table that is shown on the terminal, in Markdown and on the page."""

    title: str
    columns: list[Column]
    rows: list[Line]


@dataclass(frozen=True, slots=True)
class Part:
    """A section of the report's page: a title, and any of text, picture, table and grid."""

    title: str
    text: str = ""
    image: str = ""
    table: Sheet | None = None
    grid: Grid | None = None


@dataclass(frozen=True, slots=True)
class Measure:
    """A number of a comparison: key, heading and format. ``error`` shows its standard error too; tables divide by ``unit``."""

    key: str
    heading: str
    format: str
    error: bool = False
    unit: float = 1.0

    def text(self, value: float) -> str:
        """Format a value in the measure's unit."""
        return f"{value / self.unit:{self.format}}"


COSTS = (
    Measure("step_seconds", "step, ms", ",.1f", unit=1e-3),
    Measure("wall_seconds", "run, s", ",.1f"),
    Measure("optimizer_bytes_per_step", "sent, MB a step", ",.2f", unit=1e6),
)
MEASURES = (
    Measure("validation_loss", "validation loss", ".4f", error=True),
    Measure("steady_loss", "steady-state training loss", ".4f", error=True),
    Measure("grad_norm", "grad norm", ".3f"),
    Measure("tokens_per_second", "tokens/s", ",.0f"),
    *COSTS,
    Measure("peak_memory_gb", "peak memory, GB", ".2f"),
    Measure("state_bytes_per_parameter", "state, bytes per parameter", ".2f"),
)
BANDS = "Mean over the seeds; the band is from the lowest seed to the highest."
ABOUT_COSTS = (
    "A step is the median one. A run is timed from its launch to its end, with start-up and evaluation. What is sent is for "
    "the optimizer, by the rank that sends most, as the program says it (optimizer_bytes_per_step in its summary.json)."
)
RESULTS = ["commit", "experiment", "metric", "memory_gb", "status", "description"]


def comparison_sheet(outcome: Outcome) -> Sheet:
    """Make the table of a comparison: a row for each configuration, the best first."""
    columns = [Column("optimizer", text=True), Column("learning rate"), *(Column(measure.heading) for measure in MEASURES)]
    rows = []
    for standing in outcome.standings:
        cells = [standing.name, f"{standing.lr:g}"]
        if standing.crashed:
            cells += ["crash", *[""] * (len(MEASURES) - 1)]
        else:
            cells += [_figure(standing, measure) for measure in MEASURES]
        rows.append(Line(cells, "crash" if standing.crashed else ""))
    seeds = len(outcome.comparison.settings.seeds)
    return Sheet(f"mean ± standard error over {seeds} seeds", columns, rows)


def _figure(standing: Standing, measure: Measure) -> str:
    figure = standing.figures.get(measure.key)
    if figure is None:
        return "–"
    return measure.text(figure.mean) + (f" ± {measure.text(figure.error)}" if measure.error else "")


def comparison_table(outcome: Outcome) -> Table:
    """Make the table of a comparison for the terminal."""
    return _rich(comparison_sheet(outcome), caption="\n".join(outcome.notes))


def write_comparison(outcome: Outcome) -> Path:
    """Write results.tsv, results.md, two plots and report.html; return the path of report.html."""
    out = Path(outcome.comparison.settings.out)
    sheet = comparison_sheet(outcome)
    replace_text(out / "results.md", markdown(sheet))
    replace_text(out / "results.tsv", tab_separated(*_comparison_values(outcome)))
    plots.draw_losses(out / "loss_by_step.png", outcome.standings, "steps", outcome.steady_after)
    plots.draw_losses(out / "loss_by_time.png", outcome.standings, "seconds")
    crashes = [f"{standing.name}: {standing.crashed}" for standing in outcome.standings if standing.crashed]
    parts = [
        Part("Results", f"{sheet.title}. {ABOUT_COSTS}", table=sheet),
        Part("Loss against steps", BANDS, _inline(out, "loss_by_step")),
        Part("Loss against time", f"{BANDS} Start-up and evaluation are not counted.", _inline(out, "loss_by_time")),
    ]
    configs = [(contender.name, _json(contender.config)) for contender in outcome.comparison.contenders]
    title = f"Comparison {Path(outcome.comparison.file).name}"
    return _write_page(out, title, conditions_of(outcome), [], [*outcome.notes, *crashes], parts, configs)


def _comparison_values(outcome: Outcome) -> tuple[list[str], list[list[Any]]]:
    header = ["commit", "optimizer", "lr", "seeds", "status", *(measure.key for measure in MEASURES)]
    header += [f"{measure.key}_standard_error" for measure in MEASURES if measure.error]
    rows = []
    for standing in outcome.standings:
        figures = [standing.figures.get(measure.key) for measure in MEASURES]
        errors = [standing.figures.get(measure.key) for measure in MEASURES if measure.error]
        values = [f"{figure.mean:.6g}" if figure else "" for figure in figures]
        values += [f"{figure.error:.3g}" if figure else "" for figure in errors]
        status = "crash" if standing.crashed else "keep"
        rows.append([standing.records[0].commit, standing.name, standing.lr, len(standing.records), status, *values])
    return header, rows


def sweep_sheets(progress: Progress) -> list[Sheet]:
    """Make the tables of a sweep: the baseline, each phase, and the final comparison."""
    metric = progress.sweep.settings.metric
    sheets = [_sweep_sheet("Baseline", [progress.first], metric)] if progress.first else []
    sheets += [_sweep_sheet(result.phase.name, result.rows, metric) for result in progress.phases]
    if progress.final:
        sheets.append(_sweep_sheet(f"All winners together, {progress.final[0].phase}", progress.final, metric))
    return sheets


def _sweep_sheet(title: str, rows: Sequence[Row], metric: str) -> Sheet:
    columns = [Column("experiment", text=True), Column(metric), Column("seeds")]
    columns += [*(Column(measure.heading) for measure in COSTS), Column("memory, GB")]
    columns += [Column("status", text=True), Column("change", text=True, wide=True), Column("verdict", text=True, wide=True)]
    lines = []
    for row in rows:
        value = "–" if row.mean is None else f"{row.mean:.4f}"
        if len(row.values) > 1:
            value += f" ± {standard_error(row.values):.4f}"
        cells = [row.experiment, value, str(len(row.values)), *(_cost(row, measure) for measure in COSTS), _memory(row)]
        cells += [row.verdict, row.description, row.reason]
        lines.append(Line(cells, "" if row.verdict == "discard" else row.verdict))
    return Sheet(title, columns, lines)


def _cost(row: Row, measure: Measure) -> str:
    measured = [{**record.measured, **times(record)} for record in row.records if record.finished]
    values = [each[measure.key] for each in measured if measure.key in each]
    return measure.text(statistics.mean(values)) if values else "–"


def _memory(row: Row) -> str:
    peaks = [record.measured["peak_memory_gb"] for record in row.records if "peak_memory_gb" in record.measured]
    return f"{max(peaks):.2f}" if peaks else ""


def sweep_tables(progress: Progress) -> list[Table]:
    """Make the tables of a sweep for the terminal."""
    return [_rich(sheet) for sheet in sweep_sheets(progress)]


def sweep_summary(progress: Progress) -> str:
    """Describe the result of a sweep in a sentence or two."""
    if not progress.winners:
        return "No experiment beat the baseline by more than the noise between seeds."
    names = ", ".join(winner.name for winner in progress.winners)
    text = f"Winners: {names}."
    if progress.final:
        text += f" All together, on seeds that chose none of them: {progress.final[-1].reason}."
    return text


def write_sweep(progress: Progress) -> Path:
    """Write results.tsv, results.md, the plots and report.html of a sweep in progress; return the path of report.html."""
    out = Path(progress.sweep.settings.out)
    sheets = sweep_sheets(progress)
    replace_text(out / "results.tsv", tab_separated(RESULTS, [_result(row) for row in progress.rows]))
    replace_text(out / "results.md", "\n".join(f"### {sheet.title}\n\n{markdown(sheet)}" for sheet in sheets))
    plots.draw_sweep(out / "experiments.png", progress)
    text = "Dots: mean and standard error over the seeds. Lines: the baseline of the phase, with its noise threshold."
    parts = [Part("All experiments", f"{text} {ABOUT_COSTS}", _inline(out, "experiments"))]
    if progress.final:
        config = progress.sweep.config
        curves = [[curve_of(record, config) for record in row.records if record.finished] for row in progress.final]
        plots.draw_final(out / "final.png", progress.final, curves)
        parts.append(Part("First baseline and all winners together", BANDS, _inline(out, "final")))
    grids = {result.phase.name: _grid(result) for result in progress.phases}
    parts += [Part(sheet.title, table=sheet, grid=grids.get(sheet.title)) for sheet in sheets]
    title = f"Sweep {Path(progress.sweep.file).name}"
    configs = [("first baseline", _json(progress.sweep.config))]
    lead = [sweep_summary(progress)] if len(progress.phases) == len(progress.sweep.phases) else ["The sweep is under way."]
    return _write_page(out, title, _about(progress), lead, [], parts, configs)


def _about(progress: Progress) -> str:
    settings = progress.sweep.settings
    budget = f"{settings.steps} steps" if settings.steps else f"{settings.seconds:g} seconds"
    seeds = ", ".join(map(str, settings.seeds))
    return f"{settings.config}; {settings.metric}, lower is better; {budget} a run; seeds {seeds}"


def _result(row: Row) -> list[Any]:
    commit = row.records[-1].commit if row.records else "unknown"
    metric = "" if row.mean is None else f"{row.mean:.6f}"
    name = "" if row.experiment == COMBINED or row.phase == row.experiment else f"{row.phase}: "
    reason = f"; {row.reason}" if row.reason else ""
    return [commit, row.experiment, metric, _memory(row), row.verdict, f"{name}{row.description}{reason}"]


def _grid(result: PhaseResult) -> Grid | None:
    grid = result.phase.grid
    if grid is None or len(grid) != 2:
        return None
    (rows_name, down), (columns_name, across) = grid.items()
    means = {row.experiment: row.mean for row in result.rows}
    by_values = {
        tuple(map(repr, experiment.changes.values())): means[experiment.name] for experiment in result.phase.experiments
    }
    known = [mean for mean in means.values() if mean is not None]
    rows = [
        {"value": value, "cells": [_shaded(by_values[repr(value), repr(other)], known) for other in across]} for value in down
    ]
    return Grid(rows_name.rpartition(".")[2], columns_name.rpartition(".")[2], [str(value) for value in across], rows)


def _shaded(mean: float | None, known: Sequence[float]) -> dict[str, str]:
    if mean is None:
        return {"text": "crash", "color": "#fbe3e1"}
    low, middle = min(known), statistics.median(known)
    share = max(0.0, min(1.0, 1 - (mean - low) / max(2 * (middle - low), 1e-12)))
    return {"text": f"{mean:.4f}", "color": f"rgba(46, 125, 50, {0.45 * share:.2f})"}


def markdown(sheet: Sheet) -> str:
    """Format a table as Markdown."""
    rule = "| " + " | ".join("---" if column.text else "---:" for column in sheet.columns) + " |"
    lines = ["| " + " | ".join(column.heading for column in sheet.columns) + " |", rule]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells) + " |" for row in sheet.rows]
    return "\n".join(lines) + "\n"


def tab_separated(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format results.tsv; line ends inside a cell become spaces."""
    file = io.StringIO()
    writer = csv.writer(file, delimiter="\t", lineterminator="\n")
    writer.writerow(header)
    writer.writerows([" ".join(str(cell).split()) for cell in row] for row in rows)
    return file.getvalue()


def _rich(sheet: Sheet, caption: str = "") -> Table:
    table = Table(title=sheet.title, title_justify="left", caption=caption or None, caption_justify="left")
    for column in sheet.columns:
        table.add_column(column.heading, justify="left" if column.text else "right")
    for row in sheet.rows:
        table.add_row(*(Text(cell) for cell in row.cells), style=STYLES.get(row.kind, ""))
    return table


def _inline(out: Path, name: str) -> str:
    return base64.b64encode((out / f"{name}.png").read_bytes()).decode()


def _json(config: Any) -> str:
    return json.dumps(config, indent=2)


def _write_page(
    out: Path,
    title: str,
    about: str,
    lead: Sequence[str],
    notes: Sequence[str],
    parts: Sequence[Part],
    configs: Sequence[tuple[str, str]],
) -> Path:
    """Write report.html as one file, pictures included; text from files and programs is escaped, nothing is loaded."""
    template = resources.files("ds_optforge.experiments").joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["markdown"] = markdown
    page = environment.from_string(template).render(
        title=title, about=about, lead=lead, notes=notes, parts=parts, configs=configs
    )
    path = out / "report.html"
    replace_text(path, page)
    return path
