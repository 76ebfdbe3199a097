"""docs/from_adamw.md: its command makes of its file what the page shows."""

import re
import shlex
from pathlib import Path

import pytest

from ds_optforge.cli import main
from ds_optforge.migrate.kinds import KINDS
from tests.migrate.conftest import Init

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "from_adamw.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- (\w+) -->\n```\w+\n(.*?)```", PAGE, re.DOTALL))


def test_the_example_is_what_the_command_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ds.json").write_text(BLOCKS["source"])
    assert main(shlex.split(BLOCKS["command"])[1:]) == 0
    assert Path("ds_muon.json").read_text() == BLOCKS["result"]
    reasons = Path("ds_muon.json.reasons.md").read_text()
    assert reasons == BLOCKS["reasons"]
    assert capsys.readouterr().out.endswith(reasons)


def test_every_kind_of_file_has_a_row() -> None:
    rows = re.findall(r"^\| (.*?) \| `", PAGE.partition("## Evidence")[0], flags=re.MULTILINE)
    assert len(rows) == len(KINDS)
    for kind in KINDS:
        assert any(kind.name in row for row in rows), kind.name


@pytest.mark.parametrize("framework", ["axolotl", "llama_factory"])
def test_the_pages_of_frameworks_have_the_code_that_is_printed(framework: str, init: Init) -> None:
    init.given(f"{framework}.yaml")
    (printed,) = re.findall(r"```python\n.*?```", init.to_do, re.DOTALL)
    assert printed in (DOCS / "frameworks" / f"{framework}.md").read_text(encoding="utf-8")
