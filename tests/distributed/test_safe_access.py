"""deepspeed.utils.safe_get_full_* and safe_set_full_* reach the state of every parameter from the first step on."""

import pytest

from tests.distributed import safe_access
from tests.distributed.conftest import Pools


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_weights_and_state_are_read_and_written(stage: int, pools: Pools) -> None:
    """ZeRO-1/2 links all state after the first group's first step, before the other groups have been stepped."""
    for found in pools[2].run(safe_access.access, stage=stage):
        assert found["wrong"] == []
