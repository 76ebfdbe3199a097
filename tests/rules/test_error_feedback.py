"""``sharding.rows``: error feedback against its formula (arXiv 2608.11612), and what is refused with it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_optforge import ConfigError, build_optimizer
from ds_optforge.rules.base import Choice
from tests.layers import linears, matrix, set_gradients
from tests.oracles import EXACT, RowMuon, relative_error

SHAPES = [(40, 40), (24, 96), (96, 24), (33, 7)]


def params(rows: float | None, name: str = "muon", **settings: Any) -> dict[str, Any]:
    sharding = {"wire_dtype": "float32", "rows": rows}
    return {"name": name, "lr": 0.02, "nesterov": False, **EXACT, "sharding": sharding, **settings}


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(("share", "of_40"), [(0.5, 20), (0.25, 10), (0.01, 1)])
@pytest.mark.parametrize("name", ["muon", "normuon"])
@pytest.mark.parametrize("shape", SHAPES)
def test_twenty_steps_follow_the_formula(shape: tuple[int, int], name: str, share: float, of_40: int, decay: float) -> None:
    """1e-4 of the change, as for Muon: float32's rounding, magnified by Newton-Schulz's steep start."""
    weight = 0.1 * matrix(*shape)
    model = linears(weight)
    beta2 = 0.95 if name == "normuon" else None
    count = {40: of_40, 24: {20: 12, 10: 6, 1: 1}[of_40], 96: {20: 48, 10: 24, 1: 1}[of_40], 33: {20: 17, 10: 9, 1: 1}[of_40]}
    reference = RowMuon(weight, 0.02, count[shape[0]], weight_decay=decay, beta2=beta2)
    optimizer = build_optimizer(model, params(share, name, weight_decay=decay))
    for step in range(20):
        set_gradients(model.parameters(), step)
        reference.step(model[0].weight.grad)
        optimizer.step()
    assert relative_error(model[0].weight - weight, reference.weight - weight.double()) < 1e-4
    state = optimizer.state[model[0].weight]
    assert relative_error(state["accumulated_gradient"].view(shape), reference.buffer) < 1e-5
    if name == "normuon":
        assert relative_error(state["row_second_moment"], reference.second) < 1e-4
