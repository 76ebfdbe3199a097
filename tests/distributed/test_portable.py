"""A portable checkpoint goes on with other ranks, on another ZeRO stage, with offload toggled.

Tolerances: float32 throughout, 1e-5 relative, as between topologies without a checkpoint (`test_parity`). bfloat16 products
and wire: 1e-2; gradients are summed in another order there, which bfloat16 rounding of momenta turns into 2e-3 of the loss
within five steps. 8-bit state is requantized at the cuts: as bfloat16.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import cases, checkpoints
from tests.distributed.conftest import Pools
from tests.oracles import EXACT

ROWS = 12  # of a global batch, so that 1, 2, 3 and 4 ranks can share it
WIDE = {"depth": 1, "width": 96}  # some parameters are large enough for 8-bit state

# (ranks, ZeRO stage, offload)
SAVED = (2, 2, False)
TOPOLOGIES = ((2, 2, False), (1, 1, False), (2, 3, True), (3, 3, False), (4, 1, True), (4, 2, False), (2, 0, False))

AUX = {"adamw": {"lr": 3e-3, "eps": 1e-5}}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": {"name": "muon", **AUX},
    "normuon": {"name": "normuon", **AUX},
    "adamw": {"name": "adamw", "lr": 3e-3, "eps": 1e-5},
    "lion": {"name": "lion", "lr": 3e-4},
    "schedule_free_adamw": {"name": "schedule_free_adamw", "eps": 1e-5, "betas": [0.9, 0.99]},
}
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2, "8bit": 1e-2}


def configuration(topology: tuple[int, int, bool], params: dict[str, Any], **extra: Any) -> dict[str, Any]:
    _, stage, offload = topology
    config = cases.engine_config(stage, params, train_batch_size=ROWS, **extra)
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return config


def schedule(name: str) -> dict[str, Any]:
    """A schedule, except where averaging replaces it."""
    if name == "schedule_free_adamw":
        return {}
    return {
        "scheduler": {"type": "OptForgeSchedule", "params": {"name": "cosine", "warmup_num_steps": 3, "total_num_steps": 10}}
    }


@pytest.mark.parametrize("state_dtype", TOLERANCES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_to_every_topology(name: str, state_dtype: str, pools: Pools, tmp_path: Path) -> None:
    params = {**OPTIMIZERS[name], "state_dtype": state_dtype, **(EXACT if "muon" in name and state_dtype == "float32" else {})}
    saved = configuration(SAVED, params, **schedule(name))
    expected = pools[2].run(checkpoints.run_and_save, saved, str(tmp_path / "saved"), **WIDE)[0]
    for topology in TOPOLOGIES:
        config = configuration(topology, params, **schedule(name))
        for result in pools[topology[0]].run(checkpoints.resume, config, str(tmp_path / "saved"), **WIDE):
            assert result["steps"] == checkpoints.HALF
            if topology == SAVED:
                assert result["losses"] == expected["losses"]
                assert all(torch.equal(result["parameters"][n], p) for n, p in expected["parameters"].items())
            assert result["losses"] == pytest.approx(expected["losses"], rel=TOLERANCES[state_dtype]), topology


def test_saving_again_is_lossless(pools: Pools, tmp_path: Path) -> None:
    """From 2 ranks to 3 on another stage and back: every tensor bit for bit, 8-bit codes inside the cuts included."""
    params = {**OPTIMIZERS["normuon"], "state_dtype": "bfloat16"}
    there, elsewhere = configuration(SAVED, params), configuration((3, 3, False), params)
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    pools[2].run(checkpoints.run_and_save, there, first, frozen=True, shapes=True)
    pools[3].run(checkpoints.load_and_save, elsewhere, first, second, frozen=True, shapes=True)
    pools[2].run(checkpoints.load_and_save, there, second, third, frozen=True, shapes=True)
    original = checkpoints.logical_tensors(first)
    for copy in (checkpoints.logical_tensors(second), checkpoints.logical_tensors(third)):
        assert copy.keys() == original.keys()
        assert all(torch.equal(copy[name], tensor) for name, tensor in original.items())
