"""The parameters that an optimizer is given in plain PyTorch: odd ones are stepped as torch.optim would, or refused by name."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_optforge import ConfigError, OptForge, build_optimizer, explain
from ds_optforge.optimizer import groups_of
from ds_optforge.rules import rule_names
from ds_optforge.testing.params import formats_of, usual
from tests.layers import linears, matrix, set_gradients, snapshot
from tests.oracles import table_rows

MUON = {"name": "muon", "lr": 0.02, "weight_decay": 0.1, "adamw": {"lr": 1e-3}}


class Scaled(nn.Module):
    """Raw parameters of the given shapes, by name."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


class TestVectors:
    @pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1), (1, 1, 6), (1, 1, 1)])
    def test_a_single_dimension_larger_than_one_is_a_vector(self, shape: tuple[int, ...]) -> None:
        """As LayerScale's (C, 1, 1) and a class token; (C, 1, 1) was a bank of C matrices."""
        role, rule, matrices = table_rows(explain(Scaled(scale=shape), MUON))["scale"][1:4]
        assert (role, rule, matrices) == ("scalar", "adamw", "-")

    @pytest.mark.parametrize(
        "model",
        [nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False), nn.Conv2d(6, 6, 1, groups=6, bias=False)],
        ids=["one output", "one input", "depthwise"],
    )
    def test_a_weight_with_one_output_or_input_is_a_weight_that_is_not_orthogonalized(self, model: nn.Module) -> None:
        role, rule, matrices = table_rows(explain(model, MUON))["weight"][1:4]
        assert (role, rule, matrices) == ("matrix", "adamw", "-")

    def test_members_that_are_vectors_are_not_orthogonalized(self) -> None:
        assert table_rows(explain(Scaled(bank=(5, 1, 6)), MUON))["bank"][2] == "adamw"

    def test_a_bank_of_one_matrix_is_a_matrix(self) -> None:
        assert table_rows(explain(Scaled(bank=(1, 8, 6)), MUON))["bank"][3] == "1 of 8x6"

    def test_a_matrix_rule_that_an_override_names_is_refused(self) -> None:
        config = {**MUON, "overrides": [{"match": "scale", "name": "muon"}]}
        with pytest.raises(
            ConfigError, match=r"^scale: got rule 'muon' for shape \(6, 1, 1\); allowed: at least two dimensions"
        ):
            build_optimizer(Scaled(scale=(6, 1, 1)), config)


class TestRefused:
    def test_a_parameter_in_two_groups(self) -> None:
        """torch's own error, with the name."""
        layer = nn.Linear(4, 4)
        build_optimizer(layer, MUON)
        groups = [{"params": [layer.weight]}, {"params": [layer.weight, layer.bias]}]
        with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
            torch.optim.SGD(groups)
        with pytest.raises(
            ValueError, match=r"some parameters appear in more than one parameter group: weight is .*\[1\]\.params\[0\]"
        ):
            OptForge(groups, **MUON)

    @pytest.mark.promise("frozen-parameters")
    @pytest.mark.parametrize("rule", rule_names())
    def test_a_complex_parameter(self, rule: str) -> None:
        model = nn.Linear(4, 4, dtype=torch.complex64)
        with pytest.raises(ConfigError, match=r"^weight: got dtype complex64; allowed: float32, .*view_as_real"):
            build_optimizer(model, {"name": rule})

    def test_a_float64_matrix_of_a_matrix_rule(self) -> None:
        """It would be trained in float32; elementwise rules are exact in float64."""
        with pytest.raises(ConfigError, match=r"^weight: got dtype float64 for rule 'muon'.*allowed: float32, bfloat16"):
            build_optimizer(nn.Linear(4, 4, dtype=torch.float64), MUON)

    def test_elements_that_share_memory(self) -> None:
        model = nn.Linear(4, 4)
        model.weight = nn.Parameter(torch.randn(4, 1).expand(4, 4))
        with pytest.raises(ConfigError, match=r"^weight: got strides \(1, 0\) .*share memory"):
            build_optimizer(model, MUON)

    def test_a_parameter_that_was_frozen_when_the_optimizer_was_built_and_is_trainable_now(self) -> None:
        model = linears(matrix(6, 4), matrix(4, 6))
        model[1].weight.requires_grad_(False)
        optimizer = build_optimizer(model, MUON)
        set_gradients(model.parameters(), 0)
        optimizer.step()
        model[1].weight.requires_grad_(True)
        before = snapshot(model)
        with pytest.raises(ConfigError, match=r"^1\.weight: was frozen when the optimizer was built .*build a new one"):
            optimizer.step()
        assert all(torch.equal(snapshot(model)[name], before[name]) for name in before)


