"""What README says of DeepSpeed's built-in Muon, on two ranks of the installed DeepSpeed: `make incumbent`.

Each test does the same with ds_optforge. When a release of DeepSpeed mends one of these, its test fails and README's row goes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.incumbent import ranks
from benchmarks.incumbent.ranks import BUILT_IN, OPTFORGE, configuration
from ds_optforge.checkpoint.convert import convert
from tests.distributed import cases, checkpoints, planned
from tests.distributed.conftest import Pools

LIMIT = 300.0  # seconds; DeepSpeed may compile an operator of its own first
BFLOAT16 = 2  # bytes


def without_scatter(stage: int) -> dict[str, bool]:
    """What the built-in Muon asks for on ZeRO-3."""
    return {"reduce_scatter": False} if stage == 3 else {}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_clipping_shrinks_the_update(stage: int, pools: Pools) -> None:
    """A gradient has the same orthogonalized update at any size, so that the first step has one size however it is clipped."""
    sizes = {}
    for name, optimizer in (("built-in", BUILT_IN), ("ours", OPTFORGE)):
        configs = [configuration(stage, optimizer, clipping, **without_scatter(stage)) for clipping in (0.0, 1e-3)]
        free, clipped = (pools[2].run(ranks.first_step, config, timeout_s=LIMIT)[0] for config in configs)
        sizes[name] = clipped[0] / free[0]
        if name == "built-in":
            assert sizes[name] == pytest.approx(1e-3 / free[1], rel=0.01)  # the norm of the updates, which is 7.5
            assert sizes[name] < 1 / 5000
    assert sizes["ours"] == pytest.approx(1.0, abs=0.03)  # the smaller gradient is rounded to bfloat16 at other places


def test_without_zero_it_clips_the_gradient(pools: Pools) -> None:
    """So that stage 0 and the others train differently from the same file."""
    free, clipped = (
        pools[2].run(ranks.first_step, configuration(0, BUILT_IN, clipping), timeout_s=LIMIT)[0][0] for clipping in (0.0, 1e-3)
    )
    assert clipped / free == pytest.approx(1.0, abs=0.01)


def test_zero_3_refuses_reduce_scatter(pools: Pools) -> None:
    refused = pools[2].run(ranks.losses_or_error, configuration(3, BUILT_IN), 3, timeout_s=LIMIT)
    assert refused == 2 * ["Muon and reduce scatter cannot be used together"]
    losses = pools[2].run(ranks.losses_or_error, configuration(3, OPTFORGE), 3)[0]
    assert losses[-1] < losses[0]


def test_a_step_on_zero_3_gathers_four_times(pools: Pools) -> None:
    """Counted at torch.distributed, in the step alone.

    The matrices have 2 x 2048 + 2 x 1536 = 7168 elements. The built-in Muon gathers halves of gradients and of momenta (7168 a
    rank), and in two rounds whole updates and momenta, which it fills up to the largest of the round (8192 a rank). Here the
    half that is not the owner's travels out and back: 7168 from both ranks together, and some flags.
    """
    zero = {"reduce_scatter": False}
    theirs = pools[2].run(planned.count, 3, BUILT_IN, timeout_s=LIMIT, **zero)
    for each in theirs:
        assert each["sent"]["c10d::_allgather_base_"] + each["sent"]["c10d::allgather_"] == BFLOAT16 * (7168 + 8192)
    ours = pools[2].run(planned.count, 3, OPTFORGE)
    assert BFLOAT16 * 7168 <= sum(each["sent"].pop("c10d::alltoall_base_") for each in ours) < 1.01 * BFLOAT16 * 7168
    assert [sum(each["sent"].values()) for each in ours] == [0, 0]


@pytest.mark.parametrize("stage", [2, 3])
def test_other_ranks_only_after_conversion(stage: int, pools: Pools, tmp_path: Path) -> None:
    """DeepSpeed loads no optimizer's engine checkpoint on other ranks; its universal checkpoint, which it has for that,
    knows Adam's states alone."""
    config = configuration(stage, BUILT_IN, **without_scatter(stage))
    losses = pools[2].run(ranks.save, config, str(tmp_path / "theirs"), checkpoints.HALF, timeout_s=LIMIT)[0]
    loading = pools[1].run(ranks.loading_error, config, str(tmp_path / "theirs"), timeout_s=LIMIT)[0]
    assert "used a DP world size of 2 but the current world size is 1" in loading
    (saved,) = (tmp_path / "theirs").glob("global_step*")
    universal = pools[1].run(ranks.universal_error, str(saved), str(tmp_path / "universal"), timeout_s=LIMIT)[0]
    assert universal == "KeyError: 'exp_avg'"
    convert(tmp_path / "theirs", tmp_path / "ours")
    resumed = pools[1].run(checkpoints.resume, cases.engine_config(2, cases.MUON), str(tmp_path / "ours"), strict=False)[0]
    assert resumed["steps"] == checkpoints.HALF
    assert resumed["losses"][-1] < losses[0]
