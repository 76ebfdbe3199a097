"""``sharding.rows``: error feedback against its formula (arXiv 2608.11612), and what is refused with it."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ds_optforge import ConfigError, build_optimizer
from ds_optforge.rules.base import Choice, works_in_teams
from ds_optforge.rules.muon import Muon, MuonSettings
from ds_optforge.step.health import PATIENCE
from tests.layers import linears, matrix, set_gradients
from tests.oracles import EXACT, RowMuon, relative_error
from tests.rules.registering import registered
from tests.rules.summing import SummingSettings

SHAPES = [(40, 40), (24, 96), (96, 24), (33, 7)]


def params(rows: float | None, name: str = "muon", **settings: Any) -> dict[str, Any]:
    sharding = {"wire_dtype": "float32", "rows": rows}
    return {"name": name, "lr": 0.02, "nesterov": False, **EXACT, "sharding": sharding, **settings}


@pytest.mark.promise("rows")
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


@pytest.mark.promise("rows")
def test_rows_that_are_left_out_keep_accumulating_until_they_are_chosen() -> None:
    """Gradients of row sums 4, 3, 2, 1: row 1 is passed over once, and then comes before row 0, of which 0.5 is left."""
    model = linears(torch.zeros(4, 4))
    optimizer = build_optimizer(model, params(0.25, momentum=0.5))
    gradient = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    moved = []
    for _ in range(5):
        before = model[0].weight.detach().clone()
        model[0].weight.grad = gradient.clone()
        optimizer.step()
        moved.append((model[0].weight.detach() != before).any(1).nonzero().flatten().tolist())
    # M before each choice: 4 3 2 1; 6 6 4 2 (equal: the first); 7 9 6 3; 11 7.5 8 4; 9.5 10.5 10 5.
    assert moved == [[0], [0], [1], [0], [1]]
    left = optimizer.state[model[0].weight]["accumulated_gradient"].view(4, 4).diag()
    assert left.tolist() == [9.5, 5.25, 10.0, 5.0]


@pytest.mark.parametrize("rows", [None, 1.0, 1])
@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_all_rows_are_the_rule_as_it_was_bit_for_bit(name: str, rows: float | None) -> None:
    """Its Nesterov momentum and its average included."""
    found = []
    for sharding in ({"rows": rows}, {}):
        model = linears(matrix(24, 40), matrix(40, 24))
        optimizer = build_optimizer(model, {"name": name, "lr": 0.02, "sharding": sharding})
        for step in range(3):
            set_gradients(model.parameters(), step)
            optimizer.step()
        assert "momentum_buffer" in optimizer.state[model[0].weight]
        found.append([layer.weight.detach() for layer in model])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def change(parameter: nn.Parameter, model: nn.Module, gradients: list[Tensor], given: dict[str, Any]) -> Tensor:
    """What training does to the only parameter."""
    before = parameter.detach().clone()
    optimizer = build_optimizer(model, given)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach() - before


@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_a_weight_that_is_stored_transposed_moves_as_the_same_linear_does(name: str) -> None:
    """Its output rows are columns. 1e-5: float32."""
    steps = [matrix(12, 20, seed=step) for step in range(4)]
    linear, conv = linears(matrix(12, 20)), nn.Sequential(Conv1D(12, 20))
    conv[0].weight.data.copy_(matrix(12, 20).T)
    conv[0].bias.requires_grad_(False)
    given = params(0.25, name, weight_decay=0.1, cautious_weight_decay=True)
    expected = change(linear[0].weight, linear, steps, given)
    found = change(conv[0].weight, conv, [step.T.contiguous() for step in steps], given)
    assert relative_error(found.T, expected) < 1e-5


@pytest.mark.parametrize("name", ["muon", "normuon"])
@pytest.mark.parametrize("override", [{"heads": 4}, {"split": [12, 12, 24]}])
def test_each_matrix_of_a_fused_weight_has_its_own_rows(name: str, override: dict[str, Any]) -> None:
    """1e-5: float32, in batches of other sizes."""
    heights = override.get("split", [12] * 4)
    steps = [matrix(48, 20, seed=step) for step in range(4)]
    fused = linears(matrix(48, 20))
    found = change(fused[0].weight, fused, steps, params(0.5, name, overrides=[{"match": "weight", **override}]))
    pieces = zip(torch.split(matrix(48, 20), heights), zip(*(torch.split(s, heights) for s in steps), strict=True), strict=True)
    for part, (piece, of_piece) in zip(torch.split(found, heights), pieces, strict=True):
        model = linears(piece)
        assert relative_error(part, change(model[0].weight, model, list(of_piece), params(0.5, name))) < 1e-5


def test_a_matrix_without_a_gradient_stays_where_it_is() -> None:
    """What it has accumulated fades where rows are chosen, as Muon's momentum does."""
    model = linears(matrix(8, 12), matrix(8, 12, seed=1))
    optimizer = build_optimizer(model, params(0.5, weight_decay=0.3))
    set_gradients(model.parameters(), 0)
    optimizer.step()
    before = model[0].weight.detach().clone()
    model[0].weight.grad.zero_()
    optimizer.step()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("share", "outputs", "count"), [(0.25, 8, 2), (0.25, 9, 3), (0.07, 100, 7), (0.5, 1, 1), (0.001, 5, 1)]
)
def test_a_share_is_counted_as_the_decimal_fraction_that_it_is_written_as(share: float, outputs: int, count: int) -> None:
    """0.07 times 100 is 7.000000000000001 in floating point, which is no reason for an eighth row."""
    assert Choice("size", share).count(outputs) == count


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nesterov": ({"nesterov": True}, r"sharding\.rows: got 0\.25 with nesterov true.*allowed: nesterov false"),
    "normalize": (
        {"normalize": {"by": "rows", "when": "before"}},
        r"sharding\.rows: got 0\.25 with normalize, which takes whole matrices; allowed: normalize null",
    ),
    "8-bit": ({"state_dtype": "8bit"}, r"sharding\.rows: got 0\.25 with state_dtype '8bit'"),
    "zero": ({"sharding": {"rows": 0}}, r"sharding\.rows: got 0"),
    "more than all": ({"sharding": {"rows": 1.5}}, r"sharding\.rows: got 1\.5"),
    "shard_local": ({"sharding": {"rows": 0.25, "mode": "shard_local"}}, r"rows: got 0\.25 with mode 'shard_local'"),
    "gather_every": (
        {"sharding": {"rows": 0.25, "mode": "shard_local", "gather_every": 2}},
        r"rows: got 0\.25 with mode 'shard_local'; allowed: mode 'gather', or null",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_combined_is_refused_by_name(case: str) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        build_optimizer(linears(matrix(8, 12)), params(0.25, **settings))


def test_a_rule_that_steps_whole_matrices_is_refused_by_name() -> None:
    """One that derives from Muon too: its own update would be lost."""

    class Settings(MuonSettings):
        rule, title, builds = "own_muon", "Own Muon", type("OwnMuon", (Muon,), {"__slots__": ()})

        def build(self) -> Muon:
            return self.builds(**self.arguments())

    with registered(Settings, SummingSettings):
        for name, settings in {"own_muon": {"nesterov": False}, "summing": {}}.items():
            message = rf"sharding\.rows: got 0\.5 with rule '{name}', which steps whole matrices; allowed: null"
            with pytest.raises(ConfigError, match=message):
                build_optimizer(linears(matrix(8, 12)), {"name": name, **settings, "sharding": {"rows": 0.5}})


@pytest.mark.parametrize("name", ["muon_squared", "aurora", "adamuon", "muon_hyperball", "muown"])
def test_other_rules_of_this_package_are_refused_by_name(name: str) -> None:
    message = rf"sharding\.rows: got 0\.5 with rule '{name}', which steps whole matrices; allowed: null"
    with pytest.raises(ConfigError, match=message):
        build_optimizer(linears(matrix(8, 12)), {"name": name, "sharding": {"rows": 0.5}})


def test_rows_that_are_chosen_have_one_owner_on_any_number_of_ranks() -> None:
    """No team: its members would need the rows of the whole matrix."""
    assert not works_in_teams(MuonSettings(nesterov=False).build_rows(0.5))


def test_an_elementwise_rule_has_no_rows_to_choose() -> None:
    build_optimizer(linears(matrix(8, 12)), {"name": "adamw", "sharding": {"rows": 0.25}})


def test_state_of_whole_matrices_is_not_taken_for_accumulated_gradients() -> None:
    """The average of Muon is a twentieth as large as the sum: refused, both ways."""
    models = [linears(matrix(8, 12)) for _ in range(2)]
    optimizers = [build_optimizer(model, params(rows)) for model, rows in zip(models, (None, 0.5), strict=True)]
    for model, optimizer in zip(models, optimizers, strict=True):
        set_gradients(model.parameters(), 0)
        optimizer.step()
    for saved, loading, buffer in ((0, 1, "accumulated_gradient"), (1, 0, "momentum_buffer")):
        with pytest.raises(ConfigError, match=f"holds nothing for '{buffer}'"):
            optimizers[loading].load_state_dict(optimizers[saved].state_dict())


def test_bfloat16_state_follows_the_formula() -> None:
    """2%: each of twenty sums is rounded to 8 bits."""
    weight = 0.1 * matrix(24, 40)
    model, reference = linears(weight), RowMuon(weight, 0.02, 12)
    optimizer = build_optimizer(model, params(0.5, state_dtype="bfloat16"))
    for step in range(20):
        set_gradients(model.parameters(), step)
        reference.step(model[0].weight.grad)
        optimizer.step()
    state = optimizer.state[model[0].weight]["accumulated_gradient"]
    assert relative_error(state.view(24, 40), reference.buffer) < 0.02


def test_telemetry_knows_what_is_healthy(caplog: pytest.LogCaptureFixture) -> None:
    """Half of 24 rows: updates of rms 0.02 sqrt(12 / 960) over the whole matrix, if U were exactly orthogonal."""
    model = linears(matrix(24, 40))
    optimizer = build_optimizer(model, {**params(0.5), "telemetry": {"every": 1}})
    with caplog.at_level(logging.WARNING, logger="ds_optforge"):
        for step in range(PATIENCE + 1):
            set_gradients(model.parameters(), step)
            optimizer.step()
            found = optimizer.telemetry["groups"]["matrix.muon"]
            assert found["update_rms"] == pytest.approx(0.02 * (12 / 960) ** 0.5, rel=0.2)
            assert found["effective_lr"] == pytest.approx(0.02 * 0.5**0.5)
            assert found["orthogonality_error"] < 0.5
    assert not [record for record in caplog.records if "healthy" in record.getMessage()]


def test_a_choice_by_what_is_no_sum_of_rows_is_refused_when_the_rule_is_built() -> None:
    class Astray(Muon):
        __slots__ = ()

        @property
        def choice(self) -> Choice:
            return Choice("nothing", 0.5)

    class Settings(MuonSettings):
        rule, title, builds = "astray", "Astray", Astray

        def build(self) -> Muon:
            return Astray(**self.arguments())

    message = r"Astray\.choice: got by='nothing'; allowed: a sum of the gradient per row"
    with registered(Settings), pytest.raises(TypeError, match=message):
        build_optimizer(linears(matrix(8, 12)), {"name": "astray"})


def test_a_parameter_without_a_gradient_is_skipped_as_in_torch() -> None:
    """Beside one that is stepped: neither its weight nor what it has accumulated changes."""
    model = linears(matrix(8, 12), matrix(8, 12, seed=1))
    optimizer = build_optimizer(model, params(0.5, weight_decay=0.3))
    set_gradients(model.parameters(), 0)
    optimizer.step()
    skipped, stepped = (layer.weight for layer in model)
    before = [skipped.detach().clone(), optimizer.state[skipped]["accumulated_gradient"].clone(), stepped.detach().clone()]
    skipped.grad = None
    optimizer.step()
    assert torch.equal(skipped, before[0])
    assert torch.equal(optimizer.state[skipped]["accumulated_gradient"], before[1])
    assert not torch.equal(stepped, before[2])
