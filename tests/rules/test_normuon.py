"""NorMuon against Algorithm 1 of Li et al. 2025 (arXiv 2510.05491), rescaled to the norm before the normalisation."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_optforge import build_optimizer
from ds_optforge.rules.base import Batch
from ds_optforge.rules.muon import Orthogonalization
from ds_optforge.rules.normuon import NorMuon
from tests.layers import bytes_per_parameter, linears, matrix, set_gradients
from tests.oracles import EXACT, newton_schulz, relative_error

NORMUON = {"name": "normuon", "lr": 0.02, **EXACT}
SHAPES = [(40, 40), (24, 96), (96, 24), (33, 7)]


class Formula:
    """One (out, in) weight in float64; ``rows`` is the second moment of each output row."""

    def __init__(self, weight: Tensor, lr: float, momentum: float, beta2: float, weight_decay: float, nesterov: bool) -> None:
        self.weight = weight.detach().double()
        self.buffer, self.rows = torch.zeros_like(self.weight), torch.zeros(len(weight), 1, dtype=torch.float64)
        self.lr, self.momentum, self.beta2 = lr, momentum, beta2
        self.weight_decay, self.nesterov = weight_decay, nesterov

    def step(self, gradient: Tensor) -> None:
        gradient = gradient.double()
        self.buffer = self.momentum * self.buffer + (1 - self.momentum) * gradient
        direction = (1 - self.momentum) * gradient + self.momentum * self.buffer if self.nesterov else self.buffer
        orthogonal = newton_schulz(direction)
        mean_square = (orthogonal**2).mean(dim=1, keepdim=True)
        self.rows = self.beta2 * self.rows + (1 - self.beta2) * mean_square
        normalised = orthogonal / (self.rows.sqrt() + 1e-8)
        normalised = normalised * orthogonal.norm() / normalised.norm()
        out, into = self.weight.shape
        scale = max(1, out / into) ** 0.5
        self.weight = (1 - self.lr * self.weight_decay) * self.weight - self.lr * scale * normalised


@pytest.mark.promise("choose-by-name", "normuon-formula")
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(("nesterov", "beta2"), [(True, 0.95), (False, 0.5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_twenty_steps_follow_the_formula(shape: tuple[int, int], nesterov: bool, beta2: float, decay: float) -> None:
    """1e-4 of the change: twenty times float32's rounding, magnified by Newton-Schulz's steep start."""
    settings = {"lr": 0.02, "momentum": 0.95, "beta2": beta2, "weight_decay": decay, "nesterov": nesterov}
    weight = 0.1 * matrix(*shape)
    model, reference = linears(weight), Formula(weight, **settings)
    optimizer = build_optimizer(model, {**NORMUON, **settings})
    for step in range(20):
        set_gradients(model.parameters(), step)
        reference.step(model[0].weight.grad)
        optimizer.step()
    assert relative_error(model[0].weight - weight, reference.weight - weight.double()) < 1e-4
    rows = optimizer.state[model[0].weight]["row_second_moment"]
    assert relative_error(rows, reference.rows.flatten()) < 1e-4


def test_the_first_update_has_rows_of_one_size() -> None:
    """Each row is divided by its own root mean square. 1e-5: float32."""
    model = linears(torch.zeros(24, 40))
    set_gradients(model.parameters(), 0)
    build_optimizer(model, NORMUON).step()
    norms = model[0].weight.detach().norm(dim=1)
    assert norms.max() / norms.min() - 1 < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_keeps_the_norm_of_muons(shape: tuple[int, int]) -> None:
    """So one learning rate fits both. 1e-5: float32."""
    norms = []
    for name in ("muon", "normuon"):
        model = linears(torch.zeros(*shape))
        set_gradients(model.parameters(), 0)
        build_optimizer(model, {**NORMUON, "name": name}).step()
        norms.append(model[0].weight.detach().norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.promise("normuon-beta2")
def test_beta2_has_an_effect() -> None:
    """It has none in the first step, where the rescaling cancels it."""
    after: dict[float, list[Tensor]] = {}
    for beta2 in (0.5, 0.95):
        model = linears(torch.zeros(24, 40))
        optimizer = build_optimizer(model, {**NORMUON, "beta2": beta2})
        after[beta2] = []
        for step in range(5):
            set_gradients(model.parameters(), step)
            optimizer.step()
            after[beta2].append(model[0].weight.detach().clone())
    assert relative_error(after[0.5][0], after[0.95][0]) < 1e-5
    assert relative_error(after[0.5][4], after[0.95][4]) > 0.01


@pytest.mark.promise("normuon-rows")
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (8, 8)])
def test_one_value_per_output_row(shape: tuple[int, int]) -> None:
    """They are float32 numbers."""
    model = linears(matrix(*shape))
    optimizer = build_optimizer(model, NORMUON)
    set_gradients(model.parameters(), 0)
    optimizer.step()
    state = optimizer.state[model[0].weight]
    assert set(state) == {"momentum_buffer", "row_second_moment", "step"}
    assert (state["row_second_moment"].shape, state["row_second_moment"].dtype) == ((shape[0],), torch.float32)


@pytest.mark.promise("normuon-rows")
def test_one_value_per_output_row_of_every_matrix_in_a_bank() -> None:
    bank = nn.ParameterList([matrix(4, 6, 10)])
    optimizer = build_optimizer(bank, NORMUON)
    set_gradients(bank.parameters(), 0)
    optimizer.step()
    assert optimizer.state[bank[0]]["row_second_moment"].shape == (4 * 6,)


@pytest.mark.promise("normuon-rows")
@pytest.mark.parametrize(("out", "into"), [(24, 40), (40, 24), (8, 8)])
def test_a_weight_stored_in_out_is_stepped_as_its_transpose(out: int, into: int) -> None:
    """The statistics are those of the outputs, wherever they are stored. 1e-5: float32, in the other order of products."""
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D
    stored, reference = conv1d(out, into), linears(matrix(out, into))
    stored.weight.data.copy_(reference[0].weight.T)
    optimizers = [build_optimizer(model, {**NORMUON, "weight_decay": 0.3}) for model in (stored, reference)]
    for step in range(5):
        set_gradients(reference.parameters(), step)
        stored.weight.grad = reference[0].weight.grad.T.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    rows = [
        optimizer.state[w]["row_second_moment"] for optimizer, w in zip(optimizers, weights(stored, reference), strict=True)
    ]
    assert rows[0].shape == (out,)
    assert relative_error(rows[0], rows[1]) < 1e-5
    assert relative_error(stored.weight.T - matrix(out, into), reference[0].weight.detach() - matrix(out, into)) < 1e-5


def weights(*models: nn.Module) -> list[nn.Parameter]:
    return [next(model.parameters()) for model in models]


def test_an_idle_matrix_keeps_its_weight_and_its_row_statistic() -> None:
    """One zero gradient is no evidence of small rows."""
    model = linears(matrix(8, 12), matrix(8, 12, seed=1))
    optimizer = build_optimizer(model, {**NORMUON, "weight_decay": 0.3})
    set_gradients(model.parameters(), 0)
    optimizer.step()
    kept = [(layer.weight.detach().clone(), optimizer.state[layer.weight]["row_second_moment"].clone()) for layer in model]
    set_gradients(model.parameters(), 1)
    model[0].weight.grad.zero_()
    optimizer.step()
    same = [
        (torch.equal(layer.weight, weight), torch.equal(optimizer.state[layer.weight]["row_second_moment"], rows))
        for layer, (weight, rows) in zip(model, kept, strict=True)
    ]
    assert same == [(True, True), (False, False)]


def batch(matrices: Tensor, active: Tensor, rows: Tensor) -> Batch:
    return Batch(matrices, active, statistics={"row_second_moment": rows})


def test_an_idle_matrix_does_not_dilute_its_neighbours_in_the_batch() -> None:
    """1e-6: the same products in a batch of another size."""
    rule = NorMuon(True, Orthogonalization(dtype=torch.float32))
    given = matrix(3, 8, 12)
    given[1] = 0
    rows = torch.zeros(3, 8)
    together = rule.update(batch(given.clone(), torch.tensor([1.0, 0.0, 1.0]), rows), {})
    assert together.isfinite().all()
    for index in (0, 2):
        own_rows = torch.zeros(1, 8)
        (alone,) = rule.update(batch(given[index : index + 1], torch.ones(1), own_rows), {})
        assert relative_error(together[index], alone) < 1e-6
        assert relative_error(rows[index], own_rows[0]) < 1e-6


@pytest.mark.promise("muon-scale")
@pytest.mark.parametrize("scale", ["shape", "match_rms_adamw", "spectral", "none"])
def test_the_scale_is_that_of_muon(scale: Any) -> None:
    """1e-5: float32."""
    given = matrix(1, 12, 3)
    updates = [
        NorMuon(True, Orthogonalization(dtype=torch.float32, scale=s)).update(
            batch(given, torch.ones(1), torch.zeros(1, 12)), {}
        )
        for s in (scale, "none")
    ]
    factor = {"shape": 2.0, "match_rms_adamw": 0.2 * 12**0.5, "spectral": 2.0, "none": 1.0}[scale]
    assert relative_error(updates[0], factor * updates[1]) < 1e-5


@pytest.mark.parametrize(("state_dtype", "nbytes"), [("float32", 4.007), ("bfloat16", 2.007), ("8bit", 1.022)])
def test_bytes_of_state_per_parameter(state_dtype: str, nbytes: float) -> None:
    """checklist 19, 49; as muon, and 4 bytes for each row of about 600 elements. 0.001: the step counters."""
    if state_dtype == "8bit":
        pytest.importorskip("bitsandbytes")
    config = {"name": "normuon", "state_dtype": state_dtype}
    assert bytes_per_parameter(config) == pytest.approx(nbytes, abs=1e-3)
