"""docs/adding_a_rule.md: its code is that of the files, and runs as it stands there."""

import re
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from ds_optforge.rules import Buffer, ElementwiseRule, MatrixRule

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "adding_a_rule.md").read_text(encoding="utf-8")
BLOCKS: dict[str, str] = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE))
GENERATOR: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "field_tables.py"))


def test_it_shows_an_elementwise_rule_and_a_package_with_a_matrix_rule() -> None:
    assert list(BLOCKS) == [
        "ds_optforge/rules/sgd.py",
        "tests/external_rule/pyproject.toml",
        "tests/external_rule/steady_muon.py",
    ]


@pytest.mark.parametrize("path", BLOCKS)
def test_its_blocks_are_the_files(path: str) -> None:
    assert BLOCKS[path] == (ROOT / path).read_text(encoding="utf-8"), "stale: run `python docs/field_tables.py`"


def test_a_stale_block_would_be_made_anew() -> None:
    assert GENERATOR["with_files"](TEXT) == TEXT
    stale = TEXT.replace("class SGD(ElementwiseRule):", "class Other(ElementwiseRule):")
    assert stale != TEXT
    assert GENERATOR["with_files"](stale) == TEXT


def test_its_tables_have_every_member_and_declaration() -> None:
    """By the first cell of a row."""
    rows = set(re.findall(r"^\| `(\w+)", TEXT, re.MULTILINE))
    bases = {base for rule in (ElementwiseRule, MatrixRule) for base in rule.__mro__[:2]}
    names = {name for base in bases for name in {**vars(base), **vars(base).get("__annotations__", {})}}
    assert {name for name in names if not name.startswith("_")} <= rows
    assert {"build", "decay_rates", "summary"} <= rows  # of the settings
    (buffers,) = re.findall(r"^\| `buffers` .*$", TEXT, re.MULTILINE)
    assert all(field.name in buffers for field in fields(Buffer))


def run(folder: Path, code: str) -> str:
    """What code prints in a process of its own, in which the folder's modules and this repository can be imported."""
    begin = f"import sys\nsys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n"
    finished = subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_its_elementwise_rule_trains_as_torchs(tmp_path: Path) -> None:
    """The page's text in a file of its own, under a name of its own."""
    text = BLOCKS["ds_optforge/rules/sgd.py"]
    assert text.count('rule = "sgd"') == 1
    (tmp_path / "own_sgd.py").write_text(text.replace('rule = "sgd"', 'rule = "own_sgd"'))
    printed = run(
        tmp_path,
        """
import own_sgd, torch
from ds_optforge import build_optimizer
from tests.layers import linears, matrix, set_gradients
given = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.3}
own, reference = linears(matrix(24, 96)), linears(matrix(24, 96))
optimizers = [build_optimizer(own, {"name": "own_sgd", **given}), torch.optim.SGD(reference.parameters(), **given)]
for step in range(20):
    for model, optimizer in zip((own, reference), optimizers):
        set_gradients(model.parameters(), step)
        optimizer.step()
print(own_sgd.SGDSettings.rule, torch.equal(own[0].weight, reference[0].weight))
""",
    )
    assert printed.split()[-2:] == ["own_sgd", "True"]


@pytest.mark.promise("external-rule")
def test_its_matrix_rule_is_imported_and_steps_by_a_share_of_the_weight(tmp_path: Path) -> None:
    """Without decay the step's norm is lr times the weight's, by its formula. 1e-5: float32."""
    (tmp_path / "steady_muon.py").write_text(BLOCKS["tests/external_rule/steady_muon.py"])
    printed = run(
        tmp_path,
        """
import steady_muon, torch
from ds_optforge import build_optimizer
from tests.layers import linears, matrix, set_gradients
model = linears(matrix(24, 96))
before = model[0].weight.detach().clone()
optimizer = build_optimizer(model, {"name": "steady_muon", "lr": 0.25})
set_gradients(model.parameters(), 0)
optimizer.step()
print(sorted(optimizer.state[model[0].weight]), ((model[0].weight - before).norm() / before.norm()).item())
""",
    )
    state, _, share = printed.strip().rpartition(" ")
    assert state == "['momentum_buffer', 'second_moment', 'step']"
    assert float(share) == pytest.approx(0.25, rel=1e-5)
