"""What the tests of all launchers share: the text, and the runs that have been made on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.hosts import Host, two_hosts
from tests.launch.commands import Launches


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text with some structure, long enough for a few validation windows."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"line {index}: {index * index}\n" for index in range(4000)))
    return path


@pytest.fixture(scope="session")
def launched(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return Launches(text, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both
