"""AdaMuon against Algorithm 1 of Si, Zhang & Shen 2025 (arXiv 2507.11005), and with the authors' Nesterov momentum."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_optforge import ConfigError, build_optimizer
from ds_optforge.step.health import PATIENCE
from tests.layers import bytes_per_parameter, linears, matrix, set_gradients, stepped_as_stored_in_out
from tests.oracles import EXACT, newton_schulz, relative_error

ADAMUON = {"name": "adamuon", "lr": 0.02, **EXACT}
SHAPES = [(40, 40), (24, 96), (96, 24), (33, 7)]


class Formula:
    """One (out, in) weight in float64. ``sum`` is the paper's first moment, which is no average."""

    def __init__(
        self,
        weight: Tensor,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        eps: float = 1e-8,
        rms: float = 0.2,
    ) -> None:
        self.weight = weight.detach().double()
        self.sum, self.second = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.lr, self.momentum, self.weight_decay, self.nesterov = lr, momentum, weight_decay, nesterov
        self.eps, self.rms = eps, rms

    def step(self, gradient: Tensor) -> None:
        gradient = gradient.double()
        self.sum = self.momentum * self.sum + gradient
        direction = gradient + self.momentum * self.sum if self.nesterov else self.sum
        orthogonal = newton_schulz(direction.sign())
        self.second = self.momentum * self.second + (1 - self.momentum) * orthogonal**2
        quotient = orthogonal / (self.second**0.5 + self.eps)
        aligned = self.rms * quotient.numel() ** 0.5 / quotient.norm()
        self.weight = self.weight - self.lr * (aligned * quotient + self.weight_decay * self.weight)


@pytest.mark.promise("choose-by-name", "muon-family-formulas")
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(("nesterov", "eps", "rms"), [(True, 1e-8, 0.2), (False, 0.1, 0.5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_ten_steps_follow_the_formula(shape: tuple[int, int], nesterov: bool, eps: float, rms: float, decay: float) -> None:
    """1e-5: float32."""
    settings = {"momentum": 0.9, "eps": eps, "weight_decay": decay, "nesterov": nesterov}
    weight = 0.1 * matrix(*shape)
    model, reference = linears(weight), Formula(weight, lr=0.02, rms=rms, **settings)
    orthogonalization = {**EXACT["orthogonalization"], "rms": rms}
    optimizer = build_optimizer(model, {**ADAMUON, **settings, "orthogonalization": orthogonalization})
    for step in range(10):
        set_gradients(model.parameters(), step)
        reference.step(model[0].weight.grad)
        optimizer.step()
    assert relative_error(model[0].weight, reference.weight) < 1e-5
    assert relative_error(optimizer.state[model[0].weight]["second_moment"], reference.second) < 1e-5


@pytest.mark.parametrize(("out", "into"), [(24, 40), (40, 24), (8, 8)])
def test_a_weight_stored_in_out_is_stepped_as_its_transpose(out: int, into: int) -> None:
    """1e-5: float32, in the other order of products."""
    reference = Formula(matrix(out, into), lr=0.02, weight_decay=0.3)
    weight = stepped_as_stored_in_out(reference, {**ADAMUON, "weight_decay": 0.3}, out, into)
    assert relative_error(weight, reference.weight) < 1e-5


def test_each_matrix_of_a_bank_has_a_size_of_its_own() -> None:
    """1e-5: float32."""
    bank = nn.ParameterList([matrix(3, 6, 10)])
    references = [Formula(one, lr=0.02) for one in bank[0]]
    optimizer = build_optimizer(bank, ADAMUON)
    for step in range(5):
        set_gradients(bank.parameters(), step)
        for reference, gradient in zip(references, bank[0].grad, strict=True):
            reference.step(gradient)
        optimizer.step()
    assert relative_error(bank[0], torch.stack([reference.weight for reference in references])) < 1e-5


def test_telemetry_has_the_size_of_the_update_and_its_learning_rate() -> None:
    """Two shapes: every element moves by 0.2 lr, root mean square; the scale of an orthogonal matrix is 0.2 sqrt(max)."""
    model = linears(matrix(24, 96), matrix(16, 64))
    optimizer = build_optimizer(model, {**ADAMUON, "telemetry": {"every": 1}})
    set_gradients(model.parameters(), 0)
    optimizer.step()
    numbers = optimizer.telemetry["groups"]["matrix.adamuon"]
    assert numbers["update_rms"] == pytest.approx(0.02 * 0.2, rel=1e-3)
    assert numbers["effective_lr"] == pytest.approx(0.02 * 0.2 * (96**0.5 + 64**0.5) / 2)


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (32, 32)])
def test_no_number_of_ordinary_gradients_is_unhealthy(shape: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    """In one record more than a warning needs."""
    model = linears(matrix(*shape))
    optimizer = build_optimizer(model, {"name": "adamuon", "lr": 0.02, "weight_decay": 1.0, "telemetry": {"every": 1}})
    with caplog.at_level(logging.WARNING, logger="ds_optforge"):
        for step in range(PATIENCE + 1):
            set_gradients(model.parameters(), step)
            optimizer.step()
    assert caplog.records == []


def test_an_idle_matrix_keeps_its_weight_and_its_second_moment() -> None:
    model = linears(matrix(8, 12), matrix(8, 12, seed=1))
    optimizer = build_optimizer(model, {**ADAMUON, "weight_decay": 0.3})
    set_gradients(model.parameters(), 0)
    optimizer.step()
    kept = [(layer.weight.detach().clone(), optimizer.state[layer.weight]["second_moment"].clone()) for layer in model]
    set_gradients(model.parameters(), 1)
    model[0].weight.grad.zero_()
    optimizer.step()
    same = [
        (torch.equal(layer.weight, weight), torch.equal(optimizer.state[layer.weight]["second_moment"], second))
        for layer, (weight, second) in zip(model, kept, strict=True)
    ]
    assert same == [(True, True), (False, False)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"orthogonalization": {"scale": "shape"}}, r"orthogonalization\.scale: got 'shape'.*match_rms_adamw"),
        ({"sharding": {"mode": "shard_local"}}, r"shard_local"),
        ({"normalize": {"by": "rows", "when": "after"}}, r"'adamuon' does not read it"),
    ],
)
def test_what_has_no_meaning_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(linears(matrix(8, 8)), {"name": "adamuon", **settings})


@pytest.mark.promise("state-buffers", "8bit-size")
@pytest.mark.parametrize(("state_dtype", "nbytes"), [("float32", 8.0), ("bfloat16", 4.0), ("8bit", 2.031)])
def test_bytes_of_state_per_parameter(state_dtype: str, nbytes: float) -> None:
    """Two buffers. 0.001: the step counters."""
    if state_dtype == "8bit":
        pytest.importorskip("bitsandbytes")
    assert bytes_per_parameter({"name": "adamuon", "state_dtype": state_dtype}) == pytest.approx(nbytes, abs=1e-3)
