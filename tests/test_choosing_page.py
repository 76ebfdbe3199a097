"""What docs/choosing_table.py makes of the results of benchmarks/choosing.py."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
GENERATOR: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "choosing_table.py"))
COMMON = {"workload": "gpt", "title": "byte GPT", "error": 0.01}
RESULTS: dict[str, Any] = {
    "steps": 120,
    "rows": [
        {**COMMON, "rule": "aurora", "rate": 0.02, "loss": 2.25, "gain": 0.25, "threshold": 0.03},
        {**COMMON, "rule": "muon", "rate": 0.04, "loss": 2.5},
    ],
    "tuning": {"gpt": {"muon": {"0.02": 2.61, "0.04": 2.5, "0.08": 2.7}}},
    "costs": [{"rule": "muon", "over_adamw": 2.24, "state_bytes": 4.702, "sent_mb": 1234.4, "tflops": 0.27}],
}


def test_a_line_has_the_loss_the_difference_to_muon_and_whether_chance_explains_it() -> None:
    lines = GENERATOR["tables"](RESULTS)["losses"].splitlines()
    assert lines[0] == "**byte GPT**, 120 steps"
    assert lines[-2:] == [
        "| aurora | 0.02 | 2.2500 ± 0.0100 | 0.2500 | lower |",
        "| muon | 0.04 | 2.5000 ± 0.0100 |  |  |",
    ]


@pytest.mark.parametrize(
    ("gain", "said"), [(0.03, "within noise"), (-0.03, "within noise"), (0.031, "lower"), (-0.04, "higher")]
)
def test_a_difference_counts_beyond_the_threshold(gain: float, said: str) -> None:
    assert GENERATOR["verdict"](gain, 0.03) == said


def test_costs_and_rates() -> None:
    made = GENERATOR["tables"](RESULTS)
    assert made["costs"].splitlines()[-1] == "| muon | 2.2 | 4.70 | 1,234 | 0.3 |"
    assert made["rates"].splitlines()[-1] == "| muon | 0.02: 2.610, **0.04: 2.500**, 0.08: 2.700 |"


def test_the_page_shows_what_is_on_record() -> None:
    page = GENERATOR["PAGE"].read_text(encoding="utf-8")
    made = GENERATOR["tables"](json.loads(GENERATOR["RECORD"].read_text()))
    assert GENERATOR["rewritten"](page, made) == page, "stale: run `python docs/choosing_table.py`"
