"""Large matrices on four ranks: each is orthogonalized by a team, and trains as with one owner.

512 rows: a step in float32 then takes 30 * 512^3 FLOPs, standard form, which a team of s divides by s.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.forecast.forecast import forecast
from ds_optforge.forecast.topology import Topology
from tests.distributed import teams
from tests.distributed.conftest import Pools
from tests.distributed.test_parity import assert_same
from tests.oracles import EXACT, newton_schulz

MUON = {"name": "muon", "lr": 0.02, "weight_decay": 0.1, "adamw": {"lr": 0.001}}
ONE, TWO = [(512, 512)], [(512, 512)] * 2
WIDE_AND_TALL = [(256, 768), (768, 256)]  # in Gram form
FLOPS = 30 * 512**3


@pytest.mark.promise("teams")
@pytest.mark.parametrize(("shapes", "members"), [(ONE, 4), (TWO, 2)], ids=["one matrix", "two matrices"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_four_ranks_share_what_one_would_do_and_train_as_one_process(
    stage: int, shapes: teams.Shapes, members: int, pools: Pools
) -> None:
    params = {**MUON, **EXACT}
    expected = teams.one_process(shapes, params, 2)
    for found in pools[4].run(teams.train, stage, shapes, params, 2):
        assert_same(found["parameters"], expected)
        assert found["flops"] == FLOPS // members


@pytest.mark.parametrize("stage", [1, 3])
def test_the_gram_form_and_tall_matrices(stage: int, pools: Pools) -> None:
    params = {**MUON, **EXACT}
    expected = teams.one_process(WIDE_AND_TALL, params, 2)
    for found in pools[4].run(teams.train, stage, WIDE_AND_TALL, params, 2):
        assert_same(found["parameters"], expected)
        assert found["sent"]["c10d::send"] > 0


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_computes_and_sends_what_was_predicted(stage: int, pools: Pools) -> None:
    """In bfloat16: 9 gathers of products of 512 x 512 and one of the matrix, three quarters of each, and a flag."""
    predicted = forecast(teams.build(ONE, 0), OptimizerConfig(MUON), Topology(4, stage))
    assert predicted.teams == {4: 1}
    gathered = 2 * (10 * 512 * 512 // 4 + 1) * 3
    assert [rank.gathered_bytes for rank in predicted.ranks] == [gathered] * 4
    counted = pools[4].run(teams.train, stage, ONE, MUON, 1)
    assert [found["flops"] for found in counted] == [rank.flops for rank in predicted.ranks] == [FLOPS // 4] * 4
    assert [found["sent"]["c10d::send"] for found in counted] == [gathered] * 4
    exchanged = [rank.sent_bytes - rank.gathered_bytes for rank in predicted.ranks]
    assert [found["sent"]["c10d::alltoall_base_"] for found in counted] == exchanged


def distance_from_formula(weight: Tensor) -> float:
    """How far the first step to ``weight``, at learning rate 1, is from the formula in float64 on the rounded momentum."""
    model = teams.build(ONE, 0)
    model(teams.inputs_of(0, ONE)).backward()
    before = model.layers[0].weight
    assert isinstance(before, Tensor)
    assert before.grad is not None
    momentum = (before.grad * (0.05 + 0.95 * 0.05)).bfloat16()  # Nesterov's, from zero
    return float((before.detach() - newton_schulz(momentum) - weight).norm())


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("state_dtype", ["float32", "8bit"])
def test_in_bfloat16_a_step_is_that_of_one_owner_up_to_the_rounding_of_its_products(
    state_dtype: str, stage: int, pools: Pools
) -> None:
    """On the same ranks, with gradients that are alike bit for bit, and a rule that knows of no teams.

    A kernel may add up fewer rows in another order, and Newton-Schulz magnifies small singular directions, of which this
    gradient, of rank 8, has 504. So the bound is how far one owner is from the formula: 1.05, where the two are 0.035 apart.
    """
    params = {**MUON, "state_dtype": state_dtype, "lr": 1.0, "weight_decay": 0.0}
    together = pools[4].run(teams.train, stage, ONE, params, 1)
    alone = pools[4].run(teams.train, stage, ONE, {**params, "name": "lonely"}, 1)
    assert sorted(found["flops"] for found in alone) == [0, 0, 0, FLOPS]
    for found, expected in zip(together, alone, strict=True):
        assert "c10d::send" not in expected["sent"]
        name = "layers.0.weight"
        difference = (found["parameters"][name] - expected["parameters"][name]).norm()
        assert difference <= distance_from_formula(expected["parameters"][name]) / 10
        assert distance_from_formula(found["parameters"][name]) <= 1.02 * distance_from_formula(expected["parameters"][name])
        assert torch.equal(found["parameters"]["bias"], expected["parameters"]["bias"])


@pytest.mark.parametrize("stage", [1, 3])
def test_a_matrix_without_gradient_stands_still_on_all_members(stage: int, pools: Pools) -> None:
    """And one with a gradient in two rows, which one member owns, moves on all of them."""
    params = {**MUON, **EXACT}
    expected = teams.one_process(TWO, params, 2, skipped=1, few=1)
    before = teams.one_process(TWO, params, 1, few=1)["layers.1.weight"]
    for found in pools[4].run(teams.train, stage, TWO, params, 2, skipped=1, few=1):
        assert_same(found["parameters"], expected)
        torch.testing.assert_close(found["parameters"]["layers.1.weight"], before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_and_several_sub_groups(stage: int, pools: Pools) -> None:
    zero: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}, "sub_group_size": 512 * 512}
    params = {**MUON, **EXACT}
    expected = teams.one_process(TWO, params, 2)
    for found in pools[4].run(teams.train, stage, TWO, params, 2, **zero):
        assert_same(found["parameters"], expected)
        assert found["sent"]["c10d::send"] > 0


def test_telemetry_sees_the_whole_factor(pools: Pools) -> None:
    params = {**MUON, **EXACT, "telemetry": {"every": 1}}
    (together, *_), (alone, *_) = (
        pools[4].run(teams.train, 3, TWO, {**params, "name": name}, 1) for name in ("muon", "lonely")
    )
    errors = [
        numbers["orthogonality_error"]
        for found in (together, alone)
        for numbers in found["telemetry"]["groups"].values()
        if "orthogonality_error" in numbers
    ]
    assert len(errors) == 2
    assert errors[0] == pytest.approx(errors[1], rel=1e-4) != 0


def test_a_gather_every_few_steps_has_teams_in_those(pools: Pools) -> None:
    params = {**MUON, **EXACT, "sharding": {**EXACT["sharding"], "mode": "shard_local", "gather_every": 2}}
    apart, gathered = (pools[4].run(teams.train, 3, ONE, params, steps)[0] for steps in (1, 2))
    sent = [found["sent"].get("c10d::send", 0) for found in (apart, gathered)]
    assert sorted(map(bool, sent)) == [False, True]


def test_teams_of_each_stage_of_a_pipeline(pools: Pools) -> None:
    """The second stage has one matrix beside its head: its ranks, 2 and 3, are a team, within a group of their own.

    1e-3: of 8 samples a gradient has 8 directions, and Newton-Schulz amplifies what micro-batches leave in the others.
    """
    params = {**MUON, **EXACT, "overrides": [{"match": r"^3\.weight$", "name": "adamw"}]}
    expected = teams.without_pipeline(params, 512, 2)
    results = pools[4].run(teams.in_pipeline, params, 512, 2)
    for name, weight in expected.items():
        holders = [found for found in results if name in found["parameters"]]
        assert len(holders) == 2
        assert name != "2.weight" or [found["members"] for found in holders] == [[2], [2]]
        for found in holders:
            assert_same({name: found["parameters"][name]}, {name: weight}, 1e-3)
