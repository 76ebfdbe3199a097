"""What docs/from_adamw_table.py makes of the results of benchmarks/from_adamw.py."""

import json
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


class TestTheEvidence:
    """What `make evidence` has put on record, and the page shows."""

    @property
    def results(self) -> dict[str, Any]:
        return dict(json.loads(GENERATOR["RECORD"].read_text(encoding="utf-8")))

    def test_the_page_shows_what_is_on_record(self) -> None:
        page = GENERATOR["PAGE"].read_text(encoding="utf-8")
        assert GENERATOR["rewritten"](page, GENERATOR["tables"](self.results)) == page

    def test_no_workloads_tuned_rate_is_at_the_edge_of_the_grid(self) -> None:
        for workload, losses in self.results["tuning"].items():
            rates = sorted(losses, key=float)
            assert min(losses, key=lambda rate: losses[rate]) not in (rates[0], rates[-1]), workload

    def test_what_init_writes_from_a_tuned_rate_is_better_than_adamw_on_every_workload(self) -> None:
        tuned = [row for row in self.results["rows"] if row["optimizer"] == "init" and row["rate"] != 3e-4]
        assert {row["workload"]: row["beats"] for row in tuned} == {"gpt": True, "llama": True, "finetune": True}
