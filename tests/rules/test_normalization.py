"""Rows or columns of one size before Newton-Schulz (MuonEq) or after it (Muon+): formulas in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ds_optforge import ConfigError, build_optimizer
from ds_optforge.rules.base import Batch
from ds_optforge.rules.muon import Muon, Orthogonalization
from ds_optforge.rules.normalization import By, Normalization, When
from tests import oracles
from tests.layers import linears, matrix, set_gradients
from tests.oracles import EXACT, newton_schulz, relative_error

SHAPES = [(40, 40), (24, 96), (96, 24), (33, 7)]
EVERY = [(by, when) for by in ("rows", "columns") for when in ("before", "after")]


class Formula(oracles.Muon):
    """One (out, in) weight in float64."""

    def __init__(self, weight: Tensor, by: By, when: When, **settings: float) -> None:
        super().__init__(weight, **settings)
        self.dim, self.when = (1 if by == "rows" else 0), when

    def update(self, direction: Tensor) -> Tensor:
        rows, cols = direction.shape
        if self.when == "before":
            return super().update(direction / direction.norm(dim=self.dim, keepdim=True))
        orthogonal = newton_schulz(direction)
        unit = orthogonal / ((orthogonal**2).sum(self.dim, keepdim=True) + 1e-7) ** 0.5
        as_large_as_orthogonal = (min(rows, cols) / (rows if self.dim else cols)) ** 0.5
        return max(1, rows / cols) ** 0.5 * as_large_as_orthogonal * unit


@pytest.mark.promise("muon-family-formulas")
@pytest.mark.parametrize(("by", "when"), EVERY)
@pytest.mark.parametrize("shape", SHAPES)
def test_ten_steps_follow_the_formula(shape: tuple[int, int], by: By, when: When) -> None:
    """1e-5: float32, beside updates that are a fifth of the weight."""
    weight = 0.1 * matrix(*shape)
    model, reference = linears(weight), Formula(weight, by, when, lr=0.02, weight_decay=0.3)
    config = {"name": "muon", "lr": 0.02, "weight_decay": 0.3, "normalize": {"by": by, "when": when}, **EXACT}
    optimizer = build_optimizer(model, config)
    for step in range(10):
        set_gradients(model.parameters(), step)
        reference.step(model[0].weight.grad)
        optimizer.step()
    assert relative_error(model[0].weight, reference.weight) < 1e-5


@pytest.mark.parametrize(("by", "when"), EVERY)
@pytest.mark.parametrize(("out", "into"), [(24, 40), (40, 24), (8, 8)])
def test_rows_are_those_of_the_outputs_of_a_weight_stored_in_out(out: int, into: int, by: By, when: When) -> None:
    """1e-5: float32, in the other order of products."""
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D
    stored, reference = conv1d(out, into), Formula(matrix(out, into), by, when, lr=0.02)
    stored.weight.data.copy_(matrix(out, into).T)
    optimizer = build_optimizer(stored, {"name": "muon", "lr": 0.02, "normalize": {"by": by, "when": when}, **EXACT})
    for step in range(5):
        gradient = matrix(out, into, seed=step + 1)
        stored.weight.grad = gradient.T.contiguous()
        reference.step(gradient)
        optimizer.step()
    assert relative_error(stored.weight.T, reference.weight) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", ["shape", "match_rms_adamw", "spectral", "none"])
@pytest.mark.parametrize("by", ["rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES)
def test_after_it_the_update_has_the_size_that_telemetry_expects(
    shape: tuple[int, int], by: By, scale: Any, dtype: torch.dtype
) -> None:
    """That of an exactly orthogonal matrix, in rows or columns of one size. 1e-5: eps; 2%: two roundings in bfloat16."""
    rule = Muon(True, Orthogonalization(dtype=torch.float32, scale=scale), normalization=Normalization(by, "after"))
    update = rule.update(Batch(matrix(1, *shape, dtype=dtype), torch.ones(1, dtype=dtype)), {})[0].double()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert update.square().mean().sqrt() == pytest.approx(rule.rms(*shape, transposed=False), rel=tolerance)
    norms = update.norm(dim=1 if by == "rows" else 0)
    assert norms.max() / norms.min() - 1 < tolerance
    assert rule.healthy(*shape).largest == 1.0


@pytest.mark.parametrize(("by", "when"), EVERY)
def test_what_has_no_gradient_stays_finite(by: By, when: When) -> None:
    """A row of zeros and a column of zeros; and an idle matrix beside it, whose momentum has not faded."""
    given = matrix(2, 6, 4)
    given[0, 2], given[0, :, 1] = 0, 0
    rule = Muon(True, Orthogonalization(dtype=torch.float32), normalization=Normalization(by, when))
    found = rule.update(Batch(given, torch.tensor([1.0, 0.0])), {})
    assert found.isfinite().all()
    assert not found[0, 2].any()
    assert not found[0, :, 1].any()
    assert not found[1].any()


@pytest.mark.parametrize("name", ["muon_squared", "normuon"])
def test_equal_rows_before_it_are_orthogonalized_by_other_rules_too(name: str) -> None:
    """The size of a row of gradients does not matter then. 1e-5: float32."""
    after = []
    for rows in (torch.ones(24, 1), torch.logspace(-2, 2, 24).view(-1, 1)):
        model = linears(torch.zeros(24, 40))
        config = {"name": name, "lr": 0.02, "normalize": {"by": "rows", "when": "before"}, **EXACT}
        optimizer = build_optimizer(model, config)
        for step in range(3):
            model[0].weight.grad = rows * matrix(24, 40, seed=step)
            optimizer.step()
        after.append(model[0].weight.detach())
    assert relative_error(after[1], after[0]) < 1e-5


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"name": "normuon", "normalize": {"by": "rows", "when": "after"}},
            r"normalize\.when: got 'after', where normuon normalises rows by itself; allowed: 'before'",
        ),
        ({"name": "adamw", "normalize": {"by": "rows", "when": "after"}}, r"'adamw' does not read it \(read by muon, "),
        ({"name": "muon", "normalize": {"by": "rows"}}, r"normalize\.when: missing"),
        ({"name": "muon", "normalize": {"by": "heads", "when": "after"}}, r"normalize\.by: got 'heads'"),
    ],
)
def test_what_has_no_meaning_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(linears(matrix(8, 8)), params)