def gradients(step: int, absent: set[str], model: nn.Module) -> None:
    """Gradients that depend on step and place; None for the ``absent``."""
    set_gradients(model.parameters(), step)
    for name, parameter in model.named_parameters():
        if name in absent:
            parameter.grad = None


PATTERN: list[set[str]] = [
    set(),
    {"1.weight"},
    {"0.weight", "2.weight"},
    {"0.weight", "1.weight", "2.weight"},
    set(),
    {"2.weight"},
    set(),
]


class TestMissingGradients:
    @pytest.mark.parametrize(("rule", "form"), [(rule, form) for rule in rule_names() for form in formats_of(rule)])
    def test_a_parameter_is_stepped_as_if_it_were_alone(self, rule: str, form: str) -> None:
        """Whatever gradients others have: nothing of it moves without a gradient, and steps are counted for itself."""
        config = {**usual(rule), "state_dtype": form}  # with a weight decay of 0.1, if the rule has any
        weights = [matrix(64, 80), matrix(64, 80, seed=1), matrix(80, 64)]
        together = linears(*weights)
        optimizer = build_optimizer(together, config)
        for step, absent in enumerate(PATTERN):
            gradients(step, absent, together)
            optimizer.step()
        for index, weight in enumerate(weights):
            alone = linears(weight)
            single = build_optimizer(alone, config)
            for step, absent in enumerate(PATTERN):
                if f"{index}.weight" not in absent:
                    gradients(step, absent, together)
                    alone[0].weight.grad = together[index].weight.grad.clone()
                    single.step()
            # 1e-6: matrices are multiplied in other batches.
            torch.testing.assert_close(together[index].weight, alone[0].weight, rtol=0, atol=1e-6)
            mine, its = optimizer.state[together[index].weight], single.state[alone[0].weight]
            assert mine["step"] == its["step"] == sum(f"{index}.weight" not in absent for absent in PATTERN)

    @pytest.mark.parametrize(
        ("config", "theirs"),
        [
            (
                {"name": "sgd", "lr": 0.1, "weight_decay": 0.1},
                lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
            ),
            (
                {"name": "adamw", "lr": 0.1, "weight_decay": 0.1},
                lambda p: torch.optim.AdamW(p, 0.1, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
            ),
        ],
        ids=["sgd", "adamw"],
    )
    def test_as_torchs_optimizers_bit_for_bit(
        self, config: dict[str, Any], theirs: Callable[..., torch.optim.Optimizer]
    ) -> None:
        ours, reference = (linears(matrix(6, 8), matrix(6, 8, seed=1), matrix(8, 6)) for _ in range(2))
        optimizers = [build_optimizer(ours, config), theirs(list(reference.parameters()))]
        for step, absent in enumerate(PATTERN):
            for model, optimizer in zip((ours, reference), optimizers, strict=True):
                gradients(step, absent, model)
                optimizer.step()
        assert all(map(torch.equal, ours.parameters(), reference.parameters()))

    def test_a_parameter_that_never_had_one_has_no_state(self) -> None:
        model = linears(matrix(6, 4), matrix(4, 6))
        optimizer = build_optimizer(model, MUON)
        gradients(0, {"1.weight"}, model)
        optimizer.step()
        assert list(optimizer.state_dict()["state"]) == [0]

    @pytest.mark.parametrize("rule", rule_names())
    def test_steps_that_differ_survive_a_checkpoint(self, rule: str) -> None:
        models = [linears(matrix(16, 24), matrix(24, 16)) for _ in range(2)]
        straight, resumed = (build_optimizer(model, usual(rule)) for model in models)
        for step in range(6):
            if step == 3:
                saved = resumed.state_dict()
                resumed = build_optimizer(models[1], usual(rule))
                resumed.load_state_dict(saved)
            for model, optimizer in zip(models, (straight, resumed), strict=True):
                gradients(step, {"1.weight"} if step < 2 else set(), model)
                optimizer.step()
        assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))

    def test_telemetry_leaves_a_group_without_gradients_out(self) -> None:
        model = nn.Sequential(nn.Linear(6, 4))
        optimizer = build_optimizer(model, {**MUON, "telemetry": {"every": 1}})
        gradients(0, {"0.bias"}, model)
        optimizer.step()
        assert list(optimizer.telemetry["groups"]) == ["matrix.muon"]
        gradients(1, set(), model)
        optimizer.step()
        assert set(optimizer.telemetry["groups"]) == {"matrix.muon", "scalar.adamw"}

    def test_telemetry_counts_the_weights_that_rest(self) -> None:
        model = linears(matrix(6, 4), matrix(6, 4, seed=1))
        before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        optimizer = build_optimizer(model, {**MUON, "telemetry": {"every": 1}})
        gradients(0, {"1.weight"}, model)
        optimizer.step()
        found = optimizer.telemetry["groups"]["matrix.muon"]
        assert found["parameter_rms"] == pytest.approx(before.square().mean().sqrt().item())


