"""The README's Python snippets run as they stand there."""

import re
from pathlib import Path

import pytest

from tests.distributed import cases
from tests.distributed.conftest import Pools

ROOT = Path(__file__).parents[2]
SNIPPETS = dict(re.findall(r"<!-- snippet: (\w+) -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))


def test_every_python_block_is_a_snippet() -> None:
    assert (ROOT / "README.md").read_text().count("```python") == len(SNIPPETS) == 5


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_trains(name: str, pools: Pools, tmp_path: Path) -> None:
    """In a folder with the repository's configurations."""
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    for losses in pools[2].run(cases.run_snippet, SNIPPETS[name], str(tmp_path)):
        assert losses[-1] < losses[0]
