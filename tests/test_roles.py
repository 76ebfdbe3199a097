"""Which rule each parameter gets, decided by overrides, the module tree, then the shape; and what is said about it."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

from ds_optforge import ConfigError, build_optimizer
from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.routing.roles import Route, route
from ds_optforge.routing.tags import tag
from tests import models

MUON = {"name": "muon", "lr": 0.02, "adamw": {"lr": 0.001}}


def routes(model: nn.Module, **config: Any) -> dict[str, Route]:
    """Every parameter's route, by its name."""
    parsed = OptimizerConfig({**MUON, **config})
    tag(model)
    return {name: route(parameter, parsed) for name, parameter in model.named_parameters()}


def only(model: nn.Module, **config: Any) -> Route:
    """The route of the weight of a model that is one module."""
    return routes(nn.Sequential(model), **config)["0.weight"]


class Decoder(nn.Module):
    """Embedding, numbered layers and an output projection under a name of choice."""

    def __init__(self, head: str = "lm_head", tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"head": nn.Linear(8, 8)}) for _ in range(2))
        setattr(self, head, nn.Linear(8, 30, bias=False))
        if tied:
            getattr(self, head).weight = self.embed.weight


class HuggingFaceLike(Decoder):
    """A head under a name that tells nothing, found by the method that every transformers model has."""

    def __init__(self, found: bool = True) -> None:
        super().__init__(head="predictions")
        self.found = found

    def get_output_embeddings(self) -> nn.Module | None:
        return self.predictions if self.found else None


class Bank(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))


def test_matrices_go_to_muon_and_the_rest_to_adamw() -> None:
    found = {name: (r.role, r.settings.rule) for name, r in routes(models.build()).items()}
    matrix, scalar = ("matrix", "muon"), ("scalar", "adamw")
    assert found == {
        "embed.weight": ("embedding", "adamw"),
        "up.weight": matrix,
        "up.bias": scalar,
        **{f"blocks.{i}.weight": matrix for i in range(3)},
        "odd.weight": matrix,
        "odd.bias": scalar,
        "down.weight": matrix,
        "norm.weight": scalar,
        "norm.bias": scalar,
        "lm_head.weight": ("unembedding", "adamw"),
    }


@pytest.mark.promise("normuon-routing")
def test_beside_normuon_tables_and_the_head_get_adamw_in_8_bits() -> None:
    """Biases and norms get AdamW too, whose state for scalars is never compressed."""
    model = models.build(width=96)
    model.embed, model.lm_head = nn.Embedding(200, 24), nn.Linear(24, 200, bias=False)  # large enough for 8 bits
    adamw = {"name": "adamw_8bit", "lr": 0.001}
    config = {"name": "normuon", "roles": {role: adamw for role in ("embedding", "unembedding", "scalar")}}
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    states = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    matrices = {"up.weight", *(f"blocks.{i}.weight" for i in range(3)), "odd.weight", "down.weight"}
    assert {name for name, state in states.items() if "row_second_moment" in state} == matrices
    second_moments = {name: state["exp_avg_sq"].dtype for name, state in states.items() if name not in matrices}
    tables = {"embed.weight", "lm_head.weight"}
    assert second_moments == {name: torch.uint8 if name in tables else torch.float32 for name in states.keys() - matrices}


@pytest.mark.parametrize("module", [nn.Embedding(30, 8), nn.EmbeddingBag(30, 8)], ids=["Embedding", "EmbeddingBag"])
def test_an_embedding_is_not_a_matrix_whatever_its_shape(module: nn.Module) -> None:
    assert (only(module).role, only(module).settings.rule) == ("embedding", "adamw")


@pytest.mark.parametrize("name", ["lm_head", "head", "unembed", "embed_out", "output", "output_layer"])
def test_a_linear_named_as_the_head_is_the_unembedding(name: str) -> None:
    assert routes(Decoder(head=name))[f"{name}.weight"].role == "unembedding"


def test_a_linear_named_head_inside_a_numbered_layer_is_a_matrix() -> None:
    found = routes(Decoder())
    assert found["layers.0.head.weight"].role == "matrix"
    assert found["layers.1.head.weight"].settings.rule == "muon"


def test_the_head_of_a_wrapped_model_is_found() -> None:
    assert routes(nn.ModuleDict({"model": Decoder()}))["model.lm_head.weight"].role == "unembedding"


def test_a_hugging_face_model_tells_its_head() -> None:
    assert routes(HuggingFaceLike())["predictions.weight"].role == "unembedding"


def test_a_hugging_face_model_may_have_no_head() -> None:
    assert routes(HuggingFaceLike(found=False))["predictions.weight"].role == "matrix"


@pytest.mark.parametrize("name", ["lm_head", "decoder"])
def test_a_head_tied_to_the_embedding_is_one_embedding(name: str) -> None:
    found = routes(Decoder(head=name, tied=True))
    assert f"{name}.weight" not in found
    assert found["embed.weight"].role == "embedding"


