"""``sharding.rows``: the same rows are chosen whatever the cuts, and only they travel and are orthogonalized."""

from functools import cache
from typing import Any

import pytest
from torch import Tensor

from ds_optforge import build_optimizer
from tests import models, oracles
from tests.distributed import cases
from tests.distributed.conftest import Pools
from tests.distributed.test_parity import assert_same

STEPS = 8
ROWS = 12  # of a global batch, so that 2, 3 and 4 ranks can share it
ADAMW = {"lr": 3e-3, "eps": 1e-5}


def params(rows: float | None, name: str = "muon", **settings: Any) -> dict[str, Any]:
    sharding = {"wire_dtype": "float32", "rows": rows, **settings.pop("sharding", {})}
    exact = {**oracles.EXACT, "sharding": sharding}
    return {"name": name, "lr": 0.02, "weight_decay": 0.1, "nesterov": False, "adamw": ADAMW, **exact, **settings}


@cache
def reference(rows: float | None, name: str, steps: int = STEPS) -> dict[str, Tensor]:
    """Plain PyTorch on the global batches of 12."""
    model = models.build(shapes=True)
    optimizer = build_optimizer(model, params(rows, name))
    for step in range(steps):
        model(*models.batch(step, ROWS)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["muon", "normuon"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [2, 3])
def test_every_stage_takes_the_steps_of_one_process(world: int, stage: int, name: str, pools: Pools) -> None:
    """Rows cut in their middle, fewer rows than ranks and banks of matrices included."""
    config = cases.engine_config(stage, params(0.25, name), train_batch_size=ROWS)
    for result in pools[world].run(cases.train, config, steps=STEPS, model_options={"shapes": True}):
        assert_same(result["parameters"], reference(0.25, name))
