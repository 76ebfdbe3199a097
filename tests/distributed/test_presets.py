"""Every file of ds_configs trains with `ds_optforge.register(model)` and no other line."""

import json
from pathlib import Path

import pytest

from tests.distributed import cases
from tests.distributed.conftest import Pools
from tests.distributed.pool import RankFailure

CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
TUNING = {"muon_finetune_zero3", "muon_lora_zero2"}  # with the small rates of a trained model: see below
from_scratch = pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem not in TUNING], ids=lambda path: path.stem)
every_preset = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@pytest.mark.promise("choose-by-name", "client-optimizer")
@from_scratch
def test_preset_learns(path: Path, pools: Pools) -> None:
    """From 5.55 nats per byte (uniform) to below 4.2 in 10 steps; the same on both ranks."""
    config = json.loads(path.read_text())
    first, second = pools[2].run(cases.train_workload, config, steps=10)
    assert first == second
    assert first[0] == pytest.approx(5.55, abs=0.1)
    assert first[-1] < 4.2


@pytest.mark.parametrize("name", sorted(TUNING))
def test_a_preset_for_trained_models_goes_on_from_one(name: str, pools: Pools, tmp_path: Path) -> None:
    """Of a small Llama that AdamW has trained on other tokens: all weights, or adapters."""
    adapters = pytest.importorskip("tests.distributed.adapters", reason="peft is not installed (extra 'test')")
    config = json.loads((CONFIGS[0].parent / f"{name}.json").read_text())
    first, second = pools[2].run(adapters.tune, config, steps=20, adapt="lora" in name)
    assert first == second
    assert first[-1] < first[0]


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
