"""What DeepSpeed's built-in Muon does where OptForge's does otherwise, shown in the installed version.

A test that fails here after an update of DeepSpeed means that a line of the README is no longer true.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import incumbent
from tests.distributed.conftest import Pools

BUILT_IN = {"type": "Muon", "params": {"lr": 0.02, "muon_lr": 0.02, "adam_lr": 3e-3, "momentum": 0.95}}
COMPILES = 300.0  # seconds: on a CPU, DeepSpeed builds an operator of its Adam first
OURS = {"type": "OptForge", "params": {"name": "muon", "lr": 0.02, "adamw": {"lr": 3e-3}}}


def sizes(optimizer: dict[str, Any], stage: int, pools: Pools, **extra: Any) -> list[float]:
    """Of the first step, with gradients left alone and clipped to a thousandth."""
    return [
        pools[2].run(
            incumbent.size_of_a_step, optimizer, stage, gradient_clipping=clipping, zero_optimization=extra, timeout_s=COMPILES
        )[0]
        for clipping in (0.0, 1e-3)
    ]


@pytest.mark.parametrize(("stage", "extra"), [(2, {}), (3, {"reduce_scatter": False})])
def test_the_built_in_one_clips_the_update_and_optforge_the_gradient(stage: int, extra: dict[str, Any], pools: Pools) -> None:
    """An orthogonal update of a 40 x 40 matrix is as large for a small gradient as for a large one."""
    free, clipped = sizes(BUILT_IN, stage, pools, **extra)
    assert clipped < 0.01 * free
    free, clipped = sizes(OURS, stage, pools)
    assert clipped == pytest.approx(free, rel=0.02)


def test_the_built_in_one_refuses_deepspeeds_default_of_reduce_scatter_on_zero_3(pools: Pools) -> None:
    with pytest.raises(Exception, match="reduce_scatter"):
        pools[2].run(incumbent.first_step, BUILT_IN, 3, timeout_s=COMPILES)
    pools[2].run(incumbent.first_step, OURS, 3)


@pytest.mark.parametrize("stage", [2])
def test_a_checkpoint_of_the_built_in_one_does_not_resume_on_another_number_of_ranks(
    stage: int, pools: Pools, tmp_path: Path
) -> None:
    """OptForge's portable ones do: tests/distributed/test_portable.py."""
    pools[2].run(incumbent.save, BUILT_IN, stage, str(tmp_path), timeout_s=COMPILES)
    with pytest.raises(Exception, match=r"world size|DP|partition|size"):
        pools[1].run(incumbent.load, BUILT_IN, stage, str(tmp_path), timeout_s=COMPILES)
