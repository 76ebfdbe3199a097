"""Muon Hyperball against Wen et al. 2026 (arXiv 2606.16899): W <- R n(W - lr R n(O)), R the norm with which W starts."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_optforge import ConfigError, build_optimizer
from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.rules.flat import combine
from ds_optforge.step.health import PATIENCE
from tests.layers import bytes_per_parameter, linears, matrix, set_gradients
from tests.oracles import EXACT, newton_schulz, relative_error

HYPERBALL = {"name": "muon_hyperball", **EXACT}
SHAPES = [(40, 40), (24, 96), (96, 24), (33, 7)]


class Formula:
    """One (out, in) weight in float64."""

    def __init__(self, weight: Tensor, lr: float = 0.018, momentum: float = 0.95, nesterov: bool = True) -> None:
        self.weight = weight.detach().double()
        self.radius = self.weight.norm()
        self.buffer = torch.zeros_like(self.weight)
        self.lr, self.momentum, self.nesterov = lr, momentum, nesterov

    def step(self, gradient: Tensor) -> None:
        gradient = gradient.double()
        self.buffer = self.momentum * self.buffer + (1 - self.momentum) * gradient
        direction = (1 - self.momentum) * gradient + self.momentum * self.buffer if self.nesterov else self.buffer
        update = newton_schulz(direction)
        moved = self.weight - self.lr * self.radius * update / update.norm()
        self.weight = self.radius * moved / moved.norm()


@pytest.mark.promise("muon-hyperball-formula")
@pytest.mark.parametrize("settings", [{}, {"lr": 0.3, "momentum": 0.8, "nesterov": False}])
@pytest.mark.parametrize("shape", SHAPES)
def test_ten_steps_follow_the_formula(shape: tuple[int, int], settings: dict[str, Any]) -> None:
    """1e-5 of the weight: float32, magnified by Newton-Schulz's steep start."""
    model = linears(0.1 * matrix(*shape))
    reference = Formula(model[0].weight, **settings)
    optimizer = build_optimizer(model, {**HYPERBALL, **settings})
    for step in range(10):
        set_gradients(model.parameters(), step)
        reference.step(model[0].weight.grad)
        optimizer.step()
    assert relative_error(model[0].weight, reference.weight) < 1e-5


@pytest.mark.promise("muon-hyperball-norm")
def test_a_matrix_keeps_the_norm_with_which_it_started() -> None:
    """3e-7 after 200 steps of a third of the weight: one rounding to float32, and none of the steps before."""
    model = linears(0.1 * matrix(24, 96), 3.0 * matrix(33, 7))
    before = [layer.weight.detach().double().norm() for layer in model]
    optimizer = build_optimizer(model, {**HYPERBALL, "lr": 0.3})
    for step in range(200):
        set_gradients(model.parameters(), step)
        optimizer.step()
    for layer, norm in zip(model, before, strict=True):
        assert layer.weight.detach().double().norm().item() == pytest.approx(norm.item(), rel=3e-7)
        assert optimizer.state[layer.weight]["radius"].item() == norm.float().item()


def test_the_first_step_is_a_share_lr_of_the_weight() -> None:
    """On the sphere: the chord of the angle whose tangent is at most lr, so it is shorter by a part of lr squared."""
    model = linears(0.1 * matrix(24, 96))
    before = model[0].weight.detach().clone()
    optimizer = build_optimizer(model, {**HYPERBALL, "lr": 0.01})
    set_gradients(model.parameters(), 0)
    optimizer.step()
    assert relative_error(model[0].weight, before) == pytest.approx(0.01, rel=0.01)


def test_the_norm_is_that_of_every_matrix_of_a_bank() -> None:
    """Not of the parameter: each member stays on its own sphere."""
    model = nn.Module()
    model.experts = nn.Parameter(torch.stack([matrix(8, 12), 5.0 * matrix(8, 12, seed=1)]))
    before = [expert.norm().item() for expert in model.experts]
    optimizer = build_optimizer(model, HYPERBALL)
    for step in range(3):
        set_gradients(model.parameters(), step)
        optimizer.step()
    assert [expert.norm().item() for expert in model.experts] == pytest.approx(before, rel=1e-6)
    assert optimizer.state[model.experts]["radius"].tolist() == pytest.approx(before, rel=1e-6)


