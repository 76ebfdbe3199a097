"""shard_local: each rank orthogonalizes the rows it holds; gather_every: every so many steps they are gathered."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import models, oracles
from tests.distributed import cases, teams
from tests.distributed.conftest import Pools
from tests.distributed.pool import RankFailure
from tests.distributed.test_parity import assert_same, one_process

STEPS = 6
ADAMW = {"lr": 3e-3, "eps": 1e-5, "betas": [0.9, 0.95]}
MATRICES = ("up.weight", "blocks.0.weight", "blocks.1.weight", "blocks.2.weight", "odd.weight", "down.weight")


def params(name: str = "muon", **sharding: Any) -> dict[str, Any]:
    exact = {**oracles.EXACT, "sharding": {"wire_dtype": "float32", "mode": "shard_local", **sharding}}
    return {"name": name, "lr": 0.02, "adamw": ADAMW, **exact}


class ShardedMuon(oracles.Muon):
    """Muon whose update is made from the rows that each of ``ranks`` equal ranges of elements touches, in float64."""

    def __init__(self, weight: Tensor, ranks: int) -> None:
        super().__init__(weight, lr=0.02)
        self.ranks = ranks

    def update(self, direction: Tensor) -> Tensor:
        if self.ranks == 1:
            return super().update(direction)
        rows, cols = direction.shape
        scale = max(1, rows / cols) ** 0.5
        size = -(-direction.numel() // self.ranks)
        flat = direction.flatten()
        updates = []
        for begin in range(0, flat.numel(), size):
            end = min(begin + size, flat.numel())
            first, last = begin // cols, -(-end // cols)
            padded = torch.zeros(last * cols - first * cols, dtype=flat.dtype)
            own = slice(begin - first * cols, end - first * cols)
            padded[own] = flat[begin:end]
            found = oracles.newton_schulz(padded.view(-1, cols)).flatten()[own]
            rms = scale * (min(rows, cols) / (rows * cols)) ** 0.5
            updates.append(rms * found / found.square().mean().sqrt())
        return torch.cat(updates).view(rows, cols)


@cache
def reference(ranks: int, gather_every: int | None) -> dict[str, Tensor]:
    """ZeRO-3's cuts in one process: parameter by parameter into ``ranks`` ranges, rounded up."""
    model = models.build()
    weights = dict(model.named_parameters())
    others = [weight for name, weight in weights.items() if name not in MATRICES]
    adamw = torch.optim.AdamW(others, lr=ADAMW["lr"], eps=ADAMW["eps"], betas=(0.9, 0.95), weight_decay=0.0)
    sharded = {name: ShardedMuon(weights[name], ranks) for name in MATRICES}
    for step in range(STEPS):
        model.zero_grad()
        model(*models.batch(step)).backward()
        adamw.step()
        for name, oracle in sharded.items():
            oracle.ranks = 1 if gather_every and step % gather_every == 0 else ranks
            oracle.step(weights[name].grad)
            weights[name].data.copy_(oracle.weight)
    return {name: weight.detach() for name, weight in weights.items()}


@pytest.mark.promise("sharding-modes")
@pytest.mark.parametrize("gather_every", [None, 3])
@pytest.mark.parametrize("world", [2, 4])
def test_zero3_orthogonalizes_the_rows_that_each_rank_touches(world: int, gather_every: int | None, pools: Pools) -> None:
    """1e-4: float32 against the oracle's float64, through Newton-Schulz's steep start."""
    config = cases.engine_config(3, params(gather_every=gather_every))
    for result in pools[world].run(cases.train, config, steps=STEPS):
        assert_same(result["parameters"], reference(world, gather_every), 1e-4)


@pytest.mark.promise("shard-local-error")
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("stage", [1, 2])
def test_on_zero_1_and_2_only_matrices_that_lie_on_two_ranks_differ(stage: int, offload: str, pools: Pools) -> None:
    """After one step of one gradient: later ones depend on all matrices."""
    zero = {"offload_optimizer": {"device": offload}}
    gathered = one_process(params(mode="gather"), steps=1)[1]
    for result in pools[2].run(cases.train, cases.engine_config(stage, params(), zero_optimization=zero), steps=1):
        weights = result["parameters"].items()
        different = [name for name, weight in weights if not torch.allclose(weight, gathered[name], atol=1e-6)]
        assert len(different) == 1
        assert different[0] in MATRICES


