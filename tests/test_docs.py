"""The generated tables of docs/optimizers.md are those of the code; what docs/lr_transfer.md measured is what it says."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ds_optforge import build_optimizer
from ds_optforge.rules import rule_names

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "optimizers.md").read_text(encoding="utf-8")
GENERATOR: dict[str, Any] = runpy.run_path(str(DOCS / "field_tables.py"))
MADE: dict[str, str] = GENERATOR["tables"]()
STALE = "stale: run `python docs/field_tables.py`"


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def test_the_page_has_every_table() -> None:
    assert set(GENERATOR["committed"](PAGE)) == set(MADE)


@pytest.mark.parametrize("name", [name for name in MADE if name != "coefficients"])
def test_fields_and_defaults_are_those_of_the_models(name: str) -> None:
    assert GENERATOR["committed"](PAGE)[name] == MADE[name], STALE


def test_singular_values_are_those_of_the_coefficient_sets() -> None:
    """0.015: two digits, and products in bfloat16 on another processor."""
    committed = GENERATOR["committed"](PAGE)["coefficients"]
    assert re.sub(r"\d+\.\d+", "", committed) == re.sub(r"\d+\.\d+", "", MADE["coefficients"]), STALE
    assert numbers(committed) == pytest.approx(numbers(MADE["coefficients"]), abs=0.015), STALE


def test_a_changed_default_would_be_noticed() -> None:
    changed = PAGE.replace("| `beta2` | `0.95` |", "| `beta2` | `0.9` |")
    assert GENERATOR["committed"](changed)["normuon"] != MADE["normuon"]
    assert GENERATOR["rewritten"](changed).count("| `beta2` | `0.95` |") == 1


@pytest.mark.parametrize("name", rule_names())
def test_every_rule_has_its_section_and_its_line(name: str) -> None:
    assert f"\n## {name}\n" in PAGE
    assert f"\n| `{name}` | " in PAGE


@pytest.mark.promise("lr-transfer")
@pytest.mark.parametrize("scale", ["shape", "spectral"])
def test_the_measured_best_rate_stays_put_over_eight_times_the_width(scale: str) -> None:
    """Two steps of the grid would be a factor of 4, and a rate that goes with the width a factor of 8."""
    (row,) = re.findall(rf"^\| `{scale}` \|(.*)\|$", (DOCS / "lr_transfer.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    *best, _, loss, loss_at_the_narrowest_models_rate = numbers(row)
    assert len(best) == 4
    assert max(best) / min(best) < 2
    assert loss_at_the_narrowest_models_rate - loss < 0.02


def test_its_example_is_a_configuration() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    attention = nn.ModuleDict({"qkv": nn.Linear(768, 1280, bias=False)})
    optimizer = build_optimizer(nn.ModuleDict({"attn": attention}), json.loads(example))
    optimizer.step()