def test_a_matrix_without_a_gradient_stays_as_it_is_and_starts_with_its_first_one() -> None:
    model = linears(matrix(8, 12), matrix(8, 12, seed=1))
    optimizer = build_optimizer(model, HYPERBALL)
    idle = model[0].weight
    before = idle.detach().clone()
    for step in range(2):
        set_gradients(model.parameters(), step)
        idle.grad.zero_()
        optimizer.step()
        assert torch.equal(idle, before)
        assert optimizer.state[idle]["radius"].item() == 0.0
    set_gradients(model.parameters(), 2)
    optimizer.step()
    assert not torch.equal(idle, before)
    assert optimizer.state[idle]["radius"].item() == pytest.approx(before.norm().item(), rel=1e-6)


def test_telemetry_shows_the_share_and_expects_no_size_of_a_step(caplog: pytest.LogCaptureFixture) -> None:
    """2%: in line with its momentum, a weight turns by less. Of weights of size 3, a step is far larger than muon's."""
    model = linears(3.0 * matrix(24, 96))
    optimizer = build_optimizer(model, {**HYPERBALL, "telemetry": {"every": 1}})
    for step in range(PATIENCE + 2):
        set_gradients(model.parameters(), step)
        optimizer.step()
    numbers = optimizer.telemetry["groups"]["matrix.muon_hyperball"]
    assert numbers["update_to_parameter"] == pytest.approx(0.018, rel=0.02)
    assert numbers["effective_lr"] == pytest.approx(0.018)
    assert "update_rms" not in caplog.text


class TestZeros:
    """A matrix of zeros has no sphere."""

    def test_it_is_refused_by_name_before_anything_has_changed(self) -> None:
        model = linears(matrix(8, 12), torch.zeros(8, 12))
        optimizer = build_optimizer(model, HYPERBALL)
        set_gradients(model.parameters(), 0)
        before = model[0].weight.detach().clone()
        with pytest.raises(ConfigError, match=r"^1\.weight\[0:96\] 8x12: got zeros with rule 'muon_hyperball'.*by 'overrides'"):
            optimizer.step()
        assert torch.equal(model[0].weight, before)
        assert "momentum_buffer" not in optimizer.state[model[0].weight]

    def test_another_rule_for_it_is_the_way_out(self) -> None:
        model = linears(matrix(8, 12), torch.zeros(8, 12))
        params = {**HYPERBALL, "overrides": [{"match": "1.weight", "name": "muon", "lr": 0.02}]}
        optimizer = build_optimizer(model, params)
        set_gradients(model.parameters(), 0)
        optimizer.step()
        assert model[1].weight.any()

    def test_small_values_are_none(self) -> None:
        """Their squares are, in float32."""
        model = linears(1e-30 * matrix(8, 12))
        optimizer = build_optimizer(model, HYPERBALL)
        set_gradients(model.parameters(), 0)
        optimizer.step()
        assert model[0].weight.isfinite().all()

    def test_later_steps_look_at_nothing(self) -> None:
        """Nor does a matrix that is all zeros by then become anything else."""
        model = linears(matrix(8, 12))
        optimizer = build_optimizer(model, HYPERBALL)
        set_gradients(model.parameters(), 0)
        optimizer.step()
        model[0].weight.data.zero_()
        optimizer.step()
        assert model[0].weight.isfinite().all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight_decay": 0.1}, r"weight_decay.*'muon_hyperball' does not read it"),
        ({"orthogonalization": {"scale": "shape"}}, r"orthogonalization\.scale: got a value; allowed: none"),
        (
            {"orthogonalization": {"rms": 0.2, "scale": "match_rms_adamw"}},
            r"orthogonalization\.rms: got a value; allowed: none",
        ),
    ],
)
def test_what_would_do_nothing_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(linears(matrix(8, 12)), {"name": "muon_hyperball", **given})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_stay_near_their_sphere(dtype: torch.dtype) -> None:
    """In plain PyTorch: 2e-3 is half the spacing of bfloat16 at most, of one step; a norm of many elements is nearer."""
    model = linears(0.1 * matrix(32, 48)).to(dtype)
    before = model[0].weight.detach().double()
    optimizer = build_optimizer(model, {**HYPERBALL, "lr": 0.05})
    for step in range(100):
        set_gradients(model.parameters(), step)
        optimizer.step()
    after = model[0].weight.detach().double()
    assert after.norm().item() == pytest.approx(before.norm().item(), rel=2e-3)
    assert relative_error(after, before) > 0.3


