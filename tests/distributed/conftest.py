"""The warm pools that distributed tests share: each starts with the first test that uses it and lasts the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


def _pool(size: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(size, tmp_path_factory.mktemp(f"pool{size}"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pool1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """One rank, in a process of its own: DeepSpeed's global state never enters the pytest process."""
    yield from _pool(1, tmp_path_factory)


@pytest.fixture(scope="session")
def pool2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Two ranks."""
    yield from _pool(2, tmp_path_factory)


@pytest.fixture(scope="session")
def pool3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Three ranks, which nothing divides by."""
    yield from _pool(3, tmp_path_factory)


@pytest.fixture(scope="session")
def pool4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Four ranks."""
    yield from _pool(4, tmp_path_factory)


class Pools:
    """The pools by their number of ranks; each starts when it is first asked for."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._request = request

    def __getitem__(self, ranks: int) -> Pool:
        pool: Pool = self._request.getfixturevalue(f"pool{ranks}")
        return pool


@pytest.fixture
def pools(request: pytest.FixtureRequest) -> Pools:
    """For tests that are parametrized over the number of ranks."""
    return Pools(request)
