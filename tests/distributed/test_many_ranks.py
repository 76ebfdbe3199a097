"""16 and 32 gloo ranks on a model of 1,100 elements: most ranks hold nothing of most parameters, and it equals one process.

The ranks are forked of two processes that have imported torch and DeepSpeed, so that each takes little memory of its own.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator

import pytest
from torch import Tensor

from tests.distributed import cases, many
from tests.distributed.pool import Pool, RankFailure
from tests.distributed.test_parity import TOLERANCE, assert_same
from tests.oracles import EXACT

PARAMS = {**cases.MUON, **EXACT}
STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module", params=[16, pytest.param(32, marks=pytest.mark.slow)])
def pool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(request.param, tmp_path_factory.mktemp(f"pool{request.param}"), nurseries=2)
    yield pool
    pool.close()


@functools.cache
def one_process() -> tuple[list[float], dict[str, Tensor]]:
    return many.trained_by_one_process(PARAMS)


@pytest.mark.promise("world-size", "zero-stages")
@pytest.mark.parametrize("stage", STAGES)
def test_more_ranks_than_elements_equal_one_process(stage: int, pool: Pool) -> None:
    config = cases.engine_config(stage, PARAMS, train_batch_size=many.BATCH)
    found = pool.run(many.train, config)
    losses, parameters = one_process()
    for rank in (0, -1):
        assert_same(found[rank]["parameters"], parameters)
        assert found[rank]["losses"] == pytest.approx(losses, rel=TOLERANCE)
    if stage == 3:
        assert_cut_over_all_ranks([rank["held"] for rank in found])


def assert_cut_over_all_ranks(held: list[dict[str, int]]) -> None:
    """ZeRO-3 cuts a parameter of n elements into parts of ceil(n / ranks): 32 elements, 4, and 1."""
    ranks = len(held)
    assert Counter(rank["narrow.weight"] for rank in held) == {32 // ranks: ranks}
    assert Counter(rank["norm.weight"] for rank in held) == {1: 4, 0: ranks - 4}
    assert Counter(rank["scale"] for rank in held) == {1: 1, 0: ranks - 1}


def test_one_rank_of_many_that_has_another_layout_is_named_on_all(pool: Pool) -> None:
    """In the first step, by the hash of the plan."""
    with pytest.raises(RankFailure) as failure:
        pool.run(cases.disagree, stage=2)
    assert failure.value.types == dict.fromkeys(range(pool.size), "LayoutError")
    for message in failure.value.messages.values():
        assert "rank 0 has '1.weight 24x32" in message
        assert "rank 1 has '1.weight 32x24" in message