def test_a_run_that_comes_from_muon_keeps_the_norm_of_that_moment() -> None:
    """Its state has no radius yet: the values of a checkpoint that another rule wrote begin as zeros."""
    model = linears(matrix(8, 12))
    optimizer = build_optimizer(model, HYPERBALL)
    set_gradients(model.parameters(), 0)
    optimizer.step()
    model[0].weight.data.mul_(3.0)
    optimizer.state[model[0].weight]["radius"].zero_()
    moved = model[0].weight.norm().item()
    optimizer.step()
    assert model[0].weight.norm().item() == pytest.approx(moved, rel=1e-6)


def test_the_radius_is_in_the_checkpoint() -> None:
    """Not read from the weight again: a resumed run stays on the first sphere even where its weight is off it."""
    model = linears(matrix(8, 12))
    norm = model[0].weight.norm().item()
    optimizer = build_optimizer(model, HYPERBALL)
    set_gradients(model.parameters(), 0)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = linears(1.1 * model[0].weight.detach())
    loaded = build_optimizer(resumed, HYPERBALL)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    set_gradients(resumed.parameters(), 1)
    loaded.step()
    assert resumed[0].weight.norm().item() == pytest.approx(norm, rel=1e-6)


def test_parameters_side_by_side_are_stepped_by_factors_of_their_own() -> None:
    """2e-7: two roundings."""
    flat, updates = matrix(1, 12).flatten(), matrix(1, 12, seed=1).flatten()
    expected = torch.cat([2.0 * flat[:5] - 3.0 * updates[:5], -flat[5:10] - updates[5:10], flat[10:]])
    kept, taken = torch.tensor([2.0, -1.0, 1.0]), torch.tensor([3.0, 1.0, 0.0])
    combine(torch.split(flat, [5, 5, 2]), torch.split(updates, [5, 5, 2]), kept, taken)
    torch.testing.assert_close(flat, expected, rtol=2e-7, atol=2e-7)


@pytest.mark.promise("state-buffers", "8bit-size")
@pytest.mark.parametrize(("state_dtype", "nbytes"), [("float32", 4.0), ("bfloat16", 2.0), ("8bit", 1.016)])
def test_bytes_of_state_per_parameter(state_dtype: str, nbytes: float) -> None:
    """As muon, and 4 bytes for each matrix. 0.001: these, and the step counters."""
    if state_dtype == "8bit":
        pytest.importorskip("bitsandbytes")
    config = {"name": "muon_hyperball", "state_dtype": state_dtype}
    assert bytes_per_parameter(config) == pytest.approx(nbytes, abs=1e-3)


def test_the_factors_of_four_matrices_by_hand() -> None:
    """The first step of one, a step with an update of zero, and none without a gradient, before the first step and after it.

    Of the first, R = 5 and the step is 0.1 x 5 / 2 of O: ||W - 0.25 O||^2 = 25 - 2 x 0.25 x 3 + 0.25^2 x 4 = 23.75.
    """
    given = {
        "active": [1.0, 1.0, 0.0, 0.0],
        "radius": [0.0, 0.5, 0.0, 3.0],
        "weight_square": [25.0, 0.25, 9.0, 16.0],
        "update_square": [4.0, 0.0, 4.0, 4.0],
        "product": [3.0, 0.0, 1.0, 1.0],
    }
    values = {name: torch.tensor(each, dtype=torch.float64) for name, each in given.items()}
    now = {"lr": 0.1, "momentum": 0.95}
    found = OptimizerConfig(HYPERBALL).main.build().settle(True, values, now)
    back = 5 / 23.75**0.5
    assert found["radius"].tolist() == [5.0, 0.5, 0.0, 3.0]
    assert found["of_weight"].tolist() == pytest.approx([back, 1.0, 1.0, 1.0])
    assert found["of_step"].tolist() == pytest.approx([0.25 * back, 0.0, 0.0, 0.0])
