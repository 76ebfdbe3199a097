"""Runs ``ds-optforge init`` on files as users have them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ds_optforge.cli import main

FILES = Path(__file__).parents[1] / "data" / "init"


class Init:
    """Runs the command in a folder of its own, which is the current one, as that of a user is.

    Attributes:
        file: of the user.
        out: the new file.
        reasons: what the side file said last, which is printed too.
    """

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.file, self.out, self.reasons = folder / "ds.json", folder / "new.json", ""
        self._side, self._capsys = folder / "new.json.reasons.md", capsys

    def written(self, *options: str) -> dict[str, Any]:
        """The new configuration of the file, which `check` calls valid."""
        self.out.unlink(missing_ok=True)
        self._side.unlink(missing_ok=True)
        assert main(["init", "--from", self.file.name, "--out", self.out.name, *options]) == 0
        printed = self._capsys.readouterr().out
        self.reasons = self._side.read_text()
        assert printed == f"new.json, new.json.reasons.md: written\n\n{self.reasons}"
        assert main(["check", str(self.out)]) == 0
        assert ": valid" in self._capsys.readouterr().out
        return dict(json.loads(self.out.read_text()))

    def __call__(self, config: dict[str, Any], *options: str) -> dict[str, Any]:
        """The same for a configuration of DeepSpeed."""
        self.file.write_text(json.dumps(config, indent=4))
        return self.written(*options)

    def given(self, name: str, *options: str) -> dict[str, Any]:
        """The same for a file of tests/data/init, with those that it may name beside it."""
        shutil.copytree(FILES, self.file.parent, dirs_exist_ok=True)
        self.file = self.file.with_name(name)
        return self.written(*options)

    def text(self, name: str, content: str, *options: str) -> dict[str, Any]:
        """The same for a file with this content."""
        self.file = self.file.with_name(name)
        self.file.write_text(content)
        return self.written(*options)

    def refused(self, name: str, content: str, *options: str) -> str:
        """What is said of a file with this content; nothing is written."""
        self.file = self.file.with_name(name)
        self.file.write_text(content)
        assert main(["init", "--from", self.file.name, "--out", self.out.name, *options]) == 2
        assert not self.out.exists()
        assert not self._side.exists()
        output = self._capsys.readouterr()
        assert output.out == ""
        return output.err

    @property
    def left(self) -> str:
        """What the side file says that is not carried over."""
        return self.reasons.partition("## Not carried over")[2].partition("## To do")[0]

    @property
    def to_do(self) -> str:
        """What the side file says that is left to do."""
        return self.reasons.partition("## To do")[2]


@pytest.fixture
def init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Init:
    monkeypatch.chdir(tmp_path)
    return Init(tmp_path, capsys)
