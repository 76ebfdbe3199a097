"""Progress of long work: on a terminal a bar with an estimate of the end, elsewhere nothing."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def progress(what: str, total: int, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error while the block runs, and remove it afterwards.

    Args:
        what: a word before the bar.
        total: what there is to do, in bytes or in things to count.
        in_bytes: whether it is bytes.

    Yields:
        A function that advances the bar by what has been done.
    """
    counts: tuple[ProgressColumn, ...] = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(), *counts, TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)

        def advance(done: int) -> None:
            bar.advance(task, done)

        yield advance
