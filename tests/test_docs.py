"""What docs/field_tables.py makes is what the pages hold; what docs/lr_transfer.md measured is what it says."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from ds_optforge import build_optimizer
from ds_optforge.rules import RuleSettings
from ds_optforge.testing.params import formats_of
from tests.layers import linears, matrix, set_gradients

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "optimizers.md").read_text(encoding="utf-8")
TELEMETRY = (DOCS / "telemetry.md").read_text(encoding="utf-8")
GENERATOR: dict[str, Any] = runpy.run_path(str(DOCS / "field_tables.py"))
MADE: dict[str, str] = GENERATOR["tables"]()
RULES: dict[str, type[RuleSettings]] = GENERATOR["RULES"]
STALE = "stale: run `python docs/field_tables.py`"


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def test_the_page_has_every_table() -> None:
    assert set(GENERATOR["committed"](PAGE)) == set(MADE) - {"rule_names", "healthy"}
    assert set(GENERATOR["committed"](TELEMETRY)) == {"healthy"}


@pytest.mark.parametrize("name", [name for name in MADE if name not in ("coefficients", "healthy", "rule_names")])
def test_fields_and_defaults_are_those_of_the_models(name: str) -> None:
    assert GENERATOR["committed"](PAGE)[name] == MADE[name], STALE


def test_singular_values_are_those_of_the_coefficient_sets() -> None:
    """0.015: two digits, and products in bfloat16 on another processor."""
    committed = GENERATOR["committed"](PAGE)["coefficients"]
    assert re.sub(r"\d+\.\d+", "", committed) == re.sub(r"\d+\.\d+", "", MADE["coefficients"]), STALE
    assert numbers(committed) == pytest.approx(numbers(MADE["coefficients"]), abs=0.015), STALE


def test_healthy_ranges_are_those_that_telemetry_warns_by() -> None:
    assert GENERATOR["committed"](TELEMETRY)["healthy"] == MADE["healthy"], STALE


def test_a_changed_default_would_be_noticed() -> None:
    changed = PAGE.replace("| `beta2` | `0.95` |", "| `beta2` | `0.9` |")
    assert GENERATOR["committed"](changed)["normuon"] != MADE["normuon"]
    assert GENERATOR["rewritten"](changed) == PAGE


@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_its_section_and_its_line(name: str) -> None:
    assert f"\n## {name}\n" in PAGE
    assert f"\n| `{name}` | " in PAGE


@pytest.mark.parametrize("page", GENERATOR["LISTS"], ids=lambda path: path.name)
def test_the_front_pages_name_all_rules(page: Path) -> None:
    committed = GENERATOR["committed"](page.read_text(encoding="utf-8"))
    assert committed == {"rule_names": MADE["rule_names"]}, STALE
    assert all(f"`{name}`" in committed["rule_names"] for name in RULES)


def state_of_row(name: str) -> tuple[dict[str, float], list[str]]:
    """Of the table's row: bytes per parameter by state format, and what is kept beside it."""
    (row,) = (line.split(" | ") for line in MADE["rules"].splitlines() if line.startswith(f"| `{name}` |"))
    elementwise, *kept = row[2].split(", and ")
    return dict(zip(formats_of(name), map(float, elementwise.split(" / ")), strict=True)), kept


@pytest.mark.parametrize(("name", "state_dtype"), [(name, each) for name in RULES for each in state_of_row(name)[0]])
def test_the_bytes_of_state_are_those_that_are_allocated(name: str, state_dtype: str) -> None:
    """0.005: two digits. What is kept per row or per matrix is counted apart."""
    formats, kept = state_of_row(name)
    if state_dtype == "8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    slow = {"betas": [0.9, 0.99]} if "betas" in RULES[name].model_fields else {}  # bfloat16 takes no slower ones
    model = linears(matrix(64, 256))
    optimizer = build_optimizer(model, {"name": name, "state_dtype": state_dtype, **slow})
    set_gradients(model.parameters(), 0)
    optimizer.step()
    (state,) = optimizer.state.values()
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and key != "step"}
    sizes = (1, 64, 64**2, 256**2)
    beside = {key: value.numel() for key, value in tensors.items() if value.numel() in sizes and not key.endswith("_absmax")}
    found = sum(value.numel() * value.element_size() for key, value in tensors.items() if key not in beside)
    assert found / (64 * 256) == pytest.approx(formats[state_dtype], abs=0.005)
    counts = {"matrix": list(beside.values()).count(1), "row": list(beside.values()).count(64)}
    expected = [f"{4 * count} per {per}" for per, count in counts.items() if count]
    sides = {of: 4 * list(beside.values()).count(size**2) for of, size in (("rows", 64), ("cols", 256))}
    expected += [" + ".join(f"{nbytes} {of}²" for of, nbytes in sides.items())] if any(sides.values()) else []
    assert kept == expected


@pytest.mark.promise("lr-transfer")
@pytest.mark.parametrize("scale", ["shape", "spectral"])
def test_the_measured_best_rate_stays_put_over_eight_times_the_width(scale: str) -> None:
    """Two steps of the grid would be a factor of 4, and a rate that goes with the width a factor of 8."""
    (row,) = re.findall(rf"^\| `{scale}` \|(.*)\|$", (DOCS / "lr_transfer.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    *best, _, loss, loss_at_the_narrowest_models_rate = numbers(row)
    assert len(best) == 4
    assert max(best) / min(best) < 2
    assert loss_at_the_narrowest_models_rate - loss < 0.02


def test_the_examples_of_planning_are_what_is_printed() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    page = (DOCS / "planning.md").read_text(encoding="utf-8")
    assert page.count("<!-- plan -->") == page.count("$ ds-optforge plan") == 3
    made = runpy.run_path(str(DOCS / "planning_examples.py"))["rewritten"](page)
    assert page == made, "stale: run `python docs/planning_examples.py`"


def test_its_example_is_a_configuration() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    attention = nn.ModuleDict({"qkv": nn.Linear(768, 1280, bias=False)})
    optimizer = build_optimizer(nn.ModuleDict({"attn": attention}), json.loads(example))
    optimizer.step()
