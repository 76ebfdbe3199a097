"""The view on the terminal while runs are in progress: the progress of each, and the decisions so far."""

import statistics
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ds_optforge.experiments.launching import Record, Run
from ds_optforge.reading import json_value

SHOWN = 10  # the latest runs and decisions
TAIL_BYTES = 4096  # of metrics.jsonl: more than its last row
COLORS = {"finished": "green", "crashed": "red", "diverged": "red", "timed out": "red"}


class Board:
    """A live view on a terminal, a line for each event elsewhere. Use it as a context manager."""

    def __init__(self, title: str, metric: str, console: Console, parallel: int = 1) -> None:
        self._title, self._metric, self._console, self._parallel = title, metric, console, parallel
        self._stage = ""
        self._active: dict[Path, tuple[Run, float]] = {}
        self._ended: list[Record] = []
        self._decided: list[str] = []
        self._reused = 0
        self._waiting = 0
        self._seconds: list[float] = []  # of the runs that finished, those of an earlier command too
        self._lock = threading.Lock()
        self._live = Live(get_renderable=self.render, console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> "Board":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def stage(self, text: str) -> None:
        """Show the purpose of the next runs."""
        self._stage = text
        self._say(text)

    def expect(self, runs: int) -> None:
        """Reckon with so many runs that have not started yet, or at most so many, when estimating the end."""
        with self._lock:
            self._waiting = runs

    def decided(self, text: str) -> None:
        """Show a decision that the runs so far have led to."""
        with self._lock:
            self._decided.append(text)
        self._say(text)

    def started(self, run: Run, folder: Path) -> None:
        """Show a run that has been launched."""
        with self._lock:
            self._active[folder] = (run, time.monotonic())
            self._waiting -= 1
        self._say(f"  {run.name}, seed {run.seed}: started, {run.steps} steps ({folder})")

    def ended(self, record: Record, reused: bool) -> None:
        """Show how a run ended; ``reused`` where an earlier command launched it."""
        with self._lock:
            self._active.pop(record.folder, None)
            self._reused += reused
            self._waiting -= reused
            if record.finished:
                self._seconds.append(record.seconds)
            if not reused:
                self._ended.append(record)
        again = ", from an earlier run" if reused else f" after {record.seconds:.0f} s"
        self._say(f"  {record.name}, seed {record.seed}: {record.status}{again}; {self._outcome(record)}")

    def _outcome(self, record: Record) -> str:
        value = record.measured.get(self._metric)
        return record.reason or ("" if value is None else f"{self._metric} {value:.4f}")

    def _say(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def render(self) -> RenderableType:
        """Render the view at this moment."""
        with self._lock:
            active, ended, decided = dict(self._active), self._ended[-SHOWN:], self._decided[-SHOWN:]
            counts = f"{len(self._ended)} runs ended, {self._reused} found finished, {len(active)} under way"
            waiting, usual = max(self._waiting, 0), list(self._seconds)
        counts += self._left(active, waiting, usual)
        header = Text.assemble((self._title, "bold"), "  ", (self._stage, "cyan"), "\n", (counts, "dim"))
        blocks: list[RenderableType] = [header]
        if active:
            blocks.append(_under_way(active))
        if ended:
            blocks.append(self._finished(ended))
        blocks += [Text(line) for line in decided]
        return Group(*blocks)

    def _left(self, active: "dict[Path, tuple[Run, float]]", waiting: int, usual: list[float]) -> str:
        """The runs to come, and an estimate of the time until the last one ends, by what runs took or the steps of these."""
        now = time.monotonic()
        passed = [(now - start, last_row(folder).get("step", 0) / run.steps) for folder, (run, start) in active.items()]
        known = usual or [seconds / share for seconds, share in passed if share]
        found = f", {waiting} more at most" if waiting else ""
        if not known or not (waiting or passed):
            return found
        each = statistics.mean(known)
        under_way = [max(each - elapsed, 0.0) for elapsed, _ in passed]
        seconds = max((waiting * each + sum(under_way)) / self._parallel, *under_way, 0.0)
        return f"{found}; about {timedelta(seconds=round(seconds))} left"

    def _finished(self, records: list[Record]) -> Table:
        table = Table("run", "seed", "status", "seconds", "outcome", title="latest", title_justify="left", expand=True)
        for record in records:
            status = Text(record.status, COLORS[record.status])
            table.add_row(record.name, str(record.seed), status, f"{record.seconds:.0f}", Text(self._outcome(record)))
        return table


def _under_way(active: dict[Path, tuple[Run, float]]) -> Table:
    table = Table("run", "seed", "progress", "step", "loss", "tokens/s", "elapsed", title="under way", title_justify="left")
    for folder, (run, start) in active.items():
        row = last_row(folder)
        step = int(row.get("step", 0))
        table.add_row(
            run.name,
            str(run.seed),
            ProgressBar(total=run.steps, completed=step, width=24),
            f"{step}/{run.steps}",
            _number(row.get("loss"), ".4f"),
            _number(row.get("tokens_per_second"), ",.0f"),
            f"{time.monotonic() - start:.0f} s",
        )
    return table


def _number(value: Any, how: str) -> str:
    return format(value, how) if isinstance(value, int | float) else ""


def last_row(folder: Path) -> dict[str, Any]:
    """Read the last complete row of a run's metrics.jsonl; empty before the first."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]  # what follows the last line end is still being written
        row = json_value(lines[-1])
    except (OSError, ValueError, IndexError):
        return {}
    return row if isinstance(row, dict) else {}
