"""README's comparison with DeepSpeed's built-in Muon: every row names a test of benchmarks/incumbent; here are all of them."""

import re
from pathlib import Path

from benchmarks.incumbent import test_claims
from benchmarks.incumbent.test_claims import (
    test_a_step_on_zero_3_gathers_four_times,
    test_clipping_shrinks_the_update,
    test_other_ranks_only_after_conversion,
    test_without_zero_it_clips_the_gradient,
    test_zero_3_refuses_reduce_scatter,
)

__all__ = [
    "test_a_step_on_zero_3_gathers_four_times",
    "test_clipping_shrinks_the_update",
    "test_other_ranks_only_after_conversion",
    "test_without_zero_it_clips_the_gradient",
    "test_zero_3_refuses_reduce_scatter",
]
ROOT = Path(__file__).parents[2]


def test_every_row_of_the_readme_names_its_test() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Compared with DeepSpeed's built-in Muon")[2]
    rows = re.findall(r"^\|.*`(test_\w+)` \|$", section, re.MULTILINE)
    tests = {name for name in vars(test_claims) if name.startswith("test_")}
    assert len(rows) == 4
    assert set(rows) <= tests == set(__all__)
