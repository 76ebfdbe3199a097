"""Lion against Algorithm 2 of Chen et al. 2023 (arXiv 2302.06675)."""

import pytest
import torch
from torch import Tensor

from ds_optforge import ConfigError, build_optimizer
from ds_optforge.rules.base import ElementwiseRule, MatrixRule
from ds_optforge.rules.lion import Lion
from tests.layers import bytes_per_parameter, linears, matrix, set_gradients

F64 = torch.float64


class Formula:
    """In float64: u = sign(b1 m + (1 - b1) g); w <- w - lr (u + decay w); m <- b2 m + (1 - b2) g."""

    def __init__(self, weight: Tensor, lr: float, betas: tuple[float, float], decay: float) -> None:
        self.weight, self.average = weight.double(), torch.zeros_like(weight, dtype=F64)
        self.lr, self.betas, self.decay = lr, betas, decay

    def step(self, gradient: Tensor) -> None:
        gradient = gradient.double()
        update = (self.betas[0] * self.average + (1 - self.betas[0]) * gradient).sign()
        self.weight = self.weight - self.lr * (update + self.decay * self.weight)
        self.average = self.betas[1] * self.average + (1 - self.betas[1]) * gradient


@pytest.mark.promise("choose-by-name", "lion-formula")
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.5, 0.3)])
@pytest.mark.parametrize("shape", [(40, 40), (24, 96), (33, 7), (1, 5)])
def test_twenty_steps_follow_the_formula(shape: tuple[int, int], betas: tuple[float, float], decay: float) -> None:
    """1e-13: float64 throughout, since state follows the parameter's dtype."""
    model = linears(matrix(*shape, dtype=F64))
    reference = Formula(model[0].weight.detach(), 0.01, betas, decay)
    optimizer = build_optimizer(model, {"name": "lion", "lr": 0.01, "betas": betas, "weight_decay": decay})
    for step in range(20):
        set_gradients(model.parameters(), step)
        reference.step(model[0].weight.grad)
        optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), reference.weight, rtol=0, atol=1e-13)
    torch.testing.assert_close(optimizer.state[model[0].weight]["exp_avg"], reference.average, rtol=0, atol=1e-13)


@pytest.mark.promise("lion-formula")
def test_the_signs_are_the_same_in_float32() -> None:
    """1e-5: twenty roundings of weights up to 4; every step is lr, so one wrong sign would be off by 2e-2."""
    model = linears(matrix(40, 40))
    reference = Formula(model[0].weight.detach(), 0.01, (0.9, 0.99), 0.1)
    optimizer = build_optimizer(model, {"name": "lion", "lr": 0.01, "weight_decay": 0.1})
    for step in range(20):
        set_gradients(model.parameters(), step)
        reference.step(model[0].weight.grad)
        optimizer.step()
    torch.testing.assert_close(model[0].weight.detach().double(), reference.weight, rtol=0, atol=1e-5)


def test_an_element_without_gradient_and_momentum_stays() -> None:
    """sign(0) = 0: an unused row of an embedding does not march."""
    model = linears(torch.ones(2, 2))
    model[0].weight.grad = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    build_optimizer(model, {"name": "lion", "lr": 0.25}).step()
    assert torch.equal(model[0].weight, torch.tensor([[0.75, 1.0], [1.0, 1.25]]))


@pytest.mark.promise("lion-formula", "state-buffers")
def test_its_state_is_one_buffer() -> None:
    model = linears(matrix(8, 12))
    optimizer = build_optimizer(model, {"name": "lion"})
    set_gradients(model.parameters(), 0)
    optimizer.step()
    assert set(optimizer.state[model[0].weight]) == {"exp_avg", "step"}


@pytest.mark.promise("lion-no-eps", "unread-field")
def test_it_takes_no_eps() -> None:
    with pytest.raises(ConfigError, match=r"^optimizer\.params\.eps: 'lion' does not read it"):
        build_optimizer(linears(matrix(4, 4)), {"name": "lion", "eps": 1e-8})


def test_gradients_stay_unchanged() -> None:
    gradient = torch.tensor([1.0, -2.0])
    now = {"lr": 0.1, "weight_decay": 0.5, "betas": (0.9, 0.99)}
    Lion().step([torch.ones(2)], [gradient], {"exp_avg": [torch.ones(2)]}, now)
    assert torch.equal(gradient, torch.tensor([1.0, -2.0]))


def test_it_is_an_elementwise_rule() -> None:
    assert isinstance(Lion(), ElementwiseRule)
    assert not isinstance(Lion(), MatrixRule)


@pytest.mark.parametrize(("state_dtype", "nbytes"), [("float32", 4.0), ("bfloat16", 2.0), ("8bit", 1.016)])
def test_bytes_of_state_per_parameter(state_dtype: str, nbytes: float) -> None:
    """checklist 19, 49; one buffer, and 4 bytes of scale for 256 8-bit values. 0.001: the step counters."""
    if state_dtype == "8bit":
        pytest.importorskip("bitsandbytes")
    config = {"name": "lion", "state_dtype": state_dtype}
    assert bytes_per_parameter(config) == pytest.approx(nbytes, abs=1e-3)