@pytest.mark.promise("muon-aspect-ratio")
@pytest.mark.parametrize(
    ("rows", "cols", "rule"),
    [(80, 8, "muon"), (8, 80, "muon"), (81, 8, "adamw"), (8, 81, "adamw"), (8, 8, "muon")],
)
def test_the_aspect_ratio_of_a_matrix_of_unknown_purpose_decides_up_to_10(rows: int, cols: int, rule: str) -> None:
    found = only(Bank(rows, cols))
    assert (found.role, found.settings.rule) == ("matrix", rule)


@pytest.mark.promise("muon-aspect-ratio")
def test_the_limit_of_the_aspect_ratio_can_be_set() -> None:
    assert only(Bank(81, 8), max_aspect_ratio=11).settings.rule == "muon"
    assert only(Bank(40, 8), max_aspect_ratio=4).settings.rule == "adamw"


@pytest.mark.promise("muon-aspect-ratio")
def test_a_hidden_linear_map_has_no_limit_unless_one_is_set() -> None:
    assert only(nn.Linear(8, 400)).settings.rule == "muon"
    assert only(nn.Linear(8, 81), max_aspect_ratio=10).settings.rule == "adamw"


@pytest.mark.promise("muon-aspect-ratio")
def test_settings_for_matrices_leave_a_thin_one_alone() -> None:
    """One thin matrix in a model must not make `roles.matrix.momentum` an error."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), Bank(8, 88))
    found = routes(model, roles={"matrix": {"momentum": 0.9}})
    assert [found[f"{i}.weight"].settings.rule for i in (0, 1)] == ["muon", "adamw"]


@pytest.mark.promise("muon-convolutions")
@pytest.mark.parametrize(
    ("filters", "matrix"),
    [
        (nn.Conv1d(4, 8, 5), (0, 8, 20)),
        (nn.Conv2d(4, 8, 3), (0, 8, 36)),
        (nn.Conv3d(2, 8, 2), (0, 8, 16)),
    ],
    ids=["Conv1d", "Conv2d", "Conv3d"],
)
def test_convolution_filters_are_one_matrix_of_outputs_by_the_rest(filters: nn.Module, matrix: tuple[int, int, int]) -> None:
    assert only(filters).matrices == (matrix,)


def test_a_bank_of_experts_is_one_matrix_per_expert() -> None:
    assert only(Bank(3, 4, 6)).matrices == ((0, 4, 6), (24, 4, 6), (48, 4, 6))


@pytest.mark.promise("muon-aspect-ratio")
def test_the_aspect_ratio_of_a_bank_is_that_of_an_expert() -> None:
    assert only(Bank(64, 4, 6)).settings.rule == "muon"
    assert only(Bank(2, 4, 44)).settings.rule == "adamw"


def test_a_linear_is_one_matrix() -> None:
    assert only(nn.Linear(6, 4)).matrices == ((0, 4, 6),)


def test_an_elementwise_rule_sees_no_matrices() -> None:
    assert only(nn.Embedding(30, 8)).matrices == ()


@pytest.mark.promise("frozen-parameters")
def test_frozen_and_non_floating_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0].weight.requires_grad_(False)
    model.table = nn.Parameter(torch.arange(5), requires_grad=False)
    optimizer = build_optimizer(model, MUON)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(model[1].weight)]


def test_nothing_to_train_is_an_error() -> None:
    model = nn.Linear(4, 4)
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="got no trainable floating-point parameter; allowed: at least one"):
        build_optimizer(model, MUON)


def test_an_untagged_parameter_names_the_missing_line() -> None:
    with pytest.raises(ConfigError) as error:
        route(nn.Linear(6, 4).weight, OptimizerConfig(MUON))
    assert "shape (4, 6) is not registered; call ds_optforge.register(model) before" in str(error.value)


def test_an_override_sets_the_role_before_tree_and_shape_do() -> None:
    found = routes(
        Decoder(),
        overrides=[
            {"match": r"^embed\.", "role": "matrix"},
            {"match": r"layers\.0", "role": "scalar"},
        ],
    )
    assert (found["embed.weight"].role, found["embed.weight"].settings.rule) == ("matrix", "muon")
    assert (found["layers.0.head.weight"].role, found["layers.0.head.weight"].settings.rule) == ("scalar", "adamw")
    assert found["layers.1.head.weight"].role == "matrix"


def test_a_role_that_was_asked_for_is_not_questioned_by_the_aspect_ratio() -> None:
    assert only(nn.Linear(8, 160), overrides=[{"match": "weight", "role": "matrix"}]).settings.rule == "muon"


def test_of_two_overrides_the_later_one_wins() -> None:
    overrides = [{"match": "layers", "role": "scalar", "lr": 1.0}, {"match": "head.weight", "role": "matrix", "lr": 2.0}]
    found = routes(Decoder(), overrides=overrides)["layers.0.head.weight"]
    assert (found.role, found.settings.lr) == ("matrix", 2.0)


def test_an_override_is_searched_anywhere_in_the_name() -> None:
    found = routes(Decoder(), overrides=[{"match": r"s\.1\.h", "lr": 3.0}])
    assert [found[f"layers.{i}.head.weight"].settings.lr for i in (0, 1)] == [0.02, 3.0]


def test_a_matrix_rule_for_a_vector_is_an_error_that_names_the_parameter() -> None:
    with pytest.raises(ConfigError, match=r"^0\.bias: got rule 'muon' for shape \(4,\); allowed: at least two dimensions"):
        routes(nn.Sequential(nn.Linear(4, 4)), overrides=[{"match": "bias", "name": "muon"}])


def test_an_override_that_its_parameter_cannot_read_names_the_parameter() -> None:
    """The pattern also matches a bias, which AdamW trains."""
    with pytest.raises(ConfigError) as error:
        routes(nn.Sequential(nn.Linear(4, 4)), overrides=[{"match": "^0", "momentum": 0.9}])
    assert "optimizer.params.overrides[0].momentum: 'adamw' does not read it" in str(error.value)
    assert "0.bias" in str(error.value)


def test_parameters_with_the_same_settings_share_a_group_whose_name_comes_from_the_configuration() -> None:
    found = routes(Decoder(), overrides=[{"match": r"layers\.1", "lr": 3.0}])
    assert found["layers.0.head.weight"].group == "matrix.muon"
    assert found["layers.1.head.weight"].group == "matrix.muon.override0"
    assert found["layers.0.head.bias"].group == "scalar.adamw"


class LogLines:
    """What the package said while an optimizer was built."""

    def __init__(self, caplog: pytest.LogCaptureFixture, model: nn.Module, config: dict[str, Any]) -> None:
        with caplog.at_level(logging.INFO, logger="ds_optforge"):
            self.optimizer = build_optimizer(model, config)
        self.information = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
        self.warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.promise("muon-counts")
def test_one_line_tells_both_parameter_counts(caplog: pytest.LogCaptureFixture) -> None:
    said = LogLines(caplog, Decoder(), MUON)
    matrices, rest = 2 * 8 * 8, 30 * 8 + 30 * 8 + 2 * 8
    assert said.information == [f"Muon: {matrices} params, AdamW: {rest} params"]
    assert said.warnings == []


@pytest.mark.promise("muon-counts", "frozen-parameters")
def test_frozen_parameters_are_not_counted(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    assert LogLines(caplog, model, MUON).information == ["Muon: 16 params, AdamW: 4 params"]


@pytest.mark.promise("no-matrix")
@pytest.mark.parametrize("config", [MUON, {"name": "muon", "lr": 0.02}], ids=["adamw.lr set", "adamw.lr defaulted"])
def test_a_model_with_nothing_for_muon_gets_one_warning_and_adamw(
    config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Whose first step moves every element by the learning rate, against the sign of its gradient."""
    model = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4))
    said = LogLines(caplog, model, config)
    assert len(said.warnings) == 1
    assert "no parameter is a matrix for 'muon'" in said.warnings[0]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, -3.0)
    said.optimizer.step()
    rate = config.get("adamw", config)["lr"]
    for parameter, weight in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), weight + rate)
        assert said.optimizer.state[parameter].keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.promise("adamw-beside-rate")
