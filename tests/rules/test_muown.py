"""Muown against its authors' code (Lion et al. 2026, arXiv 2605.10797; github.com/kcc-lion/muown), written down in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_optforge import ConfigError, build_optimizer
from tests.layers import bytes_per_parameter, linears, matrix, set_gradients
from tests.oracles import EXACT, newton_schulz, relative_error

MUOWN = {"name": "muown", **EXACT}
SHAPES = [(40, 40), (24, 96), (96, 24), (33, 7)]
KEPT = ("magnitude", "direction_norm", "magnitude_exp_avg", "magnitude_exp_avg_sq")


class Formula:
    """One (out, in) weight in float64. The directions are variables of their own here."""

    def __init__(self, weight: Tensor, **settings: Any) -> None:
        self.settings = {"lr": 1e-3, "momentum": 0.95, "betas": (0.9, 0.95), "weight_decay": 0.0, "nesterov": True, **settings}
        self.weight = weight.detach().double()
        self.direction = self.weight.clone()
        self.magnitude = self.weight.norm(dim=1, keepdim=True)
        self.sum = torch.zeros_like(self.weight)
        self.first, self.second = torch.zeros_like(self.magnitude), torch.zeros_like(self.magnitude)
        self.steps = 0

    def step(self, gradient: Tensor) -> None:
        gradient, self.steps = gradient.double(), self.steps + 1
        lr, momentum, (beta1, beta2) = (self.settings[name] for name in ("lr", "momentum", "betas"))
        norm = self.direction.norm(dim=1, keepdim=True)
        unit, before = self.direction / norm, self.weight
        of_magnitude = (gradient * unit).sum(dim=1, keepdim=True)
        of_direction = self.magnitude / norm * (gradient - unit * of_magnitude)
        self.sum = momentum * self.sum + of_direction
        chosen = of_direction + momentum * self.sum if self.settings["nesterov"] else self.sum
        self.direction = self.direction - lr * 0.2 * max(gradient.shape) ** 0.5 * newton_schulz(chosen, eps=1e-30)
        self.first = beta1 * self.first + (1 - beta1) * of_magnitude
        self.second = beta2 * self.second + (1 - beta2) * of_magnitude**2
        root = (self.second / (1 - beta2**self.steps)).sqrt()
        self.magnitude = self.magnitude - lr * (self.first / (1 - beta1**self.steps)) / (root + 1e-8)
        self.weight = self.magnitude * self.direction / self.direction.norm(dim=1, keepdim=True)
        if decay := self.settings["weight_decay"]:
            # The code goes on with the direction of the decayed weight, at the norm that the direction had before it.
            norm = self.direction.norm(dim=1, keepdim=True)
            self.weight = self.weight - lr * decay * before
            self.magnitude = self.weight.norm(dim=1, keepdim=True)
            self.direction = self.weight / self.magnitude * norm


@pytest.mark.promise("muown-formula")
@pytest.mark.parametrize(
    "settings",
    [{}, {"lr": 0.02, "momentum": 0.8, "betas": [0.5, 0.9], "nesterov": False}, {"lr": 0.01, "weight_decay": 0.5}],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_ten_steps_follow_the_authors_code(shape: tuple[int, int], settings: dict[str, Any]) -> None:
    """1e-5 of the weight, 1e-4 of what is kept, which starts at zero: float32, magnified by Newton-Schulz's steep start."""
    model = linears(0.1 * matrix(*shape))
    reference = Formula(model[0].weight, **settings)
    optimizer = build_optimizer(model, {**MUOWN, **settings})
    for step in range(10):
        set_gradients(model.parameters(), step)
        reference.step(model[0].weight.grad)
        optimizer.step()
    assert relative_error(model[0].weight, reference.weight) < 1e-5
    state = optimizer.state[model[0].weight]
    norm = reference.direction.norm(dim=1)
    for name, expected in zip(KEPT, (reference.magnitude, norm, reference.first, reference.second), strict=True):
        assert relative_error(state[name], expected.flatten()) < 1e-4, name


def test_a_magnitude_may_cross_zero() -> None:
    """As in the code: the row turns round, and its direction is what it was."""
    weight = 0.1 * matrix(8, 12)
    weight[0] *= 1e-3
    model = linears(weight)
    reference = Formula(weight, lr=0.01)
    optimizer = build_optimizer(model, {**MUOWN, "lr": 0.01})
    for step in range(6):
        set_gradients(model.parameters(), step)
        model[0].weight.grad[0] += 1e5 * weight[0]  # away from where it points
        reference.step(model[0].weight.grad)
        optimizer.step()
    assert (reference.magnitude < 0).any()
    assert relative_error(model[0].weight, reference.weight) < 1e-5


