"""SGD: torch.optim.SGD is the oracle, bit for bit."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_optforge import ConfigError, build_optimizer
from tests.layers import linears, matrix, set_gradients
from tests.oracles import relative_error

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"momentum": 0.0},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "decay": {"momentum": 0.0, "weight_decay": 0.3},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 0.3},
    "dampening and decay": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.3},
    "nesterov and decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.3},
}


def two_layers(dtype: torch.dtype) -> nn.Sequential:
    return linears(matrix(24, 96, dtype=dtype), matrix(33, 7, seed=1, dtype=dtype))


def buffers(optimizer: torch.optim.Optimizer) -> list[Tensor | None]:
    return [state.get("momentum_buffer") for state in optimizer.state.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", SETTINGS)
def test_twenty_steps_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    """Bit for bit; the rate changes on the way, as under a schedule."""
    given = SETTINGS[name]
    model, reference = two_layers(dtype), two_layers(dtype)
    optimizer = build_optimizer(model, {"name": "sgd", "lr": 0.1, **given})
    oracle = torch.optim.SGD(reference.parameters(), lr=0.1, **given)
    for step in range(20):
        for layers, stepped in ((model, optimizer), (reference, oracle)):
            set_gradients(layers.parameters(), step)
            for group in stepped.param_groups:
                group["lr"] = 0.1 if step < 10 else 0.025
            stepped.step()
        for own, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(own, theirs), (step, relative_error(own, theirs))
    if given["momentum"]:
        for own_buffer, their_buffer in zip(buffers(optimizer), buffers(oracle), strict=True):
            assert own_buffer is not None
            assert their_buffer is not None
            assert torch.equal(own_buffer, their_buffer)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_changes_the_run(name: str) -> None:
    """Else the test above would not show that it is read."""

    def run(given: dict[str, Any]) -> Tensor:
        model = linears(matrix(8, 12))
        optimizer = build_optimizer(model, {"name": "sgd", "lr": 0.1, **given})
        for step in range(3):
            set_gradients(model.parameters(), step)
            optimizer.step()
        return model[0].weight.detach()

    others = [run(given) for other, given in SETTINGS.items() if other != name]
    assert all(relative_error(run(SETTINGS[name]), other) > 1e-3 for other in others)


def test_two_steps_by_hand() -> None:
    """m = 4, then 0.5 * 4 + 0.75 * 2 = 3.5; W = 1 - 0.5 * 4 = -1, then -1 - 0.5 * 3.5 = -2.75. All exact in binary."""
    model = linears(torch.ones(1, 1))
    optimizer = build_optimizer(model, {"name": "sgd", "lr": 0.5, "momentum": 0.5, "dampening": 0.25})
    found = []
    for gradient in (4.0, 2.0):
        model[0].weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        found.append(model[0].weight.item())
    assert found == [-1.0, -2.75]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"momentum": 0.0, "dampening": 0.3}, "dampening: got 0.3 without momentum; allowed: 0, or a momentum above 0"),
        ({"momentum": 0.9, "dampening": 0.3, "nesterov": True}, "nesterov: got true with dampening, or without momentum"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov: got true with dampening, or without momentum"),
        ({"momentum": 1.0}, "optimizer.params.momentum: got 1.0 (float); allowed: less than 1"),
        ({"dampening": 1.0}, "optimizer.params.dampening: got 1.0 (float); allowed: less than 1"),
        ({"lr": -0.1}, "optimizer.params.lr: got -0.1 (float); allowed: greater than or equal to 0"),
        ({"betas": [0.9, 0.99]}, "optimizer.params.betas: 'sgd' does not read it"),
        ({"cautious_weight_decay": True}, "optimizer.params.cautious_weight_decay: 'sgd' does not read it"),
        ({"momentum": 0.999, "state_dtype": "bfloat16"}, "state_dtype: got 'bfloat16' with a moving average of decay rate"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_optimizer(linears(matrix(4, 4)), {"name": "sgd", **given})


@pytest.mark.parametrize(
    ("state_dtype", "expected"), [("float32", 4.0), ("bfloat16", 2.0), ("8bit", 1.0 + 4.0 / 256.0)], ids=str
)
def test_bytes_of_state_per_parameter(state_dtype: str, expected: float) -> None:
    """One buffer; 8-bit state has a float32 scale per 256 elements. 0.01: the counter of steps."""
    if state_dtype == "8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = linears(matrix(64, 256))
    optimizer = build_optimizer(model, {"name": "sgd", "state_dtype": state_dtype})
    set_gradients(model.parameters(), 0)
    optimizer.step()
    (state,) = optimizer.state.values()
    found = sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, Tensor))
    assert found / (64 * 256) == pytest.approx(expected, abs=0.01)


def test_gradients_stay_unchanged() -> None:
    """With all that makes a direction of them."""
    model = linears(matrix(4, 6))
    optimizer = build_optimizer(model, {"name": "sgd", "weight_decay": 0.3, "nesterov": True})
    set_gradients(model.parameters(), 0)
    before = model[0].weight.grad.clone()
    optimizer.step()
    assert torch.equal(model[0].weight.grad, before)
