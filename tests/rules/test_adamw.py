"""AdamW's math alone, on lists of tensors."""

import pytest
import torch
from torch import Tensor

from ds_optforge.rules.adamw import AdamW
from ds_optforge.rules.base import ElementwiseRule, MatrixRule
from tests.layers import bytes_per_parameter

GROUP = {"lr": 0.1, "weight_decay": 0.0, "betas": (0.8, 0.9)}


def run(weight: Tensor, gradients: list[Tensor], eps: float = 1e-8, **group: object) -> dict[str, Tensor]:
    """Step ``weight`` in place; its state afterwards."""
    rule = AdamW(eps)
    state = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
    for step, gradient in enumerate(gradients, 1):
        now = rule.begin({**GROUP, **group}, {}, step)
        rule.step([weight], [gradient], {name: [value] for name, value in state.items()}, now)
    return state


def formula(weight: Tensor, gradients: list[Tensor], lr: float, decay: float, betas: tuple[float, float], eps: float) -> Tensor:
    """Loshchilov & Hutter 2019, Algorithm 2, in float64."""
    weight = weight.double()
    first = second = torch.zeros_like(weight)
    for step, gradient in enumerate(map(Tensor.double, gradients), 1):
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        direction = first / (1 - betas[0] ** step) / ((second / (1 - betas[1] ** step)).sqrt() + eps)
        weight = weight - lr * decay * weight - lr * direction
    return weight


@pytest.mark.promise("adamw-is-torchs")
@pytest.mark.parametrize("eps", [1e-8, 0.5])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_ten_steps_follow_the_formula(decay: float, eps: float) -> None:
    """1e-6: float32."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(50, generator=generator)
    gradients = [torch.randn(50, generator=generator) for _ in range(10)]
    weight = start.clone()
    run(weight, gradients, eps, weight_decay=decay)
    expected = formula(start, gradients, 0.1, decay, (0.8, 0.9), eps)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.promise("role-betas")
def test_the_betas_are_the_groups() -> None:
    """A schedule may change them."""
    state = run(torch.ones(1), [torch.tensor([2.0])], betas=(0.5, 0.75))
    assert (state["exp_avg"].item(), state["exp_avg_sq"].item()) == pytest.approx((1.0, 1.0))


def test_gradients_stay_unchanged() -> None:
    gradient = torch.tensor([1.0, -2.0])
    run(torch.ones(2), [gradient], weight_decay=0.5)
    assert torch.equal(gradient, torch.tensor([1.0, -2.0]))


@pytest.mark.promise("state-buffers")
def test_it_is_an_elementwise_rule_with_two_buffers() -> None:
    assert isinstance(AdamW(1e-8), ElementwiseRule)
    assert not isinstance(AdamW(1e-8), MatrixRule)
    assert [buffer.name for buffer in AdamW.buffers] == ["exp_avg", "exp_avg_sq"]
    assert AdamW.scheduled == ("lr", "weight_decay", "betas")


@pytest.mark.parametrize(("state_dtype", "nbytes"), [("float32", 8.0), ("bfloat16", 4.0), ("8bit", 2.031)])
def test_bytes_of_state_per_parameter(state_dtype: str, nbytes: float) -> None:
    """checklist 19, 49; two buffers, and 4 bytes of scale for 256 8-bit values. 0.001: the step counters."""
    if state_dtype == "8bit":
        pytest.importorskip("bitsandbytes")
    config = {"name": "adamw", "state_dtype": state_dtype}
    assert bytes_per_parameter(config) == pytest.approx(nbytes, abs=1e-3)