def test_rows_of_zeros_get_a_direction_first_and_a_size_then() -> None:
    """Zero-initialised projections are common. The code divides by zero there."""
    model = linears(torch.zeros(8, 12))
    optimizer = build_optimizer(model, {**MUOWN, "lr": 0.01})
    sizes = []
    for step in range(4):
        set_gradients(model.parameters(), step)
        optimizer.step()
        assert model[0].weight.isfinite().all()
        sizes.append(model[0].weight.norm(dim=1).max().item())
    assert sizes[0] == pytest.approx(1e-8, rel=1e-5)
    assert 0.005 < sizes[1] < sizes[3] < 0.05


def test_a_matrix_without_a_gradient_keeps_everything() -> None:
    model = linears(matrix(8, 12), matrix(8, 12, seed=1))
    optimizer = build_optimizer(model, {**MUOWN, "weight_decay": 0.1})
    idle = model[0].weight
    set_gradients(model.parameters(), 0)
    optimizer.step()
    before = {name: optimizer.state[idle][name].clone() for name in KEPT} | {"weight": idle.detach().clone()}
    set_gradients(model.parameters(), 1)
    idle.grad.zero_()
    optimizer.step()
    for name in KEPT:
        assert torch.equal(optimizer.state[idle][name], before[name])
    assert torch.equal(idle, before["weight"])


@pytest.mark.parametrize(("out", "into"), [(24, 40), (40, 24)])
def test_a_weight_stored_in_out_is_stepped_as_its_transpose(out: int, into: int) -> None:
    """1e-6: the same products in another order."""
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D
    stored, plain = nn.ModuleDict({"c": conv1d(out, into)}), linears(0.1 * matrix(out, into))
    stored["c"].weight.data.copy_(plain[0].weight.data.T)
    optimizers = [build_optimizer(model, {**MUOWN, "weight_decay": 0.1, "adamw": {"lr": 0.1}}) for model in (stored, plain)]
    for step in range(3):
        set_gradients(plain.parameters(), step)
        stored["c"].weight.grad = plain[0].weight.grad.T.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    assert relative_error(stored["c"].weight.T, plain[0].weight) < 1e-6
    assert optimizers[0].state[stored["c"].weight]["magnitude"].shape == (out,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_follow_those_of_32(dtype: torch.dtype) -> None:
    """In plain PyTorch. 1%: 8 bits hold 2 to 3 digits."""
    models = [linears(0.1 * matrix(32, 48)).to(kind) for kind in (dtype, torch.float32)]
    models[1].load_state_dict({name: value.float() for name, value in models[0].state_dict().items()})
    optimizers = [build_optimizer(model, {**MUOWN, "lr": 0.02}) for model in models]
    for step in range(10):
        for model, optimizer in zip(models, optimizers, strict=True):
            set_gradients(model.parameters(), step)
            optimizer.step()
    assert relative_error(models[0][0].weight, models[1][0].weight) < 0.01


def test_one_learning_rate_serves_adamw_too_unless_the_scale_is_another() -> None:
    """Updates are as large as AdamW's, in a section without a scale as well."""
    found = [
        build_optimizer(linears(matrix(8, 12)), {"name": "muown", "orthogonalization": {"dtype": "float32", **given}})
        for given in ({}, {"scale": "shape"})
    ]
    assert [str(optimizer.param_groups[0]["lr"]) for optimizer in found] == ["0.001", "0.001"]


def test_cautious_decay_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cautious_weight_decay.*'muown' does not read it"):
        build_optimizer(linears(matrix(8, 12)), {"name": "muown", "cautious_weight_decay": True})


@pytest.mark.promise("state-buffers", "8bit-size")
@pytest.mark.parametrize(("state_dtype", "nbytes"), [("float32", 4.025), ("bfloat16", 2.025), ("8bit", 1.041)])
def test_bytes_of_state_per_parameter(state_dtype: str, nbytes: float) -> None:
    """As muon, and 16 bytes for each row of about 600 elements. 0.001: the step counters."""
    if state_dtype == "8bit":
        pytest.importorskip("bitsandbytes")
    config = {"name": "muown", "state_dtype": state_dtype}
    assert bytes_per_parameter(config) == pytest.approx(nbytes, abs=1e-3)
