"""Muon's math alone, on lists of tensors."""

import math
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ds_optforge.orthogonalize import COEFFICIENT_SETS
from ds_optforge.rules import rule_settings
from ds_optforge.rules.aurora import Aurora
from ds_optforge.rules.base import Batch, ElementwiseRule, Hyperparameters, MatrixRule, works_in_teams
from ds_optforge.rules.muon import Muon, MuonSettings, Orthogonalization, Scale
from ds_optforge.rules.muon_squared import MuonSquared
from ds_optforge.rules.normalization import Normalization
from ds_optforge.rules.normuon import NorMuon
from tests.layers import bytes_per_parameter
from tests.oracles import newton_schulz

GROUP = {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.9}
ACTIVE, IDLE = torch.ones(1), torch.zeros(1)


def rule(nesterov: bool = True, **orthogonalization: Any) -> Muon:
    return Muon(nesterov, Orthogonalization(**{"dtype": torch.float64, **orthogonalization}))


def matrices(count: int, rows: int, cols: int) -> Tensor:
    return torch.randn(count, rows, cols, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


SCALES = {
    "shape": {(12, 3): 2.0, (3, 12): 1.0, (5, 5): 1.0},  # sqrt(max(1, out / in))
    "match_rms_adamw": {(12, 3): 0.2 * math.sqrt(12), (3, 12): 0.2 * math.sqrt(12), (5, 5): 0.2 * math.sqrt(5)},
    "spectral": {(12, 3): 2.0, (3, 12): 0.5, (5, 5): 1.0},  # sqrt(out / in)
    "none": {(12, 3): 1.0, (3, 12): 1.0, (5, 5): 1.0},
}


def test_the_scales_below_are_all_there_are() -> None:
    assert set(SCALES) == set(get_args(Scale))


@pytest.mark.promise("muon-scale")
@pytest.mark.parametrize(("rows", "cols"), [(12, 3), (3, 12), (5, 5)])
@pytest.mark.parametrize("scale", SCALES)
def test_the_update_is_the_orthogonal_factor_times_the_scale(scale: str, rows: int, cols: int) -> None:
    """1e-6: the scale is a float32 number."""
    given = matrices(2, rows, cols)
    found = rule(scale=scale).update(Batch(given.clone(), torch.ones(2)), {})
    expected = torch.stack([newton_schulz(one) for one in given]) * SCALES[scale][rows, cols]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_size_of_match_rms_adamw_can_be_set() -> None:
    """An orthogonal 12 by 3 matrix has the root mean square 1 / sqrt(12)."""
    assert rule(scale="match_rms_adamw", rms=0.7).rms(12, 3, transposed=False) == pytest.approx(0.7)
    settings = MuonSettings(orthogonalization={"scale": "match_rms_adamw", "rms": 0.7})
    assert settings.build().rms(3, 12, transposed=False) == pytest.approx(0.7)


@pytest.mark.parametrize(("rows", "cols"), [(12, 3), (3, 12), (5, 5)])
@pytest.mark.parametrize("scale", SCALES)
def test_a_weight_that_is_stored_in_out_has_the_scale_of_its_transpose(scale: str, rows: int, cols: int) -> None:
    given = matrices(2, cols, rows)
    found = rule(scale=scale).update(Batch(given.clone(), torch.ones(2), transposed=True), {})
    expected = torch.stack([newton_schulz(one) for one in given]) * SCALES[scale][rows, cols]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_an_update_in_bfloat16_has_the_dtype_of_the_wire() -> None:
    """The scale is applied after the cast: 0.2 sqrt(2048) in bfloat16 products would be off by 0.4%."""
    given = matrices(1, 12, 3).float()
    plain = rule(dtype=torch.bfloat16, scale="none").update(Batch(given, ACTIVE), {})
    scaled = rule(dtype=torch.bfloat16, scale="match_rms_adamw").update(Batch(given, ACTIVE), {})
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, plain * 0.2 * math.sqrt(12), rtol=1e-6, atol=0)


