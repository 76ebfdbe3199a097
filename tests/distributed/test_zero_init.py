"""Models that zero.Init partitioned, in which AutoTP and AutoEP replace parameters when the engine is built."""

import pytest

from tests.distributed import cases, experts, tensor_parallel, zero_init
from tests.distributed.conftest import Pools
from tests.distributed.pool import RankFailure
from tests.oracles import EXACT

STEPS = 5
TOLERANCE = 1e-5  # as in test_parity.py
MUON = {**cases.MUON, **EXACT}


@pytest.mark.compatibility("autoep", stages=(3,), verdict="exact")
def test_autoep(pools: Pools) -> None:
    expected = experts.one_process(MUON, STEPS)
    for found in pools[2].run(zero_init.autoep, 2, MUON, STEPS):
        assert tensor_parallel.difference(found, expected) < TOLERANCE


def test_autotp(pools: Pools) -> None:
    expected = tensor_parallel.one_process(MUON, STEPS)
    for found in pools[2].run(zero_init.autotp, 2, MUON, STEPS):
        assert tensor_parallel.difference(found, expected) < TOLERANCE


def test_autotp_with_an_optimizer_object_ends_in_the_first_step(pools: Pools) -> None:
    with pytest.raises(RankFailure) as failure:
        pools[2].run(zero_init.autotp, 2, MUON, STEPS, with_object=True)
    for rank in range(2):
        assert failure.value.types[rank] == "ConfigError"
        assert "q_proj.weight: is not in the model any more" in failure.value.messages[rank]
        assert "or a function" in failure.value.messages[rank]
