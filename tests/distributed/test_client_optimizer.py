"""An optimizer object in place of the JSON's section: deepspeed.initialize takes it as it is, without `register`."""

from typing import Any

import pytest

from tests.distributed import cases
from tests.distributed.conftest import Pools
from tests.distributed.test_parity import assert_same

STEPS = 10
SCHEDULE = {"type": "OptForgeSchedule", "params": {"name": "cosine", "total_num_steps": STEPS}}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@pytest.mark.promise("client-optimizer")
@pytest.mark.parametrize("door", ["deepspeed", "ds_optforge"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_object_trains_as_the_section_does(stage: int, door: str, pools: Pools) -> None:
    config = cases.engine_config(stage, cases.MUON, scheduler=SCHEDULE)
    expected = pools[2].run(cases.train, config, STEPS)[0]
    for found in pools[2].run(cases.train_with_object, config, door):
        assert found["kept"]
        assert found["losses"] == expected["losses"]
        assert_same(found["parameters"], expected["parameters"], 0.0)


@pytest.mark.promise("use-muon", "world-size")
@pytest.mark.parametrize("stage", [2, 3])
def test_keller_jordans_groups(stage: int, pools: Pools) -> None:
    """They train the same on one process and on two ranks."""
    config = cases.engine_config(stage, {})
    (one,) = pools[1].run(cases.train_with_object, config, "deepspeed", groups=True)
    for found in pools[2].run(cases.train_with_object, config, "deepspeed", groups=True):
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-3)  # bfloat16 products of gradients summed elsewhere


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_needs_no_further_setting(stage: int, pools: Pools) -> None:
    """Beside an object DeepSpeed wants "zero_force_ds_cpu_optimizer": false; `ds_optforge.initialize` sets it."""
    config: dict[str, Any] = cases.engine_config(stage, cases.MUON, **OFFLOAD)
    expected = pools[2].run(cases.train, config, STEPS)[0]
    for found in pools[2].run(cases.train_with_object, config, "ds_optforge"):
        assert found["losses"] == expected["losses"]