def test_only_active_matrices_have_an_update() -> None:
    found = rule().update(Batch(matrices(3, 4, 6), torch.tensor([1.0, 0.0, 1.0])), {})
    assert [one.any().item() for one in found] == [True, False, True]


@pytest.mark.promise("muon-settings", "muon-defaults")
@pytest.mark.parametrize("nesterov", [True, False])
def test_the_direction_is_a_moving_average_with_nesterov_or_without(nesterov: bool) -> None:
    gradient, average = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 5.0])
    state = {"momentum_buffer": [average.clone()]}
    (found,) = rule(nesterov).direction([gradient], [], state, {}, GROUP)
    moved = 0.9 * average + 0.1 * gradient
    torch.testing.assert_close(state["momentum_buffer"][0], moved)
    torch.testing.assert_close(found, 0.1 * gradient + 0.9 * moved if nesterov else moved)


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_direction_leaves_gradients_unchanged(nesterov: bool) -> None:
    gradient = torch.tensor([1.0, -2.0])
    rule(nesterov).direction([gradient], [], {"momentum_buffer": [torch.ones(2)]}, {}, GROUP)
    assert torch.equal(gradient, torch.tensor([1.0, -2.0]))


def test_a_step_goes_against_the_update_times_the_learning_rate() -> None:
    weight = torch.tensor([1.0, 2.0])
    rule().apply([weight], [torch.tensor([1.0, -1.0])], ACTIVE, {}, {}, GROUP)
    torch.testing.assert_close(weight, torch.tensor([0.9, 2.1]))


def test_decay_is_decoupled_and_times_the_learning_rate() -> None:
    weight = torch.tensor([1.0, 2.0])
    rule().apply([weight], [torch.zeros(2)], ACTIVE, {}, {}, {**GROUP, "weight_decay": 0.5})
    torch.testing.assert_close(weight, torch.tensor([0.95, 1.9]))


def test_only_active_parameters_decay() -> None:
    weights = [torch.ones(2), torch.ones(3)]
    rule().apply(weights, [torch.zeros(2), torch.zeros(3)], torch.cat([IDLE, ACTIVE]), {}, {}, {**GROUP, "weight_decay": 0.5})
    assert torch.equal(weights[0], torch.ones(2))
    torch.testing.assert_close(weights[1], torch.full((3,), 0.95))


def test_decay_of_a_bfloat16_weight_is_rounded_once() -> None:
    """As torch.optim.Muon does it; 1 - lr wd itself has no exact bfloat16, only multiples of 1/256 below 1."""
    weight = torch.arange(1, 200, dtype=torch.bfloat16)
    expected = weight.clone().mul_(1 - 0.02 * 0.1)
    rule().apply([weight], [torch.zeros_like(weight)], ACTIVE, {}, {}, {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9})
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("name", COEFFICIENT_SETS)
def test_its_cost_is_that_of_its_own_steps(name: str) -> None:
    steps = len(COEFFICIENT_SETS[name].triples)
    assert rule(coefficients=name, method="standard").cost(8, 24) == steps * (4 * 8 * 8 * 24 + 2 * 8**3)


