"""SOAP-Muon against its formula (nikhilvyas.github.io/SOAP_Muon.pdf), as modded-nanogpt's record 44 has it, in float64.

records/track_3_optimization/results/20260609_soap_f1_auxb2_clean. Gradients here have singular values between 1 and 2, a tenth
apart: float32 tells their vectors, and a step amplifies no rounding. Where they have no full rank, eps is larger than rounding.
"""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_optforge import ConfigError, build_optimizer
from ds_optforge.rules.soap_muon import SoapMuonSettings
from tests import oracles
from tests.layers import linears, matrix, set_gradients
from tests.oracles import EXACT, relative_error

SOAP = {"name": "soap_muon", "lr": 0.02, **EXACT}
SHAPES = [(8, 8), (8, 14), (20, 8)]


class Formula(oracles.Muon):
    """One (out, in) weight; A, B: the bases, None before a first gradient; ``late`` ones begin with the identity."""

    def __init__(
        self, weight: Tensor, beta2: float = 0.9, eps: float = 1e-8, every: int = 1, late: bool = False, **settings: Any
    ):
        super().__init__(weight, **settings)
        rows, cols = weight.shape
        self.beta2, self.eps, self.every, self.late, self.steps = beta2, eps, every, late, 0
        self.left, self.right = torch.zeros(rows, rows).double(), torch.zeros(cols, cols).double()
        self.second, self.bases = torch.zeros(rows, cols).double(), None

    def step(self, gradient: Tensor) -> None:
        self.steps += 1
        if not gradient.any():
            return
        super().step(gradient)
        g = gradient.double()
        self.left = self.beta2 * self.left + (1 - self.beta2) * g @ g.T
        self.right = self.beta2 * self.right + (1 - self.beta2) * g.T @ g
        if self.bases is None and not self.late:
            self.bases = [torch.linalg.eigh(factor)[1].flip(1) for factor in (self.left, self.right)]
        elif (self.steps - 1) % self.every == 0:
            if self.bases is None:
                self.bases = [torch.eye(len(factor)).double() for factor in (self.left, self.right)]
            self.turn()

    def update(self, direction: Tensor) -> Tensor:
        if self.bases is None:
            return super().update(direction)
        a, b = self.bases
        projected = a.T @ direction @ b
        self.second = self.beta2 * self.second + (1 - self.beta2) * projected**2
        return super().update(a @ (projected / self.second.sqrt().clamp(min=self.eps)) @ b.T)

    def turn(self) -> None:
        orders = []
        for index, factor in enumerate((self.left, self.right)):
            basis = self.bases[index]
            order = (basis.T @ factor @ basis).diagonal().argsort(descending=True)
            self.bases[index] = torch.linalg.qr(factor @ basis[:, order])[0]
            orders.append(order)
        self.second = self.second[orders[0]][:, orders[1]]


