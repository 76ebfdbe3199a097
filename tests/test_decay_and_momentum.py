"""Weight decay, plain and cautious, its schedules, and the momentum's warm-up."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_optforge import ConfigError, OptForge, OptForgeSchedule, build_optimizer, build_scheduler
from ds_optforge.optimizer import groups_of
from ds_optforge.rules import DecaySettings, rule_names
from ds_optforge.testing.params import settings_of, usual
from tests.layers import linears, matrix, set_gradients
from tests.oracles import EXACT

F64 = torch.float64
LR, DECAY, STEPS = 0.02, 0.5, 10
RULES = [name for name in rule_names() if issubclass(settings_of(name), DecaySettings)]
# Those whose momentum is beside the weight, and fades in steps without a gradient: an owner's rests.
BESIDE = [name for name in rule_names() if any(buffer.momentum for buffer in settings_of(name).builds.buffers)]
WARMING_UP = [name for name in BESIDE if "momentum_warmup" in settings_of(name).model_fields]


def params_of(rule: str) -> dict[str, Any]:
    """Without any bfloat16, and without decay."""
    return {**usual(rule), "weight_decay": 0.0}


def trajectory(rule: str, **settings: Any) -> list[Tensor]:
    """The weight before and after each step, given the same gradients whatever it is."""
    model = linears(0.3 * matrix(24, 40))
    optimizer = build_optimizer(model, {**params_of(rule), "lr": LR, **settings})
    seen = [model[0].weight.detach().clone()]
    for step in range(STEPS):
        set_gradients(model.parameters(), step)
        optimizer.step()
        seen.append(model[0].weight.detach().clone())
    return seen


def updates(rule: str) -> list[Tensor]:
    """lr x update of each step: no rule's update depends on the weight, so an undecayed run has them all."""
    seen = trajectory(rule, weight_decay=0.0)
    return [before - after for before, after in itertools.pairwise(seen)]


@pytest.mark.promise("cautious-decay")
@pytest.mark.parametrize("rule", RULES)
def test_cautious_decay_is_where_update_and_weight_have_the_same_sign(rule: str) -> None:
    """The step is W <- W - lr wd W 1[update W >= 0] - lr update. 2e-6: float32 in another order."""
    weight = trajectory(rule)[0]
    masked = 0
    for update in updates(rule):
        mask = update * weight >= 0
        masked += int(mask.sum())
        weight = weight - LR * DECAY * weight * mask - update
    assert 0.2 < masked / (STEPS * weight.numel()) < 0.8  # neither everywhere nor nowhere
    found = trajectory(rule, weight_decay=DECAY, cautious_weight_decay=True)[-1]
    torch.testing.assert_close(found, weight, rtol=0, atol=2e-6)


@pytest.mark.promise("cautious-decay")
@pytest.mark.parametrize("rule", ["adamw", "lion", "muon"])
def test_cautious_decay_is_also_where_the_update_is_exactly_zero(rule: str) -> None:
    """The first row has no gradient, and so no update: it only decays. 2e-6: float32 in another order."""
    model = linears(0.3 * matrix(24, 40))
    optimizer = build_optimizer(model, {**params_of(rule), "lr": LR, "weight_decay": DECAY, "cautious_weight_decay": True})
    for step in range(STEPS):
        set_gradients(model.parameters(), step)
        model[0].weight.grad[0] = 0.0
        optimizer.step()
    expected = 0.3 * matrix(24, 40)[0] * (1 - LR * DECAY) ** STEPS
    torch.testing.assert_close(model[0].weight.detach()[0], expected, rtol=0, atol=2e-6)


@pytest.mark.promise("cautious-decay")
@pytest.mark.parametrize("rule", RULES)
def test_decay_is_plain_when_that_is_off(rule: str) -> None:
    """The step is W <- (1 - lr wd) W - lr update. 2e-6: float32 in another order."""
    weight = trajectory(rule)[0]
    for update in updates(rule):
        weight = (1 - LR * DECAY) * weight - update
    found = trajectory(rule, weight_decay=DECAY)[-1]
    torch.testing.assert_close(found, weight, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rule", RULES)
def test_cautious_without_decay_is_nothing(rule: str) -> None:
    assert torch.equal(trajectory(rule, cautious_weight_decay=True)[-1], trajectory(rule)[-1])


def cautious_groups(config: dict[str, Any]) -> dict[str, bool]:
    """Whether each role's decay is cautious."""
    model = nn.ModuleDict({"table": nn.Embedding(50, 24), "layer": nn.Linear(24, 24), "lm_head": nn.Linear(24, 50, bias=False)})
    optimizer = build_optimizer(model, config)
    settings = {group["optforge_group"]: groups_of(optimizer)[group].settings for group in optimizer.param_groups}
    return {name.split(".")[0]: getattr(chosen, "cautious_weight_decay", False) for name, chosen in settings.items()}


@pytest.mark.promise("cautious-matrices")
@pytest.mark.parametrize(
    "config",
    [
        {"name": "muon", "cautious_weight_decay": True},
        {"name": "normuon", "cautious_weight_decay": True, "adamw": {"lr": 1e-3, "weight_decay": 0.1}},
        {"name": "adamw", "roles": {"matrix": {"cautious_weight_decay": True}}},
    ],
    ids=["muon", "normuon", "adamw by role"],
)
def test_on_matrices_only(config: dict[str, Any]) -> None:
    """What a matrix rule is asked for does not spill over to AdamW's parameters."""
    assert cautious_groups(config) == {"embedding": False, "matrix": True, "scalar": False, "unembedding": False}


@pytest.mark.promise("cautious-matrices")
def test_on_tables_too_where_it_is_asked_for() -> None:
    found = cautious_groups({"name": "muon", "cautious_weight_decay": True, "adamw": {"cautious_weight_decay": True}})
    assert found["embedding"]
    assert found["matrix"]


SCHEDULES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}


