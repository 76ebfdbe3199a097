"""The launches and the workspace of ``ds-optforge plan`` against those of steps that run on the meta device."""

from __future__ import annotations

from typing import Any

import pytest

from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.forecast.command import Question, answer
from ds_optforge.forecast.forecast import Forecast, forecast_routes
from ds_optforge.forecast.launches import step_launches
from ds_optforge.forecast.report import report
from ds_optforge.forecast.topology import Topology
from ds_optforge.routing.roles import routes_of
from tests.stand_in import Shape, model_of, standing, steady_step
from tests.step_trace import StepTrace
from tests.test_launches import EXPERTS, SEVEN_B, SMALL, SQUARES

ODD = ((130, 70), (70, 130), (33, 257)) * 9 + ((6, 40, 24),)
BANKS = ((8, 256, 512),) * 6


def planned(shapes: tuple[Shape, ...], stage: int, world: int, **config: Any) -> Forecast:
    """The plan of the group that `steady_step` steps."""
    checked = OptimizerConfig({"lr": 0.02, **config})
    routes = routes_of(model_of(shapes), checked)
    first = [route for route in routes if route.group == routes[0].group]
    return forecast_routes(first, checked.common.sharding, Topology(world, stage, device="cuda"))


CASES: dict[str, tuple[tuple[Shape, ...], int, int, dict[str, Any]]] = {
    f"{name}, {rule}, ZeRO-{stage}": (shapes, stage, world, {"name": rule, "weight_decay": 0.1})
    for name, shapes, world, rules in (
        ("8 layers", SMALL, 3, ("muon", "normuon", "adamw", "lion", "schedule_free_adamw")),
        ("odd shapes", ODD, 4, ("muon", "normuon", "adamw")),
        ("banks of experts", BANKS, 3, ("muon", "normuon")),
        ("512 squares", SQUARES, 8, ("muon",)),
        ("7B", SEVEN_B, 8, ("muon",)),
        ("2304 experts", EXPERTS, 256, ("muon",)),
    )
    for rule in rules
    for stage in (2, 3)
} | {
    f"8 layers, {said}": (SMALL, 3, 3, {"name": rule, **more})
    for said, rule, more in (
        ("without decay", "muon", {}),
        ("cautious decay", "normuon", {"weight_decay": 0.1, "cautious_weight_decay": True}),
        ("without nesterov", "muon", {"nesterov": False}),
        ("a steep set", "muon", {"orthogonalization": {"coefficients": "polar_express"}}),
        ("eight steps", "muon", {"orthogonalization": {"steps": 8}}),
        ("the standard form", "muon", {"orthogonalization": {"method": "standard"}}),
        ("in float32", "normuon", {"orthogonalization": {"dtype": "float32"}}),
        ("a scale that 16 bits round", "muon", {"orthogonalization": {"scale": "match_rms_adamw"}}),
        ("a wire of float32", "normuon", {"sharding": {"wire_dtype": "float32"}}),
        ("small buckets", "muon", {"sharding": {"bucket_numel": 2**22}}),
        ("sgd", "sgd", {"momentum": 0.9}),
    )
}


@pytest.mark.parametrize("case", CASES)
def test_launches_are_exactly_those_that_run(case: str) -> None:
    shapes, stage, world, config = CASES[case]
    found = step_launches(planned(shapes, stage, world, **config))
    assert not found.uncounted
    counts = steady_step(shapes, stage, world, found.rank, **config).counts
    assert found.kernels == counts.launches, counts.places()


def test_a_rule_without_a_formula_is_named() -> None:
    found = step_launches(planned(SMALL, 2, 3, name="adamw_8bit"))
    assert (found.kernels, found.uncounted) == (0, ("adamw_8bit",))


@pytest.mark.parametrize("case", [case for case in CASES if ("muon" in CASES[case][3]["name"]) and "2304" not in case])
def test_the_workspace_on_an_accelerator_holds_what_a_step_does(case: str) -> None:
    """Temporary tensors of Newton-Schulz on whole batches included; flags and sums of rows are the half percent beyond it.

    Where the last exchange is the smallest it is up to a quarter too much: what is in flight beside the largest is not."""
    shapes, stage, world, config = CASES[case]
    ranks = planned(shapes, stage, world, **config).ranks
    rank = max(range(world), key=lambda each: ranks[each].workspace_bytes)
    with standing(shapes, stage, world, rank, **config) as (optimizer, _):
        optimizer.step()
        with StepTrace(allowed=2**60) as trace:
            optimizer.step()
    assert 0.78 * ranks[rank].workspace_bytes <= trace.peak <= 1.01 * ranks[rank].workspace_bytes


def test_the_plan_prints_them_with_the_hosts_time() -> None:
    """5 microseconds each; in JSON with the rank that was counted."""
    plan = answer(Question("gpt2", 8, stage=3))
    kernels = step_launches(plan.stages[0].predicted).kernels
    assert f"launches {kernels:,} kernels a step" in " ".join(report(plan).split())
    assert plan.plain()["stages"][0]["launches"] == {
        "rank": step_launches(plan.stages[0].predicted).rank,
        "kernels": kernels,
        "uncounted": (),
        "host_seconds": pytest.approx(5e-6 * kernels),
    }
