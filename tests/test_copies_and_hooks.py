"""Copies and pickles of an optimizer in plain PyTorch, and torch's hooks around its state dicts."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ds_optforge import ConfigError, OptForge, build_optimizer
from ds_optforge.rules import rule_names
from ds_optforge.testing.params import usual
from tests.layers import linears, matrix, set_gradients

Pair = tuple[nn.Module, OptForge]


def pickled(pair: Pair) -> Pair:
    found: Pair = pickle.loads(pickle.dumps(pair))
    return found


def stepped(pair: Pair, first: int, last: int) -> list[torch.Tensor]:
    model, optimizer = pair
    for step in range(first, last):
        set_gradients(model.parameters(), step)
        optimizer.step()
    return list(model.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("rule", rule_names())
def test_a_copy_of_model_and_optimizer_goes_on_as_the_original(rule: str, steps: int, copied: Callable[[Pair], Pair]) -> None:
    model = linears(matrix(16, 24), matrix(24, 16))
    original = model, build_optimizer(model, usual(rule))
    stepped(original, 0, steps)
    other = copied(original)
    assert str(other[1].state_dict()) == str(original[1].state_dict())
    before = [weight.clone() for weight in other[0].parameters()]
    expected = stepped(original, steps, steps + 2)
    assert all(map(torch.equal, other[0].parameters(), before))  # nothing is held in common
    assert all(map(torch.equal, stepped(other, steps, steps + 2), expected))


def test_a_copy_with_averaged_weights_in_the_model_is_refused() -> None:
    model = linears(matrix(16, 24))
    optimizer = build_optimizer(model, {"name": "schedule_free_adamw"})
    stepped((model, optimizer), 0, 1)
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"a copy on averaged weights; leave evaluation_weights"):
        copy.deepcopy(optimizer)


class TestHooks:
    """As torch documents them: before the checks of the state dict that we make, and after everything that we do to it."""

    @staticmethod
    def optimizer() -> OptForge:
        model = linears(matrix(16, 24))
        optimizer = build_optimizer(model, {"name": "muon"})
        stepped((model, optimizer), 0, 1)
        return optimizer

    def test_a_load_pre_hook_may_repair_what_would_be_refused(self) -> None:
        saved = self.optimizer().state_dict()
        saved["param_groups"][0]["optforge_group"] = "an old name"
        chosen = self.optimizer()
        with pytest.raises(ConfigError, match="an old name"):
            chosen.load_state_dict(saved)

        def repair(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            groups = [{**group, "optforge_group": "matrix.muon"} for group in state_dict["param_groups"]]
            return {**state_dict, "param_groups": groups}

        chosen.register_load_state_dict_pre_hook(repair)
        chosen.load_state_dict(saved)

    def test_a_load_post_hook_sees_the_state_as_it_stays(self) -> None:
        model = linears(matrix(64, 80).bfloat16())
        config = {"name": "muon", "state_dtype": "8bit"}
        chosen = build_optimizer(model, config)
        stepped((model, chosen), 0, 1)
        seen = []
        chosen.register_load_state_dict_post_hook(
            lambda optimizer: seen.append(optimizer.state[model[0].weight]["momentum_buffer"].dtype)
        )
        chosen.load_state_dict(chosen.state_dict())
        assert seen == [torch.uint8]

    def test_state_dict_hooks(self) -> None:
        chosen, order = self.optimizer(), []
        chosen.register_state_dict_pre_hook(lambda optimizer: order.append("before"))

        def after(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            order.append("after" if "optforge" in state_dict else "too early")
            return {**state_dict, "note": 1}

        chosen.register_state_dict_post_hook(after)
        assert chosen.state_dict()["note"] == 1
        assert order == ["before", "after"]