@pytest.mark.promise("decay-schedule")
@pytest.mark.parametrize("curve", ["constant", "linear"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_decay_follows_its_schedule_beside_the_learning_rates(schedule: str, curve: str) -> None:
    """With zero gradients AdamW only decays, by lr wd of that very step. 1e-12: float64."""
    model = linears(torch.ones(4, 4, dtype=F64))
    config = {"name": "adamw", "lr": 0.1, "weight_decay": DECAY, "weight_decay_schedule": schedule}
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, {"name": curve, "total_num_steps": 8})
    expected = 1.0
    for step in range(8):
        rate = 0.1 * (1 if curve == "constant" else 1 - step / 7)
        expected *= 1 - rate * DECAY * SCHEDULES[schedule](step / 8)
        model[0].weight.grad = torch.zeros(4, 4, dtype=F64)
        optimizer.step()
        scheduler.step()
        torch.testing.assert_close(model[0].weight.detach(), torch.full((4, 4), expected, dtype=F64), rtol=0, atol=1e-12)


def decays(optimizer: OptForge) -> dict[str, float]:
    return {group["optforge_group"].split(".")[0]: group["weight_decay"] for group in optimizer.param_groups}


@pytest.mark.promise("decay-schedule")
def test_every_role_decays_from_its_own_value() -> None:
    """A scalar has none to begin with."""
    model = nn.ModuleDict({"table": nn.Embedding(50, 24), "layer": nn.Linear(24, 24)})
    adamw = {"lr": 1e-3, "weight_decay": 0.1}
    optimizer = build_optimizer(model, {"name": "muon", "weight_decay": 0.2, "weight_decay_schedule": "linear", "adamw": adamw})
    scheduler = build_scheduler(optimizer, {"name": "constant", "total_num_steps": 4})
    seen = []
    for _ in range(4):
        seen.append(decays(optimizer))
        optimizer.step()
        scheduler.step()
    assert [values["matrix"] for values in seen] == pytest.approx([0.2, 0.15, 0.1, 0.05])
    assert [values["embedding"] for values in seen] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert [values["scalar"] for values in seen] == [0.0] * 4


@pytest.mark.promise("decay-schedule")
def test_only_the_groups_that_ask_for_it_follow_a_schedule() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(50, 24), "layer": nn.Linear(24, 24, bias=False)})
    roles = {"matrix": {"weight_decay_schedule": "cosine"}}
    optimizer = build_optimizer(model, {"name": "adamw", "weight_decay": 0.2, "roles": roles})
    scheduler = build_scheduler(optimizer, {"name": "constant", "total_num_steps": 4})
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert decays(optimizer) == pytest.approx({"embedding": 0.2, "matrix": 0.1})


DECAYING = {"name": "adamw", "weight_decay": 0.2, "weight_decay_schedule": "linear"}
TEN_STEPS = {"name": "linear", "total_num_steps": 10}


def after_three_steps() -> tuple[OptForge, OptForgeSchedule]:
    optimizer = build_optimizer(linears(matrix(4, 4)), DECAYING)
    schedule = build_scheduler(optimizer, TEN_STEPS)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    return optimizer, schedule


@pytest.mark.promise("decay-schedule")
def test_a_resumed_run_goes_on_with_the_decay_of_its_step() -> None:
    first, schedule = after_three_steps()
    second = build_optimizer(linears(matrix(4, 4)), DECAYING)
    resumed = build_scheduler(second, TEN_STEPS)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    for optimizer, scheduler in ((first, schedule), (second, resumed)):
        optimizer.step()
        scheduler.step()
    assert decays(second) == decays(first) == pytest.approx({"matrix": 0.2 * 0.6})


