"""A schedule is judged by the rates and momenta that it writes into groups with different rates, not by its name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
)
from torch.optim.swa_utils import SWALR

from ds_optforge import ConfigError, OptForge, build_optimizer

CONFIG = {"name": "muon", "lr": 0.02, "adamw": {"lr": 0.001}}
LISTS = {"max_lr": [0.02, 0.001]}


def optimizer(**config: Any) -> OptForge:
    """A group of Muon at 0.02 and one of AdamW at 0.001, with gradients."""
    model = nn.Linear(4, 4)
    chosen = build_optimizer(model, {**CONFIG, **config})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return chosen


def weights(chosen: OptForge) -> list[Tensor]:
    return [parameter.detach().clone() for group in chosen.param_groups for parameter in group["params"]]


def train(chosen: OptForge, schedule: LRScheduler, steps: int) -> None:
    for _ in range(steps):
        chosen.step()
        schedule.step()


@pytest.mark.parametrize(
    "flattening",
    [
        lambda chosen: OneCycleLR(chosen, max_lr=0.02, total_steps=20, cycle_momentum=False),
        lambda chosen: CyclicLR(chosen, base_lr=1e-4, max_lr=0.02, cycle_momentum=False),
        lambda chosen: CyclicLR(chosen, base_lr=0.01, max_lr=0.02, cycle_momentum=False),
        lambda chosen: SWALR(chosen, swa_lr=0.05),
    ],
    ids=["OneCycleLR", "CyclicLR from low", "CyclicLR", "SWALR"],
)
def test_one_rate_for_all_groups_is_refused_before_any_weight_changes(flattening: Callable[[OptForge], LRScheduler]) -> None:
    chosen = optimizer()
    flattening(chosen)
    before = weights(chosen)
    with pytest.raises(
        ConfigError,
        match=r"^scheduler: .*matrix\.muon 0\.02, scalar\.adamw 0\.001.*set '(swa_)?lr' of all.*max_lr=\[0\.02, 0\.001\]",
    ):
        chosen.step()
    assert all(map(torch.equal, weights(chosen), before))


@pytest.mark.parametrize(
    "schedule",
    [
        lambda chosen: OneCycleLR(chosen, **LISTS, total_steps=20, cycle_momentum=False),
        lambda chosen: CyclicLR(chosen, base_lr=[2e-3, 1e-4], **LISTS, step_size_up=4, cycle_momentum=False),
        lambda chosen: SWALR(chosen, swa_lr=[0.01, 0.0005], anneal_epochs=3),
        lambda chosen: LambdaLR(chosen, [lambda step: 1 / (step + 1), lambda step: 1.0]),
    ],
    ids=["OneCycleLR", "CyclicLR", "SWALR", "LambdaLR"],
)
def test_a_rate_for_each_group_is_the_users_wish(schedule: Callable[[OptForge], LRScheduler]) -> None:
    chosen = optimizer()
    train(chosen, schedule(chosen), 12)


def test_one_rate_that_comes_after_a_rate_of_zero_is_refused_at_once() -> None:
    """At zero nothing can be told, and nothing changes."""
    chosen = optimizer()
    before = weights(chosen)
    for group in chosen.param_groups:
        group["lr"] = 0.0
    chosen.step()
    for group in chosen.param_groups:
        group["lr"] = 1e-5
    with pytest.raises(ConfigError, match=r"set 'lr' of all of them to 1e-05"):
        chosen.step()
    assert all(map(torch.equal, weights(chosen), before))


def test_a_peak_that_all_groups_share_is_refused_where_it_is_reached() -> None:
    """Its base rates differ; the step to the common one is not made."""
    chosen = optimizer()
    schedule = CyclicLR(chosen, base_lr=[0.02, 0.001], max_lr=0.04, step_size_up=4, cycle_momentum=False)
    train(chosen, schedule, 4)
    before = weights(chosen)
    with pytest.raises(ConfigError, match=r"to 0\.04"):
        chosen.step()
    assert all(map(torch.equal, weights(chosen), before))


@pytest.mark.parametrize("resumed", [False, True])
def test_a_floor_that_all_groups_reach_is_fine(resumed: bool) -> None:
    """As eta_min, which no group is configured to be below."""
    chosen = optimizer()
    schedule = CosineAnnealingLR(chosen, T_max=4, eta_min=1e-4)
    train(chosen, schedule, 4)
    assert {group["lr"] for group in chosen.param_groups} == {1e-4}
    if resumed:
        again = optimizer()
        again.load_state_dict(chosen.state_dict())
        chosen = again
    chosen.step()


def test_a_plateau_at_its_floor_is_fine() -> None:
    chosen = optimizer()
    schedule = ReduceLROnPlateau(chosen, factor=0.1, patience=0, min_lr=1e-5)
    for _ in range(12):
        chosen.step()
        schedule.step(1.0)
    assert {group["lr"] for group in chosen.param_groups} == {1e-5}


def test_one_rate_is_fine_where_one_is_configured() -> None:
    chosen = optimizer(adamw={"lr": 0.02})
    train(chosen, OneCycleLR(chosen, max_lr=0.05, total_steps=20, cycle_momentum=False), 12)


@pytest.mark.parametrize("schedule", [ConstantLR, LinearLR])
def test_factors_keep_the_ratios(schedule: type[LRScheduler]) -> None:
    chosen = optimizer()
    train(chosen, schedule(chosen), 8)


class TestMomentum:
    """Default OneCycleLR and CyclicLR move momentum: exact where every group's rule reads what they write."""

    @pytest.mark.parametrize("schedule", [OneCycleLR, CyclicLR])
    def test_of_a_group_that_does_not_read_it_is_refused(self, schedule: type) -> None:
        chosen = optimizer()
        arguments = {"total_steps": 20} if schedule is OneCycleLR else {"base_lr": [2e-3, 1e-4]}
        schedule(chosen, **LISTS, **arguments)
        before = weights(chosen)
        message = r"^scheduler: .* wrote 'momentum' into the group 'scalar\.adamw', whose rule 'adamw' .*cycle_momentum=False"
        with pytest.raises(ConfigError, match=message):
            chosen.step()
        assert all(map(torch.equal, weights(chosen), before))

    def test_of_muon_alone_takes_effect(self) -> None:
        """As with the same momenta written by hand."""
        by_scheduler, by_hand = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        by_hand.load_state_dict(by_scheduler.state_dict())
        first, second = build_optimizer(by_scheduler, CONFIG), build_optimizer(by_hand, CONFIG)
        schedule = OneCycleLR(first, max_lr=0.02, total_steps=10)
        seen = []
        for step in range(8):
            seen.append(first.param_groups[0]["momentum"])
            second.param_groups[0].update(lr=first.param_groups[0]["lr"], momentum=seen[-1])
            gradient = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
            by_scheduler.weight.grad, by_hand.weight.grad = gradient, gradient.clone()
            first.step()
            second.step()
            schedule.step()
        assert len(set(seen)) > 3
        assert torch.equal(by_scheduler.weight, by_hand.weight)

    def test_of_adamw_is_its_first_beta_as_in_torch(self) -> None:
        ours, theirs = nn.Linear(4, 4), nn.Linear(4, 4)
        theirs.load_state_dict(ours.state_dict())
        first = build_optimizer(ours, {"name": "adamw", "lr": 0.01, "betas": [0.9, 0.99]})
        second = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        schedules = [OneCycleLR(chosen, max_lr=0.01, total_steps=10) for chosen in (first, second)]
        for step in range(8):
            for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
                other.grad = parameter.grad.clone()
            for chosen, schedule in zip((first, second), schedules, strict=True):
                chosen.step()
                schedule.step()
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
