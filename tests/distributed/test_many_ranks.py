"""16 and 32 gloo ranks on a model of 1,100 elements: most ranks hold nothing of most parameters, and it equals one process.

The ranks are forked of two processes that have imported torch and DeepSpeed, so that each takes little memory of its own.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
from torch import Tensor

from tests.distributed import cases, many
from tests.distributed.pool import Pool
from tests.distributed.test_parity import TOLERANCE, assert_same
from tests.oracles import EXACT

PARAMS = {**cases.MUON, **EXACT}
STAGES = (0, 1, 2, 3)


Found = list[tuple[dict[int, dict[str, Any]], str]]  # of each rank: what came of each stage, and an error


@pytest.fixture(scope="module", params=[16, pytest.param(32, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    pool = Pool(request.param, tmp_path_factory.mktemp(f"pool{request.param}"), nurseries=2)
    configs = {stage: cases.engine_config(stage, PARAMS, train_batch_size=many.BATCH) for stage in STAGES}
    try:
        return pool.run(many.train_and_disagree, configs, timeout_s=300.0)
    finally:
        pool.close()


@functools.cache
def one_process() -> tuple[list[float], dict[str, Tensor]]:
    return many.trained_by_one_process(PARAMS)


@pytest.mark.promise("world-size", "zero-stages")
@pytest.mark.parametrize("stage", STAGES)
def test_more_ranks_than_elements_equal_one_process(stage: int, found: Found) -> None:
    losses, parameters = one_process()
    for rank in (0, -1):
        trained = found[rank][0][stage]
        assert_same(trained["parameters"], parameters)
        assert trained["losses"] == pytest.approx(losses, rel=TOLERANCE)


def test_most_ranks_have_nothing_of_most_parameters(found: Found) -> None:
    """ZeRO-3 cuts a parameter of n elements into parts of ceil(n / ranks): 32 elements, 4, and 1."""
    held, ranks = [trained[3]["held"] for trained, _ in found], len(found)
    assert Counter(rank["narrow.weight"] for rank in held) == {32 // ranks: ranks}
    assert Counter(rank["norm.weight"] for rank in held) == {1: 4, 0: ranks - 4}
    assert Counter(rank["scale"] for rank in held) == {1: 1, 0: ranks - 1}


def test_ranks_of_another_layout_are_named_on_all_of_them(found: Found) -> None:
    """In the first step, by the hash of the plan."""
    for _, message in found:
        assert "rank 0 has '1.weight 24x32" in message
        assert "rank 1 has '1.weight 32x24" in message