@pytest.mark.promise("decay-schedule")
@pytest.mark.parametrize("scheduler_first", [True, False])
def test_a_run_that_resumes_with_another_decay_goes_on_from_the_checkpoints(scheduler_first: bool) -> None:
    """As with every hyperparameter of a group. After four of ten steps 0.6 of 0.2 is left, whatever is built first."""
    first, schedule = after_three_steps()
    second = build_optimizer(linears(matrix(4, 4)), {**DECAYING, "weight_decay": 0.4})
    resumed = build_scheduler(second, TEN_STEPS) if scheduler_first else None
    second.load_state_dict(first.state_dict())
    resumed = resumed or build_scheduler(second, TEN_STEPS)
    resumed.load_state_dict(schedule.state_dict())
    assert decays(second) == pytest.approx({"matrix": 0.2 * 0.7})
    second.step()
    resumed.step()
    assert decays(second) == pytest.approx({"matrix": 0.2 * 0.6})


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_decay_schedule_without_a_scheduler_is_an_error(schedule: str) -> None:
    model = linears(matrix(4, 4))
    optimizer = build_optimizer(model, {"name": "adamw", "weight_decay": 0.1, "weight_decay_schedule": schedule})
    set_gradients(model.parameters(), 0)
    message = rf"weight_decay_schedule: got '{schedule}' without its scheduler; allowed: 'constant', or .*OptForgeSchedule"
    with pytest.raises(ConfigError, match=message):
        optimizer.step()
    assert torch.equal(model[0].weight, matrix(4, 4))


def test_torchs_schedulers_do_not_know_it() -> None:
    model = linears(matrix(4, 4))
    optimizer = build_optimizer(model, {"name": "adamw", "weight_decay": 0.1, "weight_decay_schedule": "linear"})
    torch.optim.lr_scheduler.LinearLR(optimizer)
    with pytest.raises(ConfigError, match=r"weight_decay_schedule: got 'linear' without its scheduler"):
        optimizer.step()


def test_a_decay_schedule_needs_the_total_number_of_steps() -> None:
    optimizer = build_optimizer(linears(matrix(4, 4)), {"name": "adamw", "weight_decay_schedule": "linear"})
    with pytest.raises(
        ConfigError, match=r"^scheduler\.params\.total_num_steps: missing; weight_decay_schedule 'linear' needs"
    ):
        build_scheduler(optimizer, {"name": "constant"})


def momenta(config: dict[str, Any], steps: int) -> list[float]:
    """The momentum of each step, read off the buffer: a gradient of 1, then zeros, so that it only fades.

    The weight's rows are at right angles to the gradient's: muown averages that part of it.
    """
    model = linears(torch.tensor([1.0, -1.0, 1.0, -1.0]).repeat(4, 1))
    optimizer = build_optimizer(model, {"lr": LR, **EXACT, **config})
    model[0].weight.grad = torch.ones(4, 4)
    optimizer.step()
    buffer = optimizer.state[model[0].weight]["momentum_buffer"]
    values, before = [1 - buffer[0, 0].item()], buffer[0, 0].item()
    for _ in range(steps - 1):
        model[0].weight.grad.zero_()
        optimizer.step()
        values.append(buffer[0, 0].item() / before)
        before = buffer[0, 0].item()
    return values


@pytest.mark.parametrize("rule", WARMING_UP)
def test_momentum_rises_linearly_and_stays(rule: str) -> None:
    """From 0.5 in the first step to 0.9 after four."""
    found = momenta({"name": rule, "momentum": 0.9, "momentum_warmup": {"from": 0.5, "steps": 4}}, steps=7)
    assert found == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9])


def test_the_recipes_warm_up_is_the_default() -> None:
    """0.85 to 0.95 over 300 steps."""
    found = momenta({"name": "muon", "momentum_warmup": {}}, steps=303)
    assert [found[0], found[150], found[300], found[302]] == pytest.approx([0.85, 0.9, 0.95, 0.95])


@pytest.mark.promise("muon-defaults")
def test_without_a_warm_up_the_momentum_is_constant() -> None:
    assert momenta({"name": "muon"}, steps=3) == pytest.approx([0.95] * 3)


def test_the_warm_up_goes_on_after_a_load() -> None:
    config = {"name": "muon", "momentum_warmup": {"from": 0.5, "steps": 8}, **EXACT}
    buffers = []
    for interrupted in (False, True):
        model = linears(matrix(8, 12))
        optimizer = build_optimizer(model, config)
        for step in range(6):
            if interrupted and step == 3:
                saved = optimizer.state_dict()
                optimizer = build_optimizer(model, config)
                optimizer.load_state_dict(saved)
            set_gradients(model.parameters(), step)
            optimizer.step()
        buffers.append(optimizer.state[model[0].weight]["momentum_buffer"])
    assert torch.equal(*buffers)
