"""What docs/from_adamw_table.py makes of the results of benchmarks/from_adamw.py."""

import runpy
from pathlib import Path
from typing import Any

GENERATOR: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "from_adamw_table.py"))
COMMON = {"workload": "gpt", "title": "byte GPT", "steps": 200, "rate": 0.002}
RESULTS = {
    "rows": [
        {**COMMON, "optimizer": "adamw", "loss": 2.5, "error": 0.01},
        {**COMMON, "optimizer": "init", "loss": 2.25, "error": 0.02, "gain": 0.25, "threshold": 0.03, "beats": True},
    ],
    "tuning": {"gpt": {"0.0003": 2.7, "0.002": 2.5}},
}


def test_a_line_has_both_losses_their_difference_and_the_verdict() -> None:
    line = GENERATOR["tables"](RESULTS)["evidence"].splitlines()[-1]
    assert line == "| byte GPT, 200 steps | 0.002 | 2.5000 ± 0.0100 | 2.2500 ± 0.0200 | 0.2500 | 0.0300 | better |"


def test_the_tuned_rate_is_in_bold() -> None:
    heading, _, line = GENERATOR["tables"](RESULTS)["tuning"].splitlines()
    assert heading == "| workload | 0.0003 | 0.002 |"
    assert line == "| byte GPT | 2.7000 | **2.5000** |"


def test_the_page_has_a_place_for_each_table_and_keeps_the_rest() -> None:
    page = GENERATOR["PAGE"].read_text(encoding="utf-8")
    made = GENERATOR["rewritten"](page, GENERATOR["tables"](RESULTS))
    assert all(table in made for table in GENERATOR["tables"](RESULTS).values())
    emptied = GENERATOR["rewritten"](made, {"evidence": "", "tuning": ""})
    assert emptied == GENERATOR["rewritten"](page, {"evidence": "", "tuning": ""})
