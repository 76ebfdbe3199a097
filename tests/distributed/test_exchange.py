"""Exchanges as an accelerator has them, on gloo: late, and through buffers of the host."""

from typing import Any

import pytest
import torch

from tests.distributed import cases, deferred
from tests.distributed.conftest import Pools

SHARDING = {"bucket_numel": 700}  # several exchanges


def config(stage: int, name: str, **zero: Any) -> dict[str, Any]:
    params = {"name": name, "lr": 0.02, "weight_decay": 0.1, "sharding": SHARDING}
    return cases.engine_config(stage, params, zero_optimization=zero)


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, parameter in expected["parameters"].items():
        assert torch.equal(found["parameters"][name], parameter), name
    assert found["losses"] == expected["losses"]


@pytest.mark.parametrize("name", ["muon", "normuon"])
@pytest.mark.parametrize("stage", [2, 3])
def test_nothing_is_read_before_it_has_arrived_or_written_before_it_is_sent(stage: int, name: str, pools: Pools) -> None:
    """Bit by bit, where each exchange is carried out only when it is waited for; two are under way at most."""
    expected = pools[2].run(cases.train, config(stage, name))
    found = pools[2].run(deferred.train_deferred, config(stage, name))
    for (result, most, done), reference in zip(found, expected, strict=True):
        assert_equal(result, reference)
        assert done
        assert 1 <= most <= 2


@pytest.mark.parametrize("name", ["muon", "normuon"])
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_buffers_of_the_host_change_nothing(offload: str, stage: int, name: str, pools: Pools) -> None:
    """They are what CPU offload on an accelerator goes through."""
    asked = config(stage, name, offload_optimizer={"device": offload})
    expected = pools[2].run(cases.train, asked)
    for result, reference in zip(pools[2].run(deferred.train_staged, asked), expected, strict=True):
        assert_equal(result, reference)
