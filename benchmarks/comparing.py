"""Runs `ds-optforge compare` and returns the loss of each seed, which its report does not have."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from ds_optforge.experiments.compare import METRIC, run_comparison
from ds_optforge.experiments.launching import Launcher
from ds_optforge.experiments.live import Board
from ds_optforge.experiments.spec import read_comparison


def losses_of(path: Path, content: Mapping[str, Any], parallel: int) -> dict[str, list[float]]:
    """Write a file of `ds-optforge compare` and run it; return the validation losses by run, one per seed.

    The process ends with the command's status where that fails.
    """
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False))
    run(["ds-optforge", "compare", str(path), "--parallel", str(parallel)])
    # Asked once more, now that it has all records, for the loss of each seed.
    comparison = read_comparison(path)
    board = Board(str(path), METRIC, Console(quiet=True))
    launcher = Launcher(comparison.settings.launcher, Path(comparison.settings.out), board)
    standings = run_comparison(comparison, launcher, board).standings
    return {each.name: [record.measured[METRIC] for record in each.records] for each in standings}


def run(command: list[str], stdout: int | None = None) -> None:
    """Run a command, and end with its status where it fails."""
    status = subprocess.run(command, stdout=stdout).returncode
    if status:
        sys.exit(status)
