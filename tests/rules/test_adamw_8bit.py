"""adamw_8bit against `bitsandbytes.optim.AdamW8bit`: blocks of 256 values in both."""

import pytest
import torch

from ds_optforge import build_optimizer
from tests import models
from tests.layers import bytes_per_parameter, linears, matrix, set_gradients
from tests.oracles import relative_error

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.promise("adamw-8bit")
@pytest.mark.parametrize("shape", [(64, 128), (65, 131), (256, 256)], ids=["whole blocks", "a short block", "square"])
def test_twenty_steps_are_bitsandbytes(shape: tuple[int, int]) -> None:
    """The codes agree but for a few in a thousand: a float32 value on the edge between two codes may round either way, since
    the products are taken in another order. The change of the weights agrees to 1e-3 for the same reason: such a code is
    off by 1%, of one element in one step. (float32 state is 5% away: see the next test.)
    """
    weight = 0.1 * matrix(*shape)
    ours, reference = linears(weight), linears(weight)
    optimizer, theirs = (
        build_optimizer(ours, {"name": "adamw_8bit", **SETTINGS}),
        bnb.optim.AdamW8bit(reference.parameters(), **SETTINGS),
    )
    for step in range(20):
        set_gradients(ours.parameters(), step)
        set_gradients(reference.parameters(), step)
        optimizer.step()
        theirs.step()
    assert relative_error(ours[0].weight - weight, reference[0].weight.detach() - weight) < 1e-3
    state, expected = optimizer.state[ours[0].weight], theirs.state[reference[0].weight]
    for name, their_name in (("exp_avg", "1"), ("exp_avg_sq", "2")):
        codes, their_codes = state[name].flatten().int(), expected[f"state{their_name}"].flatten().int()
        assert (codes != their_codes).float().mean() < 3e-3
        assert (codes - their_codes).abs().max() <= 1
        assert relative_error(state[f"{name}_absmax"], expected[f"absmax{their_name}"]) < 1e-5


def test_the_agreement_is_that_of_the_format() -> None:
    """float32 state is far from 8-bit state on the scale of the tolerance above."""
    weight = 0.1 * matrix(64, 128)
    changes = []
    for name in ("adamw_8bit", "adamw"):
        model = linears(weight)
        optimizer = build_optimizer(model, {"name": name, **SETTINGS})
        for step in range(20):
            set_gradients(model.parameters(), step)
            optimizer.step()
        changes.append(model[0].weight.detach() - weight)
    assert 0.01 < relative_error(changes[0], changes[1]) < 0.2


@pytest.mark.promise("choose-by-name", "adamw-8bit")
def test_it_is_adamw_with_8_bit_state() -> None:
    """The name is an alias."""
    weights = []
    for config in ({"name": "adamw_8bit", **SETTINGS}, {"name": "adamw", "state_dtype": "8bit", **SETTINGS}):
        model = linears(matrix(64, 128))
        optimizer = build_optimizer(model, config)
        for step in range(3):
            set_gradients(model.parameters(), step)
            optimizer.step()
        weights.append(model[0].weight.detach())
    assert torch.equal(*weights)


@pytest.mark.promise("8bit-loss")
def test_the_loss_tracks_float32() -> None:
    """They differ by 1% at most after 60 steps."""
    losses: dict[str, list[float]] = {"adamw": [], "adamw_8bit": []}
    for name, found in losses.items():
        model = models.build(depth=1, width=96)  # matrices of more than 4096 elements: smaller ones keep float32
        optimizer = build_optimizer(model, {"name": name, "lr": 1e-3})
        for step in range(60):
            optimizer.zero_grad()
            loss = model(*models.batch(step))
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        kept = {str(state["exp_avg"].dtype) for state in optimizer.state.values()}
        assert kept == ({"torch.float32"} if name == "adamw" else {"torch.float32", "torch.uint8"})
    assert losses["adamw"][-1] < 0.7 * losses["adamw"][0]  # it does train
    assert losses["adamw_8bit"] == pytest.approx(losses["adamw"], rel=0.01)


def test_bytes_of_state_per_parameter() -> None:
    """checklist 19, 49; two buffers, and 4 bytes of scale for 256 values. 0.001: the step counters."""
    assert bytes_per_parameter({"name": "adamw_8bit"}) == pytest.approx(2.031, abs=1e-3)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_another_format_can_be_asked_for(state_dtype: str) -> None:
    weights = []
    for name in ("adamw_8bit", "adamw"):
        model = linears(matrix(64, 128))
        optimizer = build_optimizer(model, {"name": name, "state_dtype": state_dtype, **SETTINGS})
        set_gradients(model.parameters(), 0)
        optimizer.step()
        weights.append(model[0].weight.detach())
        assert optimizer.state[model[0].weight]["exp_avg"].dtype == getattr(torch, state_dtype)
    assert torch.equal(*weights)
