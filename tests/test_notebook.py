"""examples/quickstart.ipynb runs from its first cell to its last."""

import os
import sysconfig
from pathlib import Path

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_quickstart_runs_and_learns() -> None:
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    # In its own process, which finds the command of a cell where this environment has it.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}})
    client.execute(env={**os.environ, "PATH": path, "TORCHDYNAMO_DISABLE": "1"})
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "blocks.{0-3}" in printed or "blocks" in printed
    assert "Recommended on ZeRO-3: gather" in printed
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ()))
