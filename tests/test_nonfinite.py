"""In plain PyTorch a gradient that is not finite reaches neither weight nor buffer. (Under ZeRO DeepSpeed skips the step.)

Each rule alone is in test_conformance.py; here is what has several groups.
"""

import copy
from typing import Any

import pytest
import torch

from ds_optforge import OptForge, build_optimizer
from tests import models
from tests.layers import set_gradients, snapshot

RULES: dict[str, dict[str, Any]] = {
    "muon": {"name": "muon", "weight_decay": 0.1, "adamw": {"lr": 1e-3}},
    "a mix": {
        "name": "muon",
        "adamw": {"lr": 1e-3},
        "roles": {"embedding": {"name": "schedule_free_adamw", "warmup_steps": 5}},
    },
}
VALUES = [float("nan"), float("inf"), float("-inf")]


def prepared(rule: str, steps: int) -> tuple[models.AwkwardNet, OptForge]:
    model = models.build(depth=1, width=96)  # some matrices are large enough for 8-bit state
    optimizer = build_optimizer(model, RULES[rule])
    for step in range(steps):
        set_gradients(model.parameters(), step)
        optimizer.step()
    return model, optimizer


def state_of(optimizer: OptForge) -> dict[tuple[int, str], Any]:
    """Every number in the optimizer's state."""
    states = optimizer.state_dict()["state"]
    return {(index, key): copy.deepcopy(value) for index, state in states.items() for key, value in state.items()}


def refuse(model: models.AwkwardNet, optimizer: OptForge, name: str, value: float) -> None:
    """A step with one bad element in the named parameter's gradient must change nothing."""
    set_gradients(model.parameters(), 99)
    model.get_parameter(name).grad.view(-1)[-1] = value
    weights, state, groups = snapshot(model), state_of(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(RuntimeError, match=rf"^{name}: its gradient is not finite; nothing was changed"):
        optimizer.step()
    assert [key for key, weight in weights.items() if not torch.equal(model.get_parameter(key), weight)] == []
    after = state_of(optimizer)
    assert after.keys() == state.keys()
    for key, found in state.items():
        assert torch.equal(after[key], found) if isinstance(found, torch.Tensor) else after[key] == found, key
    assert optimizer.state_dict()["param_groups"] == groups


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("rule", RULES)
def test_it_changes_nothing_and_names_the_parameter(rule: str, value: float) -> None:
    model, optimizer = prepared(rule, steps=2)
    refuse(model, optimizer, "odd.weight", value)


@pytest.mark.parametrize("name", ["embed.weight", "up.weight", "up.bias", "down.weight", "norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("rule", RULES)
def test_every_group_is_checked_before_any_is_stepped(rule: str, name: str) -> None:
    """Wherever the bad gradient is: groups come in the order of their first parameter."""
    model, optimizer = prepared(rule, steps=1)
    assert len(optimizer.param_groups) > 2
    refuse(model, optimizer, name, float("nan"))


@pytest.mark.parametrize("rule", RULES)
def test_in_the_very_first_step(rule: str) -> None:
    model, optimizer = prepared(rule, steps=0)
    refuse(model, optimizer, "odd.weight", float("nan"))


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("rule", RULES)
def test_a_run_that_skips_the_batch_goes_on_as_if_it_had_not_been(rule: str, steps: int) -> None:
    straight, optimizer = prepared(rule, steps)
    interrupted, other = prepared(rule, steps)
    refuse(interrupted, other, "odd.weight", float("inf"))
    for model, each in ((straight, optimizer), (interrupted, other)):
        set_gradients(model.parameters(), steps)
        each.step()
    for key, weight in snapshot(straight).items():
        assert torch.equal(interrupted.get_parameter(key), weight), key


def test_a_huge_gradient_is_finite() -> None:
    """Its square is not: the check must not mistake it."""
    model, optimizer = prepared("muon", steps=1)
    set_gradients(model.parameters(), 5)
    for parameter in model.parameters():
        parameter.grad.mul_(1e20)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype: torch.dtype) -> None:
    model = models.build().to(dtype)
    optimizer = build_optimizer(model, RULES["muon"])
    refuse(model, optimizer, "odd.weight", float("inf"))
