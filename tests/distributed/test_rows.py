"""``sharding.rows``: the same rows are chosen whatever the cuts, and only they travel and are orthogonalized."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from ds_optforge import build_optimizer
from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.forecast.forecast import forecast_routes
from ds_optforge.forecast.topology import Topology
from ds_optforge.routing.roles import routes_of
from tests import models, oracles
from tests.distributed import cases, checkpoints, chosen, pipelines, tensor_parallel
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
def reference(rows: float | None, name: str, steps: int = STEPS, **settings: Any) -> dict[str, Tensor]:
    """Plain PyTorch on the global batches of 12."""
    model = models.build(shapes=True)
    optimizer = build_optimizer(model, params(rows, name, **settings))
    for step in range(steps):
        model(*models.batch(step, ROWS)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.promise("rows")
@pytest.mark.parametrize("name", ["muon", "normuon"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [2, 3])
def test_every_stage_takes_the_steps_of_one_process(world: int, stage: int, name: str, pools: Pools) -> None:
    """Rows cut in their middle, fewer rows than ranks and banks of matrices included."""
    config = cases.engine_config(stage, params(0.25, name), train_batch_size=ROWS)
    for result in pools[world].run(cases.train, config, steps=STEPS, model_options={"shapes": True}):
        assert_same(result["parameters"], reference(0.25, name))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "settings", [{"state_dtype": "bfloat16"}, {"cautious_weight_decay": True}], ids=["bfloat16", "cautious"]
)
def test_other_settings_take_the_steps_of_one_process(stage: int, settings: dict[str, Any], pools: Pools) -> None:
    """On buckets of some 700 elements, with offload on stage 3.

    1e-3 in bfloat16, as for portable checkpoints: a gradient that is reduced in another order may round to another number.
    """
    given = params(0.5, "normuon", sharding={"bucket_numel": 700}, **settings)
    zero = {"offload_optimizer": {"device": "cpu" if stage == 3 else "none"}}
    config = cases.engine_config(stage, given, train_batch_size=ROWS, zero_optimization=zero)
    for result in pools[3].run(cases.train, config, steps=STEPS, model_options={"shapes": True}):
        assert_same(result["parameters"], reference(0.5, "normuon", **settings), 1e-3 if "state_dtype" in settings else 1e-5)


@pytest.mark.parametrize("name", ["muon", "normuon"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_wire_of_bfloat16_changes_no_row_that_is_chosen(stage: int, name: str, pools: Pools) -> None:
    """Rows are chosen by what ranks hold, not by what travels. 1e-2: what bfloat16 makes of five steps' updates, in 8 bits.

    2e-2 with NorMuon, whose division by a row's mean square amplifies it where that is small.
    """
    config = cases.engine_config(stage, params(0.5, name, sharding={"wire_dtype": "bfloat16"}), train_batch_size=ROWS)
    for result in pools[2].run(cases.train, config, steps=5, model_options={"shapes": True}):
        assert_same(result["parameters"], reference(0.5, name, steps=5), 1e-2 if name == "muon" else 2e-2)


LARGE = {
    "each": [9, 1, 1, 1, 8, 1, 1, 1],
    "spread": [9, 8, 1, 1, 7, 6, 1, 1],
    "first rank": [9, 8, 7, 6, 1, 1, 1, 1],
    "second rank": [1, 1, 1, 1, 6, 7, 8, 9],
}


def test_statistics_arrive_whole_on_a_wire_of_bfloat16(pools: Pools, tmp_path: Path) -> None:
    """A float32 value is two elements there. Of rows that were not chosen again nothing is lost; 0.1: as for the weights."""
    given = params(0.5, "normuon", sharding={"wire_dtype": "bfloat16"})
    pools[2].run(checkpoints.run_and_save, cases.engine_config(3, given, train_batch_size=ROWS), str(tmp_path / "saved"))
    found = checkpoints.logical_tensors(tmp_path / "saved")
    model = models.build()
    optimizer = build_optimizer(model, given)
    for step in range(checkpoints.HALF):
        model(*models.batch(step, ROWS)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name in ("up.weight", "blocks.0.weight", "blocks.1.weight", "blocks.2.weight", "odd.weight", "down.weight"):
        moments = optimizer.state[model.get_parameter(name)]["row_second_moment"].flatten()
        error = found[f"optimizer/{name}/row_second_moment"] - moments
        assert error.norm() < 0.1 * moments.norm(), name


# Elements that each of two ranks sends for an 8x16 matrix, which the first one owns: those of the second rank's four rows
# that are chosen, and a flag; of all rows, up to a multiple of 8. The first rank sends as many back.
ELEMENTS = {
    (None, "spread"): 4 * 16 + 8,
    (1.0, "spread"): 4 * 16 + 8,
    (0.5, "spread"): 2 * 16 + 1,
    (0.25, "each"): 1 * 16 + 1,
    (0.25, "spread"): 1,  # rows 0 and 1
    (0.25, "first rank"): 1,
    (0.25, "second rank"): 2 * 16 + 1,
    (0.5, "second rank"): 4 * 16 + 1,
}


@pytest.mark.promise("rows-cost")
@pytest.mark.parametrize(("rows", "where"), ELEMENTS)
def test_only_chosen_rows_travel(rows: float | None, where: str, pools: Pools) -> None:
    given = params(rows, sharding={"wire_dtype": "bfloat16"})
    for counted in pools[2].run(chosen.count, 3, given, LARGE[where], 16):
        assert counted["sent"] == 2 * ELEMENTS[rows, where]


# Five quintic steps on (n, 64) in the Gram form: 8 n^2 64 + 28 n^3.
FLOPS = {None: 8 * 16**2 * 64 + 28 * 16**3, 0.5: 8 * 8**2 * 64 + 28 * 8**3, 0.25: 8 * 4**2 * 64 + 28 * 4**3}


@pytest.mark.promise("rows-cost")
@pytest.mark.parametrize("rows", FLOPS)
def test_only_chosen_rows_are_orthogonalized(rows: float | None, pools: Pools) -> None:
    """By the owner alone: 245,760, 47,104 and 9,984 FLOPs."""
    given = params(rows, orthogonalization={"dtype": "bfloat16"})
    counted = pools[2].run(chosen.count, 3, given, [float(16 - row) for row in range(16)], 64)
    assert sorted(each["flops"] for each in counted) == [0, FLOPS[rows]]


def test_rows_are_chosen_where_nothing_travels_too(pools: Pools) -> None:
    """A single rank holds every matrix whole."""
    (counted,) = pools[1].run(chosen.count, 2, params(0.25, orthogonalization={"dtype": "bfloat16"}), [1.0] * 16, 64)
    assert (counted["sent"], counted["flops"]) == (0, FLOPS[0.25])
    assert counted["state"] == ["accumulated_gradient", "step"]


@pytest.mark.promise("rows-cost")
@pytest.mark.parametrize("stage", [1, 3])
def test_a_forecast_is_what_is_sent_if_rows_are_chosen_as_often_on_every_rank(stage: int, pools: Pools) -> None:
    """With 8 bytes a row for the sums, of which each of two ranks sends half there and half back."""
    given = params(0.5, sharding={"wire_dtype": "bfloat16"}, orthogonalization={"dtype": "bfloat16"})
    routes = routes_of(nn.Sequential(nn.Linear(64, 8, bias=False)), OptimizerConfig(given))
    ranks = forecast_routes(routes, OptimizerConfig(given).common.sharding, Topology(2, stage)).ranks
    counted = pools[2].run(chosen.count, stage, given, [9.0, 8.0, 1.0, 1.0, 7.0, 6.0, 1.0, 1.0], 64)
    assert [each["sent"] + 8 * 8 for each in counted] == [rank.sent_bytes for rank in ranks]
    assert [each["flops"] for each in counted] == [rank.flops for rank in ranks]
    assert ranks[0].sent_bytes == 2 * (2 * 64 + 1) + 64


@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_a_portable_checkpoint_goes_on_on_another_topology(name: str, pools: Pools, tmp_path: Path) -> None:
    """From ZeRO-2 on 2 ranks to ZeRO-3 on 3, with offload, and to one process."""
    given = params(0.25, name)
    saved = cases.engine_config(2, given, train_batch_size=ROWS)
    expected = pools[2].run(checkpoints.run_and_save, saved, str(tmp_path / "saved"))[0]
    offload = {"offload_optimizer": {"device": "cpu"}}
    for world, config in {
        3: cases.engine_config(3, given, train_batch_size=ROWS, zero_optimization=offload),
        1: cases.engine_config(0, given, train_batch_size=ROWS),
    }.items():
        for result in pools[world].run(checkpoints.resume, config, str(tmp_path / "saved")):
            assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_engine_checkpoint_goes_on_bit_for_bit(stage: int, pools: Pools, tmp_path: Path) -> None:
    config = cases.engine_config(stage, params(0.25, "normuon"))
    for result in pools[2].run(cases.save_and_load, config, str(tmp_path)):
        assert result["resumed"]["losses"] == result["uninterrupted"]["losses"]
        assert_same(result["resumed"]["parameters"], result["uninterrupted"]["parameters"], 0.0)


def test_a_checkpoint_of_whole_matrices_is_refused_by_name(pools: Pools, tmp_path: Path) -> None:
    """Muon's average is no accumulated gradient; other shares of the rows go on with it."""
    saved, halves, quarters = (cases.engine_config(2, params(rows), train_batch_size=ROWS) for rows in (None, 0.5, 0.25))
    pools[2].run(checkpoints.run_and_save, saved, str(tmp_path / "whole"))
    message, unchanged = pools[2].run(checkpoints.refused, halves, str(tmp_path / "whole"))[0]
    assert "are not in the checkpoint, as 'optimizer/" in message
    assert "accumulated_gradient'; allowed: this run's (was sharding.rows set" in message
    assert unchanged
    pools[2].run(checkpoints.resume, halves, str(tmp_path / "whole"), strict=False)
    pools[2].run(checkpoints.run_and_save, halves, str(tmp_path / "halves"))
    assert pools[2].run(checkpoints.resume, quarters, str(tmp_path / "halves"))[0]["steps"] == checkpoints.HALF


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("world", [2, 4])
def test_rows_of_matrices_that_tensor_parallelism_has_cut(world: int, stage: int, pools: Pools) -> None:
    """By rows and by columns; two tensor ranks, beside one data rank and two."""
    given = params(0.25, "normuon")
    expected = tensor_parallel.one_process(given, 4)
    for found in pools[world].run(tensor_parallel.autotp, 2, stage, given, 4):
        assert tensor_parallel.difference(found, expected) < 1e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_what_goes_around_any_rule_goes_around_chosen_rows(stage: int, pools: Pools) -> None:
    """An average of the weights, and a look-ahead: elements of the slices, as with whole matrices."""
    around = {"average": {"kind": "ema", "decay": 0.9}, "ema_nesterov": {"decay": 0.9, "start": 0}}
    config = cases.engine_config(stage, params(0.25, **around), train_batch_size=ROWS)
    for result in pools[3].run(cases.train, config, steps=STEPS, model_options={"shapes": True}):
        assert_same(result["parameters"], reference.__wrapped__(0.25, "muon", **around))


def test_rows_in_the_stages_of_a_pipeline(pools: Pools) -> None:
    given = params(0.25)
    model = pipelines.whole()
    expected = pipelines.one_process(build_optimizer(model, given), model)[1]
    for result in pools[2].run(pipelines.train, pipelines.configuration(1, given), 2):
        found = result["parameters"]
        assert_same(found, {name: expected[name] for name in found})


def test_rows_of_experts_do_not_depend_on_the_ranks_that_hold_them(pools: Pools) -> None:
    losses = [
        pools[2].run(cases.train_mixture, cases.engine_config(2, params(0.25)), expert_parallel, 8)[0]["losses"]
        for expert_parallel in (1, 2)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
