"""Averaged weights, Schedule-Free's and those of any rule: in for evaluation, out again bit-exactly, on every stage."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ds_optforge import build_optimizer, evaluation_weights
from tests import models
from tests.distributed import cases
from tests.distributed.conftest import Pools
from tests.distributed.test_parity import assert_same
from tests.oracles import EXACT

PARAMS = {"name": "schedule_free_adamw", "lr": 3e-3, "eps": 1e-5, "warmup_steps": 5}
ENGINES: dict[str, dict[str, Any]] = {
    "stage 0": {"zero_optimization": {"stage": 0}},
    "stage 1": {"zero_optimization": {"stage": 1}},
    "stage 2": {"zero_optimization": {"stage": 2}},
    "stage 3": {"zero_optimization": {"stage": 3, "sub_group_size": 2000}},
    "stage 2, offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "stage 3, offload": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
    "stage 0, bf16": {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
    "stage 2, bf16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "stage 3, bf16": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
    "BF16_Optimizer": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
}


def tolerance(engine: str) -> float:
    """bf16: weights are rounded to 8 bits, and gradients are of those weights."""
    return 2e-2 if "bf16" in ENGINES[engine] else 1e-5


def schedulefree_oracle() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The averaged weights after 10 steps and the training weights after 20, by the reference package."""
    model = models.build()
    optimizer = schedulefree.AdamWScheduleFree(
        model.parameters(), lr=3e-3, eps=1e-5, warmup_steps=5, betas=(0.9, 0.999), weight_decay=0.0
    )
    optimizer.train()
    average: dict[str, Tensor] = {}
    for step in range(20):
        if step == 10:
            optimizer.eval()
            average = {name: p.detach().clone() for name, p in model.named_parameters()}
            optimizer.train()
        model(*models.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return average, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.promise("averaged-round-trip", "averaged-evaluation", "averaged-refusal", "schedule-free-points")
@pytest.mark.parametrize("engine", ENGINES)
def test_averaged_weights_are_a_bit_exact_round_trip(engine: str, pools: Pools, tmp_path: Path) -> None:
    config = cases.engine_config(2, PARAMS, **ENGINES[engine])
    average, end = schedulefree_oracle()
    _assert_round_trip(pools, config, tolerance(engine), average, end, tmp_path)


AVERAGED = {**cases.MUON, **EXACT, "average": {"kind": "ema", "decay": 0.8}}


@cache
def averaged_oracle() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The averaged weights after 10 steps and the training weights after 20, in plain PyTorch and by torch.optim.swa_utils."""
    model = models.build()
    optimizer = build_optimizer(model, {key: value for key, value in AVERAGED.items() if key != "average"})
    beside = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    average: dict[str, Tensor] = {}
    for step in range(20):
        model(*models.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        beside.update_parameters(model)
        if step == 9:
            average = {name: p.detach().clone() for name, p in beside.module.named_parameters()}
    return average, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.promise("average-any-rule", "averaged-round-trip", "averaged-evaluation", "averaged-refusal")
@pytest.mark.parametrize("engine", ENGINES)
def test_the_average_around_any_rule_is_too(engine: str, pools: Pools, tmp_path: Path) -> None:
    config = cases.engine_config(2, AVERAGED, **ENGINES[engine])
    _assert_round_trip(pools, config, tolerance(engine), *averaged_oracle(), tmp_path)


AHEAD = {**cases.MUON, **EXACT, "ema_nesterov": {"decay": 0.9, "scale": 0.6, "start": 3}}


@cache
def ahead_oracle() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """In plain PyTorch, where tests/test_ema_nesterov.py has it against the formula."""
    model = models.build()
    optimizer = build_optimizer(model, AHEAD)
    behind: dict[str, Tensor] = {}
    for step in range(20):
        model(*models.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 9:
            with evaluation_weights(optimizer):
                behind = {name: p.detach().clone() for name, p in model.named_parameters()}
    return behind, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.promise("ema-nesterov", "averaged-round-trip", "averaged-refusal")
@pytest.mark.parametrize("engine", ENGINES)
def test_ema_nesterov_trains_ahead_and_evaluates_behind(engine: str, pools: Pools, tmp_path: Path) -> None:
    config = cases.engine_config(2, AHEAD, **ENGINES[engine])
    # 5e-2: the average carries on what bfloat16 rounding of weights and gradients did, and the look-ahead multiplies it.
    _assert_round_trip(pools, config, 5e-2 if "bf16" in ENGINES[engine] else 1e-5, *ahead_oracle(), tmp_path)


@pytest.mark.parametrize("rule", ["adamw", "muon"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_it_is_the_average_of_the_engines_weights_bit_for_bit(rule: str, stage: int, pools: Pools) -> None:
    """Wherever ZeRO has cut them, at every place in a vector register."""
    params = {**(cases.MUON if rule == "muon" else {"name": "adamw", "lr": 3e-3}), "average": {"kind": "ema", "decay": 0.8}}
    for result in pools[2].run(cases.average_beside, cases.engine_config(stage, params), 0.8):
        for name, weight in result["expected"].items():
            assert torch.equal(result["inside"][name], weight), name
        assert not torch.equal(result["inside"]["up.weight"], result["trained"]["up.weight"])


def _assert_round_trip(
    pools: Pools, config: dict[str, Any], allowed: float, average: dict[str, Tensor], end: dict[str, Tensor], folder: Path
) -> None:
    for result in pools[2].run(cases.evaluate_on_average, config, str(folder)):
        for name, weight in result["before"].items():
            assert torch.equal(result["after"][name], weight), name
        assert not torch.equal(result["inside"]["up.weight"], result["before"]["up.weight"])
        assert_same(result["inside"], average, allowed)
        assert_same(result["end"], end, allowed)
        assert [message.split(" on ")[0] for message in result["refused"]] == ["step()", "state_dict()", "load_state_dict()"]


@pytest.mark.parametrize("stage", [0, 2])
def test_other_rules_are_left_alone(stage: int, pools: Pools, tmp_path: Path) -> None:
    config = cases.engine_config(stage, cases.MUON)
    result = pools[1].run(cases.evaluate_on_average, config, str(tmp_path))[0]
    assert all(torch.equal(result["inside"][name], weight) for name, weight in result["before"].items())
