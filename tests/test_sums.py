"""Sums over whole matrices and output rows in plain PyTorch, against float64 sums; distributed in distributed/test_sums.py."""

import sys
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor, nn

from ds_optforge import ConfigError, build_optimizer
from tests import models
from tests.layers import linears, matrix, set_gradients
from tests.rules import summing
from tests.rules.registering import registered
from tests.step_trace import traced

# By sum: what it adds up, of what the rule keeps.
TERMS = {
    "gradient": ("gradient",),
    "weight_square": ("weight", "weight"),
    "weight_rows": ("weight",),
    "product": ("weight", "gradient"),
    "change": ("gradient", "gradient_before"),
    "update_square": ("update", "update"),
    "update_rows": ("update",),
    "update_weight": ("update", "weight"),
    "update_change": ("update", "update_before"),
}


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    with registered(*summing.RULES):
        yield


def assert_given_the_whole(state: Mapping[str, Tensor], shape: tuple[int, int, int, bool]) -> None:
    """Each element of a parameter was given the float64 sum over its matrix or output row, rounded: to one unit of float32.

    And all elements the same bits.
    """
    count, rows, cols, transposed = shape

    def viewed(name: str) -> Tensor:
        return state[name].view(count, rows, cols)

    for item in summing.SUMS:
        terms = viewed(TERMS[item.name][0])
        for other in TERMS[item.name][1:]:
            terms = terms * viewed(other)
        over = (1, 2) if item.per == "matrix" else (1 if transposed else 2)
        expected = terms.double().sum(over, keepdim=True)
        for kind in ("got", *(("later",) if not item.of_update else ())):
            given = viewed(f"{kind}_{item.name}")
            one = given[:, :1, :1] if item.per == "matrix" else given[:, :1] if transposed else given[:, :, :1]
            assert torch.equal(given, one.expand_as(given)), item.name
            torch.testing.assert_close(one.double(), expected, rtol=2**-23, atol=1e-30)
    of_matrix = viewed("got_weight_square")[:, 0, 0]
    of_rows = viewed("got_product")[:, 0, :] if transposed else viewed("got_product")[:, :, 0]
    assert torch.equal(state["kept_weight_square"], of_matrix)
    assert torch.equal(state["kept_product"], of_rows.flatten())


def stepped(model: nn.Module, steps: int = 3, **params: object) -> dict[str, Mapping[str, Tensor]]:
    """The state of each parameter after steps with given gradients."""
    optimizer = build_optimizer(model, {**summing.PARAMS, **params})
    for step in range(steps):
        set_gradients(model.parameters(), step)
        optimizer.step()
    return {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}


def test_normal_and_transposed_matrices_banks_and_filters() -> None:
    state = stepped(summing.Net())
    for name, shape in summing.MATRICES.items():
        assert_given_the_whole({k: v.flatten() for k, v in state[name].items()}, shape)


def test_a_linear_stored_in_out() -> None:
    """transformers' Conv1D; rows are its columns."""
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D
    state = stepped(nn.ModuleDict({"c": conv1d(24, 40)}))["c.weight"]
    assert state["kept_product"].shape == (24,)
    assert_given_the_whole({k: v.flatten() for k, v in state.items()}, (1, 40, 24, True))


def test_the_gradient_is_the_one_that_was_set_and_the_weight_the_one_before_the_step() -> None:
    """Else what the rule keeps could be anything."""
    model = linears(matrix(8, 12))
    state = stepped(model)["0.weight"]
    set_gradients(model.parameters(), 2)
    assert torch.equal(state["gradient"], model[0].weight.grad)
    torch.testing.assert_close(model[0].weight.detach(), state["weight"] - 0.01 * state["update"], rtol=1e-6, atol=1e-7)
    assert torch.equal(state["update"], 2.0 * state["gradient"])


def test_cancelling_terms_are_added_up_in_float64() -> None:
    """1e8 + 1 - 1e8 = 1, which float32 makes 0."""
    model = linears(torch.zeros(2, 3))
    optimizer = build_optimizer(model, summing.PARAMS)
    model[0].weight.grad = torch.tensor([[1e8, 1.0, -1e8], [1e8, 2.0, -1e8]])
    optimizer.step()
    state = optimizer.state[model[0].weight]
    assert torch.equal(state["got_gradient"], torch.full((2, 3), 3.0))
    assert torch.equal(state["got_update_rows"], torch.tensor([[2.0], [4.0]]).expand(2, 3))


def test_an_idle_matrix_keeps_its_values_beside_one_that_moves() -> None:
    model = linears(matrix(8, 12), matrix(8, 12, seed=1))
    optimizer = build_optimizer(model, summing.PARAMS)
    set_gradients(model.parameters(), 0)
    optimizer.step()
    before = optimizer.state[model[0].weight]["kept_weight_square"].clone()
    model[0].weight.data.mul_(2.0)
    set_gradients(model.parameters(), 1)
    model[0].weight.grad.zero_()
    optimizer.step()
    idle, other = (optimizer.state[layer.weight] for layer in model)
    assert torch.equal(idle["kept_weight_square"], before)
    assert [state["steps"].item() for state in (idle, other)] == [1.0, 2.0]


@pytest.mark.parametrize("sharding", [{"mode": "shard_local"}, {"mode": "shard_local", "gather_every": 3}])
def test_shard_local_is_refused_by_name(sharding: dict[str, object]) -> None:
    """A rank that steps its rows alone has no sum over the whole."""
    message = r"^optimizer\.params\.sharding\.mode: got 'shard_local' with 'summing', which needs sums over whole matrices"
    with pytest.raises(ConfigError, match=message):
        build_optimizer(models.build(), {**summing.PARAMS, "sharding": sharding})
    with pytest.raises(ConfigError, match=message):
        build_optimizer(models.build(), {"name": "adamw", "roles": {"matrix": {"name": "summing"}}, "sharding": sharding})
    build_optimizer(models.build(), {**summing.PARAMS, "name": "silent", "sharding": sharding})


def test_a_large_matrix_is_summed_in_parts_that_bound_the_memory() -> None:
    """The same sum, and of what a step holds at a time no more than for half the elements."""
    peaks = {}
    for rows in (1024, 2048):
        model = linears(matrix(rows, 1024))
        optimizer = build_optimizer(model, summing.PARAMS)
        set_gradients(model.parameters(), 0)
        optimizer.step()
        with traced(optimizer, sys.maxsize) as calls:
            optimizer.step()
        peaks[rows] = max(call.peak for call in calls)
        state = {k: v.flatten() for k, v in optimizer.state[model[0].weight].items()}
        assert_given_the_whole(state, (1, rows, 1024, False))
    exchanged = 3 * 4 * 1024 * 1024  # the send buffer, and the update in both places it may lie
    assert peaks[2048] - peaks[1024] < exchanged + 2**20, peaks
