"""Curves in all their combinations: no jump, exact end points; and what may not be combined."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ds_optforge import ConfigError, build_optimizer, build_scheduler
from ds_optforge.config.schedule import ScheduleConfig, schedule_config
from ds_optforge.schedules import learning_rate_factor

MAIN = ["constant", "linear", "cosine", "rex"]
SHAPES = ["linear", "cosine", "1-sqrt"]
holds_for = settings(max_examples=300, deadline=None)


def curve(**section: object) -> list[float]:
    """The factor of every step of the run."""
    config = schedule_config(section)
    assert config.total_num_steps is not None
    return [learning_rate_factor(step, config) for step in range(config.total_num_steps)]


@st.composite
def sections(draw: st.DrawFn) -> dict[str, Any]:
    """A run of at least one step after the warm-up and before the cool-down, if there is one."""
    name = draw(st.sampled_from([*MAIN, "wsd"]))
    total = draw(st.integers(3, 200))
    warmup = draw(st.integers(0, total - 2))
    section: dict[str, Any] = {"name": name, "total_num_steps": total, "warmup_num_steps": warmup}
    section["final_lr_fraction"] = draw(st.sampled_from([0.0, 0.1, 0.37, 1.0]) | st.floats(0, 1))
    if name == "wsd" or draw(st.booleans()):
        section["cooldown_num_steps"] = draw(st.integers(1, total - 1 - warmup))
        section["cooldown_shape"] = draw(st.sampled_from(SHAPES))
    if name == "rex":
        section["exponent"] = draw(st.sampled_from([0.5, 1.0, 2.0]))
    return section


def steepest(config: ScheduleConfig) -> float:
    """The largest change from one step to the next that warm-up, main curve and cool-down can make, each on its own."""
    assert config.total_num_steps is not None
    length = max(config.total_num_steps - max(config.warmup, 1), 1)
    falls = {
        "linear": 1 / length,
        "cosine": math.pi / 2 / length,
        "rex": max(config.exponent / length, length**-config.exponent),
    }
    bounds = [1 / max(config.warmup, 1) if config.warmup else 0, falls.get(config.name, 0)]
    if config.cools_down:
        steps = config.cooldown
        bounds.append({"linear": 1 / steps, "cosine": math.pi / 2 / steps, "1-sqrt": steps**-0.5}[config.cooldown_shape])
    return max(bounds)


class TestProperties:
    @holds_for
    @given(sections())
    def test_a_factor_is_a_fraction_and_the_first_is_not_zero(self, section: dict[str, Any]) -> None:
        factors = curve(**section)
        assert min(factors) >= 0
        assert max(factors) <= 1
        assert factors[0] > 0

    @pytest.mark.promise("schedule-cool-down")
    @holds_for
    @given(sections())
    def test_there_are_no_jumps(self, section: dict[str, Any]) -> None:
        """No step is larger than the steepest part alone could make it. 1e-9: rounding."""
        changes = [abs(after - before) for before, after in itertools.pairwise(curve(**section))]
        assert max(changes) <= steepest(schedule_config(section)) + 1e-9

    @pytest.mark.promise("schedule-floor", "schedule-recipe")
    @holds_for
    @given(sections())
    def test_the_last_step_is_exact(self, section: dict[str, Any]) -> None:
        """At the floor, but for a constant rate without a cool-down."""
        falls = section["name"] != "constant" or "cooldown_num_steps" in section
        assert curve(**section)[-1] == (section["final_lr_fraction"] if falls else 1.0)

    @holds_for
    @given(sections())
    def test_after_the_peak_it_never_rises(self, section: dict[str, Any]) -> None:
        """1e-15 of rounding: a + (1 - a) x."""
        after = curve(**section)[max(section["warmup_num_steps"] - 1, 0) :]
        assert all(later <= earlier + 1e-15 for earlier, later in itertools.pairwise(after))

    @holds_for
    @given(sections(), st.integers(0, 500))
    def test_steps_beyond_the_end_stay_at_the_last(self, section: dict[str, Any], extra: int) -> None:
        """A scheduler is stepped once more after the last optimizer step."""
        config = schedule_config(section)
        assert learning_rate_factor(section["total_num_steps"] + extra, config) == curve(**section)[-1]


@pytest.mark.promise("schedule-shapes", "schedule-cool-down")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MAIN)
def test_a_cool_down_goes_from_the_curve_to_the_floor_along_its_shape(name: str, shape: str) -> None:
    """Of 40 steps the last 10 are cooling."""
    section = {"total_num_steps": 40, "warmup_num_steps": 4}
    without, factors = curve(name=name, **section), curve(name=name, cooldown_num_steps=10, cooldown_shape=shape, **section)
    remaining = {
        "linear": lambda p: 1 - p,
        "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
        "1-sqrt": lambda p: 1 - p**0.5,
    }[shape]
    assert factors[:30] == without[:30]
    assert factors[30:] == pytest.approx([without[29] * remaining((step + 1) / 10) for step in range(10)], abs=1e-12)


@pytest.mark.promise("schedule-shapes")
def test_wsd_holds_and_then_falls() -> None:
    factors = curve(name="wsd", warmup_num_steps=2, total_num_steps=10, cooldown_ratio=0.4)
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


@pytest.mark.promise("schedule-recipe")
def test_the_autoresearch_baseline() -> None:
    """It has no warm-up, and the last half of the run falls linearly to zero."""
    factors = curve(name="wsd", total_num_steps=100, cooldown_ratio=0.5)
    assert set(factors[:50]) == {1.0}
    assert factors[50:] == pytest.approx([1 - (step + 1) / 50 for step in range(50)])


@pytest.mark.promise("schedule-recipe", "schedule-shapes")
@pytest.mark.parametrize(
    ("part", "ratio", "steps"),
    [
        *(("warmup", ratio, steps) for ratio, steps in ((0.1, 5), (0.5, 25), (0.01, 0))),
        *(("cooldown", ratio, steps) for ratio, steps in ((0.1, 5), (0.5, 25), (0.01, 1))),
    ],
)
def test_a_ratio_is_a_number_of_steps(part: str, ratio: float, steps: int) -> None:
    """On a flat curve: a linear one is the same line with a linear cool-down and without. A cool-down has a step at least."""
    section = {"name": "constant", "total_num_steps": 50}
    assert curve(**section, **{f"{part}_ratio": ratio}) == curve(**section, **{f"{part}_num_steps": steps})


@pytest.mark.parametrize("part", ["warmup", "cooldown"])
def test_a_number_and_a_ratio_are_an_error(part: str) -> None:
    section = {"name": "linear", "total_num_steps": 50, f"{part}_num_steps": 3, f"{part}_ratio": 0.1}
    with pytest.raises(ConfigError, match=rf"^scheduler\.params\.{part}_ratio: got both {part}_num_steps and {part}_ratio"):
        schedule_config(section)


@pytest.mark.parametrize("total", range(1, 12))
def test_two_halves_are_a_whole(total: int) -> None:
    """Both round up where the total is odd."""
    factors = curve(name="wsd", total_num_steps=total, warmup_ratio=0.5, cooldown_ratio=0.5)
    assert factors[-1] == 0.0 or total == 1


@pytest.mark.parametrize("total", [1, 5, 20])
def test_a_cool_down_that_rounds_to_no_step_is_harmless(total: int) -> None:
    """A schedule is stepped after every optimizer step, the last one included."""
    optimizer = build_optimizer(nn.Linear(4, 4), {"name": "adamw", "lr": 1e-3})
    scheduler = build_scheduler(optimizer, {"name": "wsd", "cooldown_ratio": 0.01, "total_num_steps": total})
    for _ in range(total + 2):
        optimizer.step()
        scheduler.step()
    assert 0 <= optimizer.param_groups[0]["lr"] <= 1e-3


@pytest.mark.promise("schedule-epochs")
@pytest.mark.parametrize("epochs", [1, 3])
def test_total_steps_from_epochs_and_loader(epochs: int) -> None:
    """The caller multiplies; a last, smaller batch is a step too."""
    loader = DataLoader(TensorDataset(torch.zeros(50, 4)), batch_size=8)
    model = nn.Linear(4, 4)
    optimizer = build_optimizer(model, {"name": "muon", "adamw": {"lr": 1e-3}})
    scheduler = build_scheduler(optimizer, {"name": "linear", "final_lr_fraction": 0.1}, total_steps=epochs * len(loader))
    rates = []
    for _ in range(epochs):
        for (inputs,) in loader:
            optimizer.zero_grad()
            model(inputs).sum().backward()
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    assert len(rates) == 7 * epochs
    assert rates[-1] == pytest.approx(0.1 * rates[0], rel=1e-12)
    assert min(rates[:-1]) > rates[-1]


FALLING: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear"},
    "cosine": {"name": "cosine"},
    "rex": {"name": "rex"},
    "wsd": {"name": "wsd", "cooldown_ratio": 0.2},
    "constant, cooling down": {"name": "constant", "cooldown_num_steps": 3},
}


@pytest.mark.promise("schedule-free-schedule")
@pytest.mark.parametrize("by_role", [False, True], ids=["main", "by role"])
@pytest.mark.parametrize("section", FALLING)
def test_schedule_free_refuses_a_falling_schedule(section: str, by_role: bool) -> None:
    model = nn.ModuleDict({"table": nn.Embedding(50, 24), "layer": nn.Linear(24, 24)})
    config: dict[str, Any] = {"name": "schedule_free_adamw"}
    if by_role:
        config = {"name": "muon", "adamw": {"lr": 1e-3}, "roles": {"embedding": config}}
    optimizer = build_optimizer(model, config)
    with pytest.raises(
        ConfigError, match=r"^scheduler\.params\.name: got a falling .* schedule_free_adamw.* 'none' or 'constant'"
    ):
        build_scheduler(optimizer, {**FALLING[section], "total_num_steps": 10})


@pytest.mark.promise("schedule-free-schedule")
@pytest.mark.parametrize("section", [{"name": "none"}, {"name": "constant"}, {"name": "constant", "warmup_num_steps": 3}])
def test_schedule_free_accepts_what_does_not_fall(section: dict[str, Any]) -> None:
    optimizer = build_optimizer(nn.Linear(24, 24), {"name": "schedule_free_adamw"})
    build_scheduler(optimizer, section)