def test_a_fragment_without_gradient_stands_still(pools: Pools) -> None:
    """NorMuon's second moments of its rows too, bit for bit; and in the same step, the other matrix moves.

    25 rows: the second rank's fragment begins in the middle of one, whose moment the first rank keeps.
    """
    given = {**params("normuon"), "weight_decay": 0.1}
    for found in pools[2].run(teams.idle_in_the_last_step, 3, [(25, 16), (25, 16)], given):
        assert found["weights"] == [True, False]
        assert found["moments"] == [True, False]


def test_one_rank_holds_every_matrix_whole(pools: Pools) -> None:
    expected = one_process(params(mode="gather"))
    (result,) = pools[1].run(cases.train, cases.engine_config(3, params()))
    assert_same(result["parameters"], expected[1])


@pytest.mark.promise("sharding-modes")
@pytest.mark.parametrize("stage", [2, 3])
def test_gathering_in_every_step_of_the_period_is_gather(stage: int, pools: Pools) -> None:
    """The first step of a period gathers."""
    expected = one_process(params(mode="gather"), steps=1)[1]
    for result in pools[2].run(cases.train, cases.engine_config(stage, params(gather_every=5)), steps=1):
        assert_same(result["parameters"], expected)


@pytest.mark.promise("shard-local-error")
@pytest.mark.parametrize("gather_every", [None, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("shapes", [False, True])
def test_normuon_learns_like_gather(shapes: bool, stage: int, gather_every: int | None, pools: Pools) -> None:
    """Rows that begin on another rank have no statistic here. Of the 1.0 that these 20 steps learn, 0.11 was seen to differ."""
    expected = one_process(params("normuon", mode="gather"), 20, shapes=shapes)[0]
    config = cases.engine_config(stage, params("normuon", gather_every=gather_every))
    results = pools[4].run(cases.train, config, 20, {"shapes": shapes})
    for result in results:
        assert result["losses"][-1] == pytest.approx(expected[-1], abs=0.15)
        assert_same(result["parameters"], results[0]["parameters"], 0.0)


@pytest.mark.promise("shard-local-error")
@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_an_update_made_of_fragments_is_as_large_as_that_of_a_whole_matrix(name: str, pools: Pools) -> None:
    """Of an orthogonal one: lr sqrt(max(1, out / in)) sqrt(min(out, in)). (Losses hardly tell 0.7 of it from it.)"""
    before = dict(models.build().named_parameters())
    for result in pools[4].run(cases.train, cases.engine_config(3, params(name)), steps=1):
        for matrix in MATRICES:
            out, into = before[matrix].shape
            size = (result["parameters"][matrix] - before[matrix].detach()).norm().item()
            assert size == pytest.approx(0.02 * max(1, out / into) ** 0.5 * min(out, into) ** 0.5, rel=1e-4), matrix


@pytest.mark.quick
@pytest.mark.promise("sharding-modes")
@pytest.mark.parametrize("stage", [2, 3])
def test_nothing_travels(stage: int, pools: Pools) -> None:
    assert pools[2].run(cases.all_to_alls, cases.engine_config(stage, params())) == [0, 0]
    assert pools[2].run(cases.all_to_alls, cases.engine_config(stage, params(mode="gather"))) == [2, 2]
    assert pools[2].run(cases.all_to_alls, cases.engine_config(stage, params(gather_every=3))) == [2, 2]


def test_ranks_that_disagree_on_the_mode_are_told(pools: Pools) -> None:
    with pytest.raises(RankFailure) as failure:
        pools[2].run(cases.train_in_own_mode, cases.engine_config(3, params()))
    assert failure.value.types == {0: "LayoutError", 1: "LayoutError"}
    assert "mode='shard_local'" in failure.value.messages[0]
    assert "mode='gather'" in failure.value.messages[0]
