"""`"ema_nesterov"` around rules in plain PyTorch, against the two lines of Yau et al. 2026 (arXiv 2605.25395) in float64."""

import re
from collections.abc import Callable
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor, nn

from ds_optforge import ConfigError, build_optimizer, evaluation_weights
from ds_optforge.optimizer import OptForge
from tests import models
from tests.layers import linears, matrix
from tests.oracles import EXACT, Muon, relative_error

F64 = torch.float64
AROUND = {"decay": 0.9, "scale": 0.6, "start": 3, "stop": 12}
STEPS = 16
TARGET = matrix(12, 20, seed=9)


class Inner(Protocol):
    """A rule's formula on one weight."""

    weight: Tensor

    def step(self, gradient: Tensor) -> None: ...


class AdamW:
    """W <- (1 - lr wd) W - lr m^ / (sqrt(v^) + eps), in float64."""

    def __init__(self, weight: Tensor, lr: float, weight_decay: float, cautious: bool = False) -> None:
        self.weight, self.lr, self.weight_decay, self.cautious = weight.double(), lr, weight_decay, cautious
        self.first, self.second, self.steps = torch.zeros_like(self.weight), torch.zeros_like(self.weight), 0

    def step(self, gradient: Tensor) -> None:
        gradient, self.steps = gradient.double(), self.steps + 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        update = self.first / (1 - 0.9**self.steps) / ((self.second / (1 - 0.999**self.steps)).sqrt() + 1e-8)
        decayed = (self.weight * update >= 0).double() if self.cautious else 1.0
        self.weight = self.weight - self.lr * self.weight_decay * decayed * self.weight - self.lr * update


class Formula:
    """x <- inner(x + b m); m <- decay m + (1 - decay) (x - the x before), with x kept beside the look-ahead."""

    def __init__(self, inner: Inner, decay: float, scale: float, start: int, stop: int | None) -> None:
        self.inner, self.decay, self.scale, self.start, self.stop = inner, decay, scale, start, stop
        self.x, self.momentum, self.steps = inner.weight.clone(), torch.zeros_like(inner.weight), 0
        self.share = 1.0  # the learning rate of the step before, over the largest

    def ahead(self) -> Tensor:
        looks = self.start <= self.steps and (self.stop is None or self.steps < self.stop)
        return self.x + looks * self.scale * self.share * self.momentum

    def step(self, gradient: Tensor) -> None:
        self.inner.weight = self.ahead()
        self.inner.step(gradient)
        self.momentum = self.decay * self.momentum + (1 - self.decay) * (self.inner.weight - self.x)
        self.x, self.steps = self.inner.weight.clone(), self.steps + 1


def gradient_of(weight: Tensor, step: int) -> Tensor:
    """Of a quadratic, and noise: it tells where it was taken."""
    return weight - TARGET.to(weight) + 0.5 * matrix(*weight.shape, seed=100 + step).to(weight)


def evaluated(model: nn.Module, optimizer: OptForge) -> dict[str, Tensor]:
    with evaluation_weights(optimizer):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def follow(config: dict[str, Any], reference: Formula, dtype: torch.dtype, tolerance: float) -> None:
    """Train both with a falling rate; compare where gradients are taken, and what is evaluated, after every step."""
    model = linears(matrix(*TARGET.shape, dtype=dtype))
    optimizer = build_optimizer(model, {**config, "ema_nesterov": AROUND})
    peak = optimizer.param_groups[0]["lr"]
    for step in range(STEPS):
        rate = peak * (1 - 0.04 * step)
        optimizer.param_groups[0]["lr"] = reference.inner.lr = rate  # type: ignore[attr-defined]
        model[0].weight.grad = gradient_of(model[0].weight.detach(), step)
        reference.step(gradient_of(reference.ahead(), step))
        reference.share = rate / peak
        optimizer.step()
        assert relative_error(model[0].weight, reference.ahead()) < tolerance, step
        assert relative_error(evaluated(model, optimizer)["0.weight"], reference.x) < tolerance, step
    assert relative_error(optimizer.state[model[0].weight]["update_average"], reference.momentum) < 1e3 * tolerance