def spaced(rows: int, cols: int, step: int, seed: int = 0) -> Tensor:
    """A gradient of given row and column spaces: singular values from 1 to 2 in an order of its own, vectors a bit turned."""
    rank = min(rows, cols)
    left, right = (torch.linalg.qr(matrix(size, rank, seed=seed + 77))[0] for size in (rows, cols))
    core = torch.diag(torch.linspace(2.0, 1.0, rank).roll(step // 3)) + 0.1 * matrix(rank, rank, seed=seed + step)
    return left @ core @ right.T


@pytest.mark.promise("choose-by-name", "soap-muon-formula")
@pytest.mark.parametrize(
    ("nesterov", "beta2", "every", "decay"), [(True, 0.9, 1, 0.0), (False, 0.5, 1, 0.3), (True, 0.8, 3, 0.3)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_ten_steps_follow_the_formula(shape: tuple[int, int], nesterov: bool, beta2: float, every: int, decay: float) -> None:
    """1e-5: float32, beside updates that are as large as the weight. The order of columns changes twice."""
    settings = {
        "beta2": beta2,
        "every": every,
        "weight_decay": decay,
        "nesterov": nesterov,
        "eps": 1e-8 if shape == (8, 8) else 0.05,
    }
    model, reference = linears(0.1 * matrix(*shape)), Formula(0.1 * matrix(*shape), lr=0.02, momentum=0.9, **settings)
    optimizer = build_optimizer(model, {**SOAP, "momentum": 0.9, **settings})
    for step in range(10):
        model[0].weight.grad = spaced(*shape, step)
        reference.step(model[0].weight.grad)
        optimizer.step()
    assert relative_error(model[0].weight, reference.weight) < 1e-5
    state = optimizer.state[model[0].weight]
    assert relative_error(state["row_covariance"], reference.left.flatten()) < 1e-6
    assert relative_error(state["momentum"], reference.buffer.flatten()) < 1e-6


def test_it_is_no_muon() -> None:
    """So that the test above can fail: from the second step on."""
    weights = []
    for name in ("soap_muon", "muon"):
        model = linears(0.1 * matrix(8, 14))
        optimizer = build_optimizer(model, {**SOAP, "name": name})
        for step in range(2):
            model[0].weight.grad = spaced(8, 14, step)
            optimizer.step()
            weights.append(model[0].weight.detach().clone())
    assert torch.equal(weights[0], weights[2])
    assert relative_error(weights[1], weights[3]) > 0.01


@pytest.mark.parametrize("every", [1, 2])
def test_a_matrix_whose_first_gradient_comes_later_begins_with_the_identity(every: int) -> None:
    """1e-5: float32. Its gradient is nearly diagonal there: the other orthogonal bases are far."""
    bank, reference = nn.ParameterList([matrix(2, 8, 8)]), Formula(matrix(2, 8, 8)[1], lr=0.02, every=every, late=True)
    optimizer = build_optimizer(bank, {**SOAP, "every": every})
    for step in range(8):
        bank[0].grad = torch.stack([spaced(8, 8, step, seed) for seed in (0, 5)])
        if step < 2:
            bank[0].grad[1] = 0.0
        reference.step(bank[0].grad[1])
        optimizer.step()
    assert relative_error(bank[0][1], reference.weight) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_stored_in_out_is_stepped_as_its_transpose(shape: tuple[int, int]) -> None:
    """1e-5: float32, in the other order of products."""
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D
    stored, reference = conv1d(*shape), Formula(matrix(*shape), eps=0.05, lr=0.02)
    stored.weight.data.copy_(matrix(*shape).T)
    optimizer = build_optimizer(stored, {**SOAP, "eps": 0.05})
    for step in range(5):
        stored.weight.grad = spaced(*shape, step).T.contiguous()
        reference.step(spaced(*shape, step))
        optimizer.step()
    assert relative_error(stored.weight.T, reference.weight) < 1e-5


@pytest.mark.parametrize("split", [[8, 12], [10, 10]])
def test_the_matrices_of_a_fused_weight_have_factors_of_their_own(split: list[int]) -> None:
    """1e-5: float32."""
    fused, parts = linears(matrix(20, 14)), linears(*matrix(20, 14).split(split))
    optimizers = (
        build_optimizer(fused, {**SOAP, "overrides": [{"match": "weight", "split": split}]}),
        build_optimizer(parts, SOAP),
    )
    for step in range(4):
        for seed, part in enumerate(parts):
            part.weight.grad = spaced(*part.weight.shape, step, seed)
        fused[0].weight.grad = torch.cat([part.weight.grad for part in parts])
        for optimizer in optimizers:
            optimizer.step()
    assert relative_error(fused[0].weight, torch.cat([part.weight.detach() for part in parts])) < 1e-5
    state = optimizers[0].state[fused[0].weight]
    assert state["row_basis"].numel() == split[0] ** 2 + split[1] ** 2
    assert state["col_basis"].numel() == 2 * 14**2


def test_bases_stay_orthogonal_and_a_matrix_without_a_gradient_keeps_everything() -> None:
    bank = nn.ParameterList([matrix(2, 12, 9)])
    optimizer = build_optimizer(bank, SOAP)
    for step in range(30):
        bank[0].grad = matrix(2, 12, 9, seed=step)
        optimizer.step()
    kept = {name: value.clone() for name, value in optimizer.state[bank[0]].items()}
    for name, size in (("row_basis", 12), ("col_basis", 9)):
        bases = kept[name].view(2, size, size)
        assert (bases.mT @ bases - torch.eye(size)).abs().max() < 1e-5
    bank[0].grad[0] = 0.0
    optimizer.step()
    for name, value in optimizer.state[bank[0]].items():
        if name != "step":
            assert torch.equal(value.chunk(2)[0], kept[name].chunk(2)[0]), name
            assert not torch.equal(value.chunk(2)[1], kept[name].chunk(2)[1]), name


def test_the_momentum_warms_up() -> None:
    """From 0.5 in the first step to 0.9 after two: 0.5, then 0.7 of it and 0.3, then 0.9 and 0.1. 1e-6: float32."""
    model = linears(matrix(8, 14))
    optimizer = build_optimizer(model, {**SOAP, "momentum": 0.9, "momentum_warmup": {"from": 0.5, "steps": 2}})
    for step in range(3):
        model[0].weight.grad = spaced(8, 14, step)
        optimizer.step()
    first, second, third = (spaced(8, 14, step) for step in range(3))
    expected = 0.9 * (0.7 * 0.5 * first + 0.3 * second) + 0.1 * third
    assert relative_error(optimizer.state[model[0].weight]["momentum"], expected.flatten()) < 1e-6


@pytest.mark.parametrize(("every", "bases"), [(1, 14 * (40**3 + 24**3) // 3), (5, 14 * (40**3 + 24**3) // 15)])
def test_the_plan_counts_products_and_decompositions(every: int, bases: int) -> None:
    """Two products for covariances, four with bases, of 2 x 40 x 24 x 40 or 24 FLOPs; L A and a QR of 8/3 n^3 for each side."""
    rule = SoapMuonSettings(every=every).build()
    muon = rule.orthogonalization.flops(40, 24)
    assert rule.cost(40, 24) == muon + 3 * 2 * 40 * 24 * (40 + 24) + bases


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"state_dtype": "bfloat16"}, "state_dtype: got 'bfloat16' (str); allowed: 'float32'"),
        ({"sharding": {"mode": "shard_local"}}, "sharding.mode: got 'shard_local' with 'soap_muon', which keeps factors"),
        ({"every": 0}, "every: got 0"),
    ],
)
def test_what_it_refuses(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_optimizer(linears(matrix(8, 12)), {"name": "soap_muon", **params})


@pytest.mark.parametrize("split", [[12, 8], [4, 4, 12]])
def test_state_of_another_split_is_refused_before_a_step(split: list[int]) -> None:
    """As many elements in the first one; of other matrices."""
    optimizers = []
    for cut in ([8, 12], split):
        model = linears(matrix(20, 14))
        overrides = [{"match": "weight", "split": cut}]
        optimizers.append(build_optimizer(model, {**SOAP, "overrides": overrides}))
        model[0].weight.grad = matrix(20, 14, seed=1)
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    with pytest.raises(ConfigError, match=r"^0\.weight and others .* allowed: the same split and heads"):
        optimizers[1].step()


def test_the_other_parameters_may_have_compact_state() -> None:
    model = nn.Linear(12, 8)
    optimizer = build_optimizer(model, {"name": "soap_muon", "adamw": {"state_dtype": "bfloat16", "betas": [0.9, 0.95]}})
    set_gradients(model.parameters(), 0)
    optimizer.step()
    assert optimizer.state[model.bias]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[model.weight]["momentum"].dtype == torch.float32
