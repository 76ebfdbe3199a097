"""examples/quickstart.ipynb runs from its first cell to its last."""

import os
import subprocess
import sys
from pathlib import Path

import jupytext

from tests.launch.commands import environment

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_quickstart_runs_and_trains(tmp_path: Path) -> None:
    """As a script of its code cells, which need no kernel: none has a command of Jupyter's own."""
    notebook = jupytext.read(EXAMPLES / "quickstart.ipynb")
    assert not [cell.source for cell in notebook.cells if cell.cell_type == "code" and cell.source.startswith(("!", "%"))]
    script = tmp_path / "quickstart.py"
    jupytext.write(notebook, script)
    script.write_text(script.read_text(encoding="utf-8") + "\nfigure.savefig(sys.argv[1])\n", encoding="utf-8")
    command = [sys.executable, str(script), str(tmp_path / "curves.png")]
    variables = {**environment(), "MPLBACKEND": "Agg", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run(command, cwd=EXAMPLES, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nats a byte" in done.stdout
    assert "Recommended on ZeRO-3: gather" in done.stdout
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_quickstart_holds_what_it_printed() -> None:
    """So that it can be read without being run."""
    cells = [cell for cell in jupytext.read(EXAMPLES / "quickstart.ipynb").cells if cell.cell_type == "code"]
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert "blocks" in printed
    assert "AdamW: " in printed
    assert "Recommended on ZeRO-3: gather" in printed
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
