"""The Python snippets of the README and of docs/quickstart.md run as they stand there."""

import re
from pathlib import Path

import pytest

from tests.distributed import cases
from tests.distributed.conftest import Pools

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/quickstart.md", "docs/launching.md")}
FOUND = {
    page: dict(re.findall(r"<!-- snippet: (\w+) -->\n```python\n(.*?)```", text, re.DOTALL)) for page, text in PAGES.items()
}
SNIPPETS = FOUND["README.md"] | {"quickstart": FOUND["docs/quickstart.md"]["deepspeed"]}


@pytest.mark.parametrize(("page", "count"), [("README.md", 5), ("docs/quickstart.md", 4)])
def test_every_python_block_is_a_snippet(page: str, count: int) -> None:
    assert PAGES[page].count("```python") == len(FOUND[page]) == count


def test_the_quickstart_repeats_snippets_that_run_elsewhere() -> None:
    quickstart = FOUND["docs/quickstart.md"]
    assert quickstart["plain"] == FOUND["README.md"]["plain"]
    assert quickstart["accelerate"] == FOUND["docs/launching.md"]["accelerate"]


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_trains(name: str, pools: Pools, tmp_path: Path) -> None:
    """In a folder with the repository's configurations."""
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    for losses in pools[2].run(cases.run_snippet, SNIPPETS[name], str(tmp_path)):
        assert losses[-1] < losses[0]
