"""The README's Python snippets run as they stand there."""

import re
from pathlib import Path

import pytest

from tests.distributed import cases
from tests.distributed.conftest import Pools

ROOT = Path(__file__).parents[2]
SNIPPETS = dict(re.findall(r"<!-- snippet: (\w+) -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))


def test_every_python_block_is_a_snippet() -> None:
    assert (ROOT / "README.md").read_text().count("```python") == len(SNIPPETS) == 4


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_trains(name: str, pools: Pools) -> None:
    for losses in pools[2].run(cases.run_snippet, SNIPPETS[name], str(ROOT)):
        assert losses[-1] < losses[0]