@pytest.mark.parametrize("name", ["quintic", "polar_express"])
def test_its_cost_is_that_of_the_form_that_auto_takes(name: str) -> None:
    """Owners are chosen by it."""
    given = matrices(1, 8, 24).bfloat16()
    chosen = rule(coefficients=name, dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        chosen.update(Batch(given, ACTIVE), {})
    assert chosen.cost(8, 24) == counter.get_total_flops()


@pytest.mark.parametrize(("name", "steps"), [("polar_express", 5), ("cans", 5), ("quintic", 8), ("quintic", 5)])
def test_its_cost_on_an_accelerator_is_that_of_the_products_there(name: str, steps: int) -> None:
    """The Gram form is accurate with every set in float16, which the plan must know of: owners are chosen by it."""
    chosen = rule(coefficients=name, steps=steps, dtype=torch.bfloat16)
    given = torch.empty(1, 64, 512, dtype=torch.bfloat16, device="meta")
    with FlopCounterMode(display=False) as counter:
        chosen.update(Batch(given, torch.empty(1, device="meta")), {})
    assert chosen.cost_on("cuda", 64, 512) == counter.get_total_flops()
    assert (chosen.cost_on("cuda", 64, 512) < chosen.cost_on("cpu", 64, 512)) == ((name, steps) != ("quintic", 5))


def test_its_cost_follows_the_configured_steps() -> None:
    assert rule(steps=2, method="standard").cost(8, 24) == 2 * (4 * 8 * 8 * 24 + 2 * 8**3)


@pytest.mark.promise("state-buffers")
def test_it_is_a_matrix_rule_with_one_buffer() -> None:
    assert isinstance(rule(), MatrixRule)
    assert not isinstance(rule(), ElementwiseRule)
    assert [buffer.name for buffer in Muon.buffers] == ["momentum_buffer"]
    assert Muon.scheduled == ("lr", "weight_decay", "momentum")


def test_what_a_team_costs_is_its_share_of_the_products_and_what_it_gathers() -> None:
    """Of 64 x 64 in bfloat16: five Gram matrices, and X after each step but the last."""
    assert rule(dtype=torch.bfloat16).team_cost("cpu", 64, 64, [32, 32]) == (rule().cost(64, 64) // 2, 9, 9 * 64 * 64 * 2)
    assert rule(dtype=torch.float32).team_cost("cpu", 64, 64, [48, 16]) == (rule().cost(64, 64) * 3 // 4, 9, 9 * 64 * 64 * 4)


def test_only_the_class_whose_update_heeds_teams_works_in_them() -> None:
    """NorMuon inherits from Muon, and so does a rule with an `update` of its own; a rule that keeps Muon's is as Muon."""

    class Own(Muon):
        def update(self, batch: Batch, now: Hyperparameters) -> Tensor:
            return -batch.matrices

    class Kept(Muon):
        pass

    arguments = {"nesterov": True, "orthogonalization": Orthogonalization()}
    assert works_in_teams(Muon(**arguments))
    assert works_in_teams(Kept(**arguments))
    assert not works_in_teams(Own(**arguments))
    assert not works_in_teams(NorMuon(**arguments))


@pytest.mark.parametrize("when", ["before", "after"])
def test_rows_that_are_made_equal_in_size_have_one_owner(when: Literal["before", "after"]) -> None:
    """And so has Aurora, which keeps Muon's `update` but balances the whole factor; Muon^2 does nothing to whole matrices."""
    arguments = {"nesterov": True, "orthogonalization": Orthogonalization()}
    assert not works_in_teams(Muon(**arguments, normalization=Normalization("rows", when)))
    assert not works_in_teams(Aurora(**arguments))
    assert works_in_teams(MuonSquared(**arguments))


def test_compiled_products_are_the_same() -> None:
    """1e-5: float32, in which a compiler may fuse what is rounded otherwise."""
    given = matrices(2, 32, 96).float()
    eager, compiled = (Orthogonalization(dtype=torch.float32, compile=compile)(given.clone()) for compile in (False, True))
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)


@pytest.mark.promise("state-buffers", "8bit-size")
@pytest.mark.parametrize(("state_dtype", "nbytes"), [("float32", 4.0), ("bfloat16", 2.0), ("8bit", 1.016)])
def test_bytes_of_state_per_parameter(state_dtype: str, nbytes: float) -> None:
    """One buffer, and 4 bytes of scale for 256 8-bit values. 0.001: the step counters."""
    if state_dtype == "8bit":
        pytest.importorskip("bitsandbytes")
    config = {"name": "muon", "state_dtype": state_dtype}
    assert bytes_per_parameter(config) == pytest.approx(nbytes, abs=1e-3)


def test_updates_are_as_large_as_adamws_with_one_scale_alone() -> None:
    scales = ("shape", "spectral", "match_rms_adamw")
    found = [rule_settings("muon")(orthogonalization={"scale": scale}).matches_adamw for scale in scales]
    assert found == [False, False, True]