@pytest.mark.promise("ema-nesterov")
@pytest.mark.parametrize("cautious", [False, True])
def test_around_adamw_it_is_the_formula(cautious: bool) -> None:
    """Decay, cautious decay too, is of the weight that is ahead. 1e-13: float64 throughout."""
    inner = AdamW(matrix(*TARGET.shape, dtype=F64), 0.01, 0.1, cautious)
    config = {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    config["cautious_weight_decay"] = cautious
    follow(config, Formula(inner, **AROUND), F64, 1e-13)


@pytest.mark.promise("ema-nesterov")
def test_around_muon_it_is_the_formula() -> None:
    """5e-6: float32 weights and Newton-Schulz; one look-ahead left out would be off by 1e-2."""
    inner = Muon(matrix(*TARGET.shape), 0.02, weight_decay=0.1)
    follow({"name": "muon", "lr": 0.02, "weight_decay": 0.1, **EXACT}, Formula(inner, **AROUND), torch.float32, 5e-6)


class TestByHand:
    """sgd with rate 1 and gradients of -1: the rule adds 1 in each step; decay 1/2, scale 1/2."""

    def run(self, steps: int, **around: Any) -> tuple[list[float], list[float]]:
        model = nn.Linear(3, 2, bias=False)
        nn.init.zeros_(model.weight)
        around = {"ema_nesterov": {"decay": 0.5, "scale": 0.5, "start": 0}, **around}
        optimizer = build_optimizer(model, {"name": "sgd", "lr": 1.0, "momentum": 0.0, **around})
        trained, found = [], []
        for _ in range(steps):
            model.weight.grad = -torch.ones_like(model.weight)
            optimizer.step()
            trained.append(model.weight.detach().unique().item())
            found.append(evaluated(model, optimizer)["weight"].unique().item())
        return trained, found

    def test_gradients_are_taken_ahead_and_the_weights_behind_are_evaluated(self) -> None:
        """x = 1, m = 1/2; then x = 1 + 1/4 + 1, m = 1/4 + 5/8; the model is at x + m / 2."""
        assert self.run(2) == ([1.25, 2.6875], [1.0, 2.25])

    def test_the_average_is_of_the_weights_behind(self) -> None:
        assert self.run(2, average={"kind": "tail", "start": 1})[1] == [1.0, 1.625]

    def test_start_only_fills_and_stop_ends_it(self) -> None:
        """m = 1/2 after a step, 3/4 after two; the third step is taken from 2 + 3/8, and m = 3/8 + 11/16."""
        around = {"ema_nesterov": {"decay": 0.5, "scale": 0.5, "start": 2, "stop": 3}}
        assert self.run(4, **around) == ([1.0, 2.375, 3.375, 4.375], [1.0, 2.0, 3.375, 4.375])


@pytest.mark.promise("ema-nesterov")
@pytest.mark.parametrize("average", [{}, {"average": {"kind": "tail", "start": 4}}])
def test_a_matrix_without_gradient_stays_where_it_is(average: dict[str, Any]) -> None:
    """Its look-ahead too, bit for bit while the rate is constant; a falling rate shortens the look-ahead alone."""
    model = linears(matrix(8, 8), matrix(8, 8, seed=1))
    around = {"ema_nesterov": {"decay": 0.5, "scale": 0.5, "start": 0}, **average}
    optimizer = build_optimizer(model, {"name": "muon", "lr": 0.02, "weight_decay": 0.1, **around})

    def step(*values: float) -> None:
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.grad = value * matrix(8, 8, seed=5)
        optimizer.step()

    for _ in range(3):
        step(1.0, 1.0)
    weight, kept = model[1].weight, optimizer.state[model[1].weight]["update_average"].clone()
    ahead, behind = weight.detach().clone(), evaluated(model, optimizer)["1.weight"]
    for _ in range(3):
        step(1.0, 0.0)
        assert torch.equal(weight, ahead)
        assert torch.equal(evaluated(model, optimizer)["1.weight"], behind)
    optimizer.param_groups[0]["lr"] = 0.01
    step(1.0, 0.0)
    torch.testing.assert_close(weight.detach(), behind + 0.25 * kept)
    torch.testing.assert_close(evaluated(model, optimizer)["1.weight"], behind, rtol=0, atol=1e-6)
    assert torch.equal(optimizer.state[weight]["update_average"], kept)


def test_a_skipped_parameter_stays_as_it_was() -> None:
    model = linears(matrix(8, 8), matrix(8, 8, seed=1))
    around = {"ema_nesterov": {"decay": 0.5, "scale": 0.5, "start": 0}}
    for name in ("muon", "adamw"):
        optimizer = build_optimizer(model, {"name": name, "lr": 0.02, **around})
        for parameter in model.parameters():
            parameter.grad = matrix(8, 8, seed=5)
        optimizer.step()
        model[1].weight.grad = None
        before = model[1].weight.detach().clone(), evaluated(model, optimizer)["1.weight"]
        optimizer.step()
        assert torch.equal(model[1].weight, before[0])
        assert torch.equal(evaluated(model, optimizer)["1.weight"], before[1])


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
def test_it_is_kept_in_full_precision(state_dtype: str) -> None:
    model = models.build()
    optimizer = build_optimizer(model, {"name": "muon", "state_dtype": state_dtype, "ema_nesterov": AROUND})
    model(*models.batch(0)).backward()
    optimizer.step()
    assert {state["update_average"].dtype for state in optimizer.state.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"name": "muon", "ema_nesterov": {"scale": 1.0}}, "ema_nesterov.scale: got 1.0 (float); allowed: less than 1"),
        ({"name": "muon", "ema_nesterov": {"decay": 1.0}}, "ema_nesterov.decay: got 1.0 (float); allowed: less than 1"),
        ({"name": "muon", "ema_nesterov": {"stop": 500}}, "ema_nesterov.stop: got 500 with start 500; allowed: a later step"),
        (
            {"name": "schedule_free_adamw", "ema_nesterov": {}},
            "ema_nesterov: got a section with 'schedule_free_adamw', which averages its weights itself; allowed: none",
        ),
    ],
)
def test_what_cannot_be_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_optimizer(models.build(), params)


@pytest.mark.parametrize("refused", ["step", "state_dict"])
def test_a_step_on_the_weights_behind_is_refused(refused: str) -> None:
    model = models.build()
    optimizer = build_optimizer(model, {"name": "muon", "ema_nesterov": {}})
    action: Callable[[], Any] = getattr(optimizer, refused)
    with evaluation_weights(optimizer), pytest.raises(RuntimeError, match="on averaged weights; leave evaluation_weights"):
        action()