def columns_first(weight: Tensor) -> Tensor:
    """The same values, stored column by column."""
    return weight.t().contiguous().t()


class TestStrides:
    @pytest.mark.parametrize(("rule", "form"), [(rule, form) for rule in rule_names() for form in formats_of(rule)])
    def test_a_weight_in_another_order_is_stepped_as_the_same_values_in_rows(self, rule: str, form: str) -> None:
        config = {**usual(rule), "state_dtype": form}
        rows, columns = (linears(matrix(64, 80), matrix(80, 64)) for _ in range(2))
        columns[1].weight = nn.Parameter(columns_first(columns[1].weight.detach()))
        optimizers = [build_optimizer(model, config) for model in (rows, columns)]
        for step in range(3):
            for model, optimizer in zip((rows, columns), optimizers, strict=True):
                set_gradients(model.parameters(), step)
                optimizer.step()
        assert not columns[1].weight.is_contiguous()
        assert all(map(torch.equal, rows.parameters(), columns.parameters()))

    def test_channels_last(self) -> None:
        def train(memory_format: torch.memory_format) -> Tensor:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).to(memory_format=memory_format)
            optimizer = build_optimizer(model, MUON)
            for step in range(3):
                images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
                model(images.to(memory_format=memory_format)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            optimizer.load_state_dict(optimizer.state_dict())
            return torch.cat([parameter.detach().contiguous().flatten() for parameter in model.parameters()])

        # 1e-3: convolutions add up in another order, and bfloat16 Newton-Schulz magnifies it.
        torch.testing.assert_close(train(torch.channels_last), train(torch.contiguous_format), rtol=0, atol=1e-3)


def test_a_model_on_two_devices_is_planned_for_each_of_them(caplog: pytest.LogCaptureFixture) -> None:
    """The meta device stands in for an accelerator: it can be planned for, but not stepped."""
    caplog.set_level(logging.INFO, "ds_optforge")
    model = linears(matrix(6, 4), matrix(4, 6), matrix(6, 6))
    model[1].to("meta")
    groups = groups_of(optimizer := build_optimizer(model, MUON))
    (group,) = optimizer.param_groups
    found = groups.on_devices(group)
    assert [[route.name for route in members.routes] for members, _ in found] == [["0.weight", "2.weight"], ["1.weight"]]
    bound = [groups.slices_of(group, tensors, members) for members, tensors in found]
    assert [slices.binding.device.type for slices in bound] == ["cpu", "meta"]
    assert [slices.placement.layout.names for slices in bound] == [("0.weight", "2.weight"), ("1.weight",)]