def test_a_learning_rate_of_adamw_that_nobody_chose_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    said = LogLines(caplog, nn.Linear(4, 4), {"name": "muon", "lr": 0.03})
    assert len(said.warnings) == 1
    assert "adamw.lr is not set" in said.warnings[0]
    assert "0.03" in said.warnings[0]


@pytest.mark.promise("adamw-beside-rate")
@pytest.mark.parametrize(
    "config",
    [
        {"name": "muon", "orthogonalization": {"scale": "match_rms_adamw"}},
        {"name": "muon", "roles": {"scalar": {"lr": 0.001}}},
        {"name": "muon", "adamw": {"lr": 0.02}},
        {"name": "adamw"},
    ],
    ids=["the scale that shares it", "set by role", "set to the same", "adamw alone"],
)
def test_no_warning_where_somebody_did(config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert LogLines(caplog, nn.Linear(4, 4), config).warnings == []


@pytest.mark.promise("role-rates")
@pytest.mark.parametrize("vocabulary", [256, 5000])
def test_roles_other_than_matrix_hold_whatever_the_shape(vocabulary: int) -> None:
    """A vector, and the table of a large vocabulary, are beyond max_aspect_ratio too."""
    model = nn.ModuleDict({"embed": nn.Embedding(vocabulary, 64), "norm": nn.LayerNorm(64), "up": nn.Linear(64, 64)})
    tag(model)
    section = {"name": "muon", "adamw": {"lr": 0.003}, "roles": {"embedding": {"lr": 0.3}, "scalar": {"lr": 0.5}}}
    config = OptimizerConfig(section)
    rates = {name: route(parameter, config).settings.lr for name, parameter in model.named_parameters()}
    assert rates == {"embed.weight": 0.3, "norm.weight": 0.5, "norm.bias": 0.5, "up.weight": 0.02, "up.bias": 0.5}
