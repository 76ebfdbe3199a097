"""Every file of ds_configs trains with `ds_optforge.register(model)` and no other line."""

import json
from pathlib import Path

import pytest

from tests.distributed import cases
from tests.distributed.conftest import Pools
from tests.distributed.pool import RankFailure

CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
every_preset = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@pytest.mark.promise("choose-by-name", "client-optimizer")
@every_preset
def test_preset_learns(path: Path, pools: Pools) -> None:
    """From 5.55 nats per byte (uniform) to below 4.2 in 10 steps; the same on both ranks."""
    config = json.loads(path.read_text())
    first, second = pools[2].run(cases.train_workload, config, steps=10)
    assert first == second
    assert first[0] == pytest.approx(5.55, abs=0.1)
    assert first[-1] < 4.2


@every_preset
def test_an_unregistered_model_names_the_missing_line(path: Path, pools: Pools) -> None:
    """The names in the JSON are found all the same: importing the package is enough for them."""
    with pytest.raises(RankFailure) as failure:
        pools[1].run(cases.without_register, json.loads(path.read_text()))
    assert failure.value.types == {0: "ConfigError"}
    assert "ds_optforge.register(model)" in failure.value.messages[0]


@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloading_preset_differs_in_nothing_else(stage: int) -> None:
    configs = {path.stem: json.loads(path.read_text()) for path in CONFIGS}
    offloading = configs[f"muon_zero{stage}_offload"]
    assert offloading["zero_optimization"].pop("offload_optimizer") == {"device": "cpu", "pin_memory": True}
    assert offloading == configs[f"muon_zero{stage}"]
