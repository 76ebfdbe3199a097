"""Aurora against its formula (arXiv 2606.27715; tilde-research/aurora-release, src/aurora.py)."""

import pytest
import torch
from torch import Tensor, nn

from ds_optforge import build_optimizer
from ds_optforge.rules.aurora import Aurora
from ds_optforge.rules.base import Batch
from ds_optforge.rules.muon import Muon, Orthogonalization
from tests import oracles
from tests.layers import bytes_per_parameter, linears, matrix, set_gradients, stepped_as_stored_in_out
from tests.oracles import EXACT, newton_schulz, relative_error

AURORA = {"name": "aurora", "lr": 0.02, **EXACT}
SHAPES = [(40, 40), (24, 96), (96, 24), (33, 7)]


def balanced(direction: Tensor) -> Tensor:
    """Of a (m, n) matrix in float64, tall or made so."""
    rows, cols = direction.shape
    if rows == cols:
        return newton_schulz(direction)
    if rows < cols:
        return balanced(direction.T).T
    diagonal = 1 / (direction**2).sum(1, keepdim=True) ** 0.5
    first = newton_schulz(diagonal * direction)
    diagonal = diagonal * ((cols / rows) / (first**2).sum(1, keepdim=True)) ** 0.5
    return newton_schulz(diagonal * direction)


class Formula(oracles.Muon):
    """One (out, in) weight in float64."""

    def update(self, direction: Tensor) -> Tensor:
        rows, cols = direction.shape
        return max(1, rows / cols) ** 0.5 * balanced(direction)


@pytest.mark.promise("choose-by-name", "muon-family-formulas")
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_ten_steps_follow_the_formula(shape: tuple[int, int], nesterov: bool, decay: float) -> None:
    """1e-5: float32, beside updates that are a fifth of the weight."""
    weight = 0.1 * matrix(*shape)
    model, reference = linears(weight), Formula(weight, lr=0.02, weight_decay=decay, nesterov=nesterov)
    optimizer = build_optimizer(model, {**AURORA, "weight_decay": decay, "nesterov": nesterov})
    for step in range(10):
        set_gradients(model.parameters(), step)
        reference.step(model[0].weight.grad)
        optimizer.step()
    assert relative_error(model[0].weight, reference.weight) < 1e-5


@pytest.mark.parametrize(("out", "into"), [(24, 40), (40, 24), (8, 8)])
def test_a_weight_stored_in_out_is_stepped_as_its_transpose(out: int, into: int) -> None:
    """1e-5: float32, in the other order of products."""
    reference = Formula(matrix(out, into), lr=0.02, weight_decay=0.3)
    weight = stepped_as_stored_in_out(reference, {**AURORA, "weight_decay": 0.3}, out, into)
    assert relative_error(weight, reference.weight) < 1e-5


def test_each_matrix_of_a_bank_is_balanced_by_itself() -> None:
    """1e-5: float32."""
    bank = nn.ParameterList([matrix(3, 16, 6)])
    references = [Formula(one, lr=0.02) for one in bank[0]]
    optimizer = build_optimizer(bank, AURORA)
    for step in range(5):
        set_gradients(bank.parameters(), step)
        for reference, gradient in zip(references, bank[0].grad, strict=True):
            reference.step(gradient)
        optimizer.step()
    assert relative_error(bank[0], torch.stack([reference.weight for reference in references])) < 1e-5


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
def test_the_longer_sides_rows_are_closer_to_one_size_than_muons(shape: tuple[int, int]) -> None:
    """Exactly orthogonalized; a momentum in which some of them are 1,000 times larger than others."""
    sizes = torch.logspace(-2, 1, 64)
    given = matrix(1, *shape) * (sizes.view(-1, 1) if shape[0] > shape[1] else sizes)
    along = 1 if shape[0] > shape[1] else 0
    spread = {}
    for rule in (Muon, Aurora):
        made = rule(True, Orthogonalization("deepseek_v4", dtype=torch.float32))
        norms = made.orthogonal(Batch(given.clone(), torch.ones(1)))[0].norm(dim=along)
        spread[rule] = norms.max() / norms.min()
    assert spread[Muon] > 10
    assert spread[Aurora] < 1.5


def test_a_row_without_a_gradient_stays_finite() -> None:
    """And an idle matrix whose momentum is zero."""
    given = matrix(2, 12, 4)
    given[0, 2], given[1] = 0, 0
    found = Aurora(True, Orthogonalization(dtype=torch.float32)).update(Batch(given, torch.tensor([1.0, 0.0])), {})
    assert found.isfinite().all()
    assert found[0, :2].all()
    assert not found[0, 2].any()
    assert not found[1].any()


def test_the_cost_is_two_runs_but_for_a_square() -> None:
    """So that owners are balanced by what they do."""
    made, muon = (rule(True, Orthogonalization()) for rule in (Aurora, Muon))
    costs = [made.cost(*shape) / muon.cost(*shape) for shape in ((40, 40), (24, 96), (96, 24))]
    assert costs == [1, 2, 2]
    assert made.cost_on("cuda", 24, 96) == 2 * muon.cost_on("cuda", 24, 96)


def test_bytes_of_state_are_muons() -> None:
    """0.001: the step counters."""
    assert bytes_per_parameter({"name": "aurora"}) == pytest.approx(4.0, abs=1e-3)
