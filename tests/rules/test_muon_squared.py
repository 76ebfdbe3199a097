"""Muon² against its formula (arXiv 2604.09967; modded-nanogpt, records/track_3_optimization/results/20260501_muonsq)."""

import pytest
import torch
from torch import Tensor

from ds_optforge import build_optimizer
from ds_optforge.rules.muon import Orthogonalization
from ds_optforge.rules.muon_squared import MuonSquared
from tests import oracles
from tests.layers import bytes_per_parameter, linears, matrix, set_gradients, stepped_as_stored_in_out
from tests.oracles import EXACT, relative_error

MUON_SQUARED = {"name": "muon_squared", "lr": 0.02, **EXACT}
SHAPES = [(40, 40), (24, 96), (96, 24), (33, 7)]


class Formula(oracles.Muon):
    """One (out, in) weight in float64; ``second`` is the second moment of its gradient."""

    def __init__(self, weight: Tensor, beta2: float, eps: float, **settings: float) -> None:
        super().__init__(weight, **settings)
        self.second, self.beta2, self.eps = torch.zeros_like(self.weight), beta2, eps

    def step(self, gradient: Tensor) -> None:
        self.second = self.beta2 * self.second + (1 - self.beta2) * gradient.double() ** 2
        super().step(gradient)

    def update(self, direction: Tensor) -> Tensor:
        return super().update(direction / (self.second**0.5 + self.eps))


@pytest.mark.promise("choose-by-name", "muon-family-formulas")
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(("nesterov", "beta2", "eps"), [(True, 0.95, 1e-10), (False, 0.5, 0.1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_ten_steps_follow_the_formula(shape: tuple[int, int], nesterov: bool, beta2: float, eps: float, decay: float) -> None:
    """1e-5: float32, beside updates that are a fifth of the weight."""
    settings = {"momentum": 0.9, "beta2": beta2, "eps": eps, "weight_decay": decay, "nesterov": nesterov}
    weight = 0.1 * matrix(*shape)
    model, reference = linears(weight), Formula(weight, lr=0.02, **settings)
    optimizer = build_optimizer(model, {**MUON_SQUARED, **settings})
    for step in range(10):
        set_gradients(model.parameters(), step)
        reference.step(model[0].weight.grad)
        optimizer.step()
    assert relative_error(model[0].weight, reference.weight) < 1e-5
    root = optimizer.state[model[0].weight]["second_moment_root"]
    assert relative_error(root, reference.second**0.5) < 1e-6


@pytest.mark.parametrize(("out", "into"), [(24, 40), (40, 24), (8, 8)])
def test_a_weight_stored_in_out_is_stepped_as_its_transpose(out: int, into: int) -> None:
    """1e-5: float32, in the other order of products."""
    reference = Formula(matrix(out, into), 0.95, 1e-10, lr=0.02, weight_decay=0.3)
    weight = stepped_as_stored_in_out(reference, {**MUON_SQUARED, "weight_decay": 0.3}, out, into)
    assert relative_error(weight, reference.weight) < 1e-5


def test_the_size_of_a_row_of_gradients_does_not_matter() -> None:
    """Nor that of a column: Muon's update would be of rank one here. 1e-5: float32."""
    after = []
    for rows in (torch.ones(24, 1), torch.logspace(-2, 2, 24).view(-1, 1)):
        model = linears(torch.zeros(24, 40))
        optimizer = build_optimizer(model, MUON_SQUARED)
        for step in range(3):
            model[0].weight.grad = rows * matrix(24, 40, seed=step)
            optimizer.step()
        after.append(model[0].weight.detach())
    assert relative_error(after[1], after[0]) < 1e-5


def test_the_direction_leaves_gradients_and_the_momentum_unchanged() -> None:
    """Without Nesterov the momentum itself is what is divided."""
    rule = MuonSquared(False, Orthogonalization(), beta2=0.75, eps=0.5)
    gradient = torch.tensor([2.0, -4.0])
    state = {"momentum_buffer": [torch.tensor([1.0, 0.0])], "second_moment_root": [torch.tensor([2.0, 0.0])]}
    (found,) = rule.direction([gradient], [], state, {}, {"momentum": 0.5})
    assert torch.equal(gradient, torch.tensor([2.0, -4.0]))
    assert torch.equal(state["momentum_buffer"][0], torch.tensor([1.5, -2.0]))
    # 0.75 * 2^2 + 0.25 * 2^2 and 0.25 * 4^2
    assert torch.equal(state["second_moment_root"][0], torch.tensor([2.0, 2.0]))
    assert torch.equal(found, torch.tensor([1.5 / 2.5, -2.0 / 2.5]))


@pytest.mark.promise("state-buffers", "8bit-size")
@pytest.mark.parametrize(("state_dtype", "nbytes"), [("float32", 8.0), ("bfloat16", 4.0), ("8bit", 2.031)])
def test_bytes_of_state_per_parameter(state_dtype: str, nbytes: float) -> None:
    """Two buffers. 0.001: the step counters."""
    if state_dtype == "8bit":
        pytest.importorskip("bitsandbytes")
    assert bytes_per_parameter({"name": "muon_squared", "state_dtype": state_dtype}) == pytest.approx(nbytes, abs=1e-3)
