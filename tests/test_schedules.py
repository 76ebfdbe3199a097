"""Curves of the step: exact at their ends, and moving all groups alike."""

import itertools
import math

import pytest
import torch
from torch import nn

from ds_optforge import ConfigError, OptForge, OptForgeSchedule, build_optimizer
from ds_optforge.config.schedule import ScheduleConfig, schedule_config
from ds_optforge.schedules import learning_rate_factor, weight_decay_factor

CURVES = ["linear", "cosine"]


def curve(**section: object) -> list[float]:
    """The factor of every step of the run."""
    config = schedule_config(section)
    assert config.total_num_steps is not None
    return [learning_rate_factor(step, config) for step in range(config.total_num_steps)]


def optimizer() -> OptForge:
    """A group of Muon at 0.02 and one of AdamW at 0.001."""
    return build_optimizer(nn.Linear(4, 4), {"name": "muon", "lr": 0.02, "adamw": {"lr": 0.001}})


def rates(chosen: OptForge) -> list[float]:
    return [group["lr"] for group in chosen.param_groups]


@pytest.mark.promise("schedule-floor", "schedule-recipe")
@pytest.mark.parametrize("floor", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("warmup", [0, 1, 7, 19])
@pytest.mark.parametrize("name", CURVES)
def test_the_floor_is_reached_exactly_in_the_last_step_and_not_before(name: str, warmup: int, floor: float) -> None:
    factors = curve(name=name, warmup_num_steps=warmup, total_num_steps=20, final_lr_fraction=floor)
    assert factors[-1] == floor
    assert min(factors[warmup:-1], default=1.0) > floor


@pytest.mark.promise("schedule-shapes")
@pytest.mark.parametrize("name", ["constant", *CURVES])
def test_a_warm_up_of_w_steps_starts_at_1_over_w_and_ends_at_1(name: str) -> None:
    factors = curve(name=name, warmup_num_steps=8, total_num_steps=20)
    assert factors[:8] == [(step + 1) / 8 for step in range(8)]


@pytest.mark.promise("schedule-parts")
@pytest.mark.parametrize("name", ["constant", *CURVES])
def test_without_a_warm_up_the_first_step_is_the_full_rate(name: str) -> None:
    assert curve(name=name, total_num_steps=20)[0] == 1.0


@pytest.mark.parametrize("name", CURVES)
def test_there_is_no_jump_where_the_warm_up_ends(name: str) -> None:
    """The peak is one step, and no later step changes by more than the steepest stretch of the curve, pi/2 of the mean."""
    factors = curve(name=name, warmup_num_steps=10, total_num_steps=110)
    falls = [before - after for before, after in itertools.pairwise(factors[9:])]
    assert factors.count(1.0) == 1
    assert min(falls) > 0
    assert max(falls) < 1.6 / 100


@pytest.mark.promise("schedule-shapes", "schedule-cool-down")
@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("name", ["constant", "wsd", "linear", "cosine", "rex"])
def test_a_cool_down_starts_where_the_curve_is_and_reaches_the_floor_in_the_last_step(name: str, shape: str) -> None:
    section = {"warmup_num_steps": 5, "total_num_steps": 50, "final_lr_fraction": 0.05}
    factors = curve(name=name, cooldown_num_steps=20, cooldown_shape=shape, **section)
    if name != "wsd":  # which has none without a cool-down
        assert factors[:30] == curve(name=name, **section)[:30]
    assert factors[-1] == 0.05
    assert factors[29:] == sorted(set(factors[29:]), reverse=True)  # falls with every step


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_rex_is_a_power_of_what_is_left(floor: float) -> None:
    factors = curve(name="rex", exponent=2.0, total_num_steps=5, final_lr_fraction=floor)
    assert factors == pytest.approx([1.0, 0.5625, 0.25, max(0.0625, floor), floor])


@pytest.mark.promise("schedule-shapes")
def test_linear_falls_by_equal_steps() -> None:
    assert curve(name="linear", total_num_steps=5, final_lr_fraction=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.promise("schedule-shapes")
def test_cosine_is_half_way_in_the_middle_and_flat_at_both_ends() -> None:
    factors = curve(name="cosine", total_num_steps=101)
    assert factors[50] == pytest.approx(0.5)
    assert factors[25] == pytest.approx(0.5 + 0.5**1.5)  # (1 + cos(pi/4)) / 2
    assert 1 - factors[1] == pytest.approx(factors[-2])


@pytest.mark.promise("schedule-parts")
@pytest.mark.parametrize("name", ["constant", "none"])
def test_constant_and_none_stay_at_the_initial_rate(name: str) -> None:
    assert set(curve(name=name, total_num_steps=20)) == {1.0}


def test_constant_needs_no_total() -> None:
    config = schedule_config({"name": "constant", "warmup_num_steps": 4})
    assert [learning_rate_factor(step, config) for step in (0, 3, 4, 10_000)] == [0.25, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", CURVES)
def test_steps_beyond_the_end_stay_at_the_floor(name: str) -> None:
    config = schedule_config({"name": name, "total_num_steps": 20, "final_lr_fraction": 0.1})
    assert learning_rate_factor(500, config) == 0.1


@pytest.mark.promise("schedule-shapes")
def test_warmup_ratio_is_a_fraction_of_all_steps() -> None:
    by_ratio = curve(name="linear", warmup_ratio=0.1, total_num_steps=50)
    assert by_ratio == curve(name="linear", warmup_num_steps=5, total_num_steps=50)


def test_a_bad_section_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^scheduler\.params\.warmup: unknown key"):
        OptForgeSchedule(optimizer(), warmup=3)


@pytest.mark.promise("adamw-beside-curve")
def test_every_group_follows_the_same_curve_from_its_own_rate() -> None:
    chosen = optimizer()
    schedule = OptForgeSchedule(chosen, name="cosine", warmup_num_steps=3, total_num_steps=12, final_lr_fraction=0.1)
    seen = []
    for _ in range(12):
        seen.append(rates(chosen))
        chosen.step()
        schedule.step()
    expected = curve(name="cosine", warmup_num_steps=3, total_num_steps=12, final_lr_fraction=0.1)
    assert [muon for muon, _ in seen] == pytest.approx([0.02 * factor for factor in expected])
    assert [adamw for _, adamw in seen] == pytest.approx([0.001 * factor for factor in expected])


@pytest.mark.parametrize(("factors", "warnings"), [([0.5, 1.0, 1.0, 1.0], 0), ([1.0, 1.0, 0.9, 0.8], 1)])
def test_schedule_free_under_a_falling_curve_of_another_scheduler_warns_once(
    factors: list[float], warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as the linear one that the HF Trainer adds; of OptForgeSchedule's own a falling one is refused."""
    model = nn.Linear(4, 4)
    chosen = build_optimizer(model, {"name": "schedule_free_adamw", "warmup_steps": 2})
    schedule = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: [*factors, 0.0][step])
    for _ in factors:
        model(torch.ones(4)).sum().backward()
        chosen.step()
        schedule.step()
    assert [record.levelname for record in caplog.records if "below an earlier one" in record.message] == warnings * ["WARNING"]


def test_the_first_step_is_taken_at_the_first_rate_of_the_warm_up() -> None:
    chosen = optimizer()
    OptForgeSchedule(chosen, name="constant", warmup_num_steps=4)
    assert rates(chosen) == pytest.approx([0.005, 0.00025])


def test_a_resumed_schedule_goes_on_where_it_was() -> None:
    section = {"name": "linear", "warmup_num_steps": 3, "total_num_steps": 12}
    first = optimizer()
    schedule = OptForgeSchedule(first, **section)
    for _ in range(5):
        first.step()
        schedule.step()
    second = optimizer()
    resumed = OptForgeSchedule(second, **section)
    resumed.load_state_dict(schedule.state_dict())
    assert rates(second) == rates(first)
    assert resumed.get_last_lr() == schedule.get_last_lr()
    for chosen, curve_of_it in ((first, schedule), (second, resumed)):
        chosen.step()
        curve_of_it.step()
    assert rates(second) == rates(first)


def test_a_resumed_run_follows_the_curve_that_it_is_configured_with() -> None:
    """A longer total after an interruption is the user's wish."""
    first, second = optimizer(), optimizer()
    schedule = OptForgeSchedule(first, name="linear", total_num_steps=11)
    for _ in range(5):
        first.step()
        schedule.step()
    longer = OptForgeSchedule(second, name="linear", total_num_steps=21)
    longer.load_state_dict(schedule.state_dict())
    assert rates(first)[0] == pytest.approx(0.02 * 0.5)
    assert rates(second)[0] == pytest.approx(0.02 * 0.75)


def test_its_state_is_plain_data(tmp_path) -> None:  # type: ignore[no-untyped-def]
    state = OptForgeSchedule(optimizer(), name="linear", total_num_steps=11).state_dict()
    torch.save(state, tmp_path / "schedule.pt")
    assert torch.load(tmp_path / "schedule.pt", weights_only=True) == state


@pytest.mark.promise("decay-schedule")
def test_factors_of_the_decay_by_hand() -> None:
    """After none, a quarter, half and all of eight steps, and beyond: cos(pi / 4) is the root of a half."""
    assert [weight_decay_factor(step, "linear", 8) for step in (0, 2, 4, 8, 12)] == [1.0, 0.75, 0.5, 0.0, 0.0]
    found = [weight_decay_factor(step, "cosine", 8) for step in (0, 2, 4, 8, 12)]
    assert found == pytest.approx([1.0, 0.5 + math.sqrt(0.125), 0.5, 0.0, 0.0], abs=1e-15)


def test_factors_of_the_rate_by_hand() -> None:
    """Two of ten steps are the warm-up, and eight fall by a tenth each to a floor of 0.2, where the one beyond the end is."""
    config = ScheduleConfig(name="linear", warmup_num_steps=2, total_num_steps=10, final_lr_fraction=0.2)
    found = [learning_rate_factor(step, config) for step in range(11)]
    assert found == pytest.approx([0.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2])


def test_factors_of_a_cool_down_by_hand() -> None:
    """Four steps of cool-down behind six that are constant; the step before them is the sixth. 1 - sqrt(1 / 4) is a half."""
    found = {}
    for shape in ("linear", "1-sqrt"):
        config = ScheduleConfig(name="wsd", cooldown_num_steps=4, cooldown_shape=shape, total_num_steps=10)
        found[shape] = [learning_rate_factor(step, config) for step in range(4, 12)]
    assert found["linear"] == [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    assert found["1-sqrt"][:3] == [1.0, 1.0, 0.5]
    assert found["1-sqrt"][5:] == [0.0, 0.0, 0.0]


def test_a_cool_down_over_all_steps_begins_below_the_full_rate() -> None:
    """Four steps: three quarters, a half, a quarter, nothing."""
    config = ScheduleConfig(name="wsd", cooldown_num_steps=4, total_num_steps=4)
    assert [learning_rate_factor(step, config) for step in range(4)] == [0.75, 0.5, 0.25, 0.0]
