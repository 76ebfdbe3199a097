"""OptForge without DeepSpeed, one process: against torch's optimizers, Keller Jordan's groups, and its own promises."""

import inspect
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_optforge import ConfigError, MuonWithAuxAdam, OptForge, build_optimizer
from tests import models
from tests.oracles import EXACT, Muon, relative_error

SHAPES = [(40, 40), (24, 96), (96, 24), (33, 7)]
MUON = {"name": "muon", "lr": 0.02, "weight_decay": 0.1, "adamw": {"lr": 3e-3, "eps": 1e-5}}
ADAMW = {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1, "roles": {"scalar": {"weight_decay": 0.1}}}


def matrix(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(1000 * rows + cols + seed))


def linears(*weights: Tensor) -> nn.Sequential:
    """A layer per given (out, in) weight, without biases."""
    layers = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.clone())
        layers.append(layer)
    return nn.Sequential(*layers)


def set_gradients(parameters: Iterator[nn.Parameter] | Sequence[nn.Parameter], seed: int) -> None:
    for index, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(100 * seed + index)
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def train(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], steps: int = 20, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        loss = model(*models.batch(step))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


class TestAgainstTorchMuon:
    """torch.optim.Muon is bfloat16 inside, so one update agrees to the rounding of both, 2.3% at most here; 3% is allowed.

    (The Gram form, which the default takes for wide and tall matrices, rounds more on tiny ones: see test_newton_schulz.)
    """

    @pytest.mark.promise("muon-scale", "muon-settings", "muon-defaults")
    @pytest.mark.parametrize("precision", [{}, EXACT], ids=["bfloat16", "float32"])
    @pytest.mark.parametrize("nesterov", [True, False])
    @pytest.mark.parametrize(("scale", "theirs"), [("shape", "original"), ("match_rms_adamw", "match_rms_adamw")])
    @pytest.mark.parametrize("shape", [(40, 40), (128, 512), (512, 128)])
    def test_one_update(
        self, shape: tuple[int, int], scale: str, theirs: str, nesterov: bool, precision: dict[str, Any]
    ) -> None:
        weight, gradient = matrix(*shape), matrix(*shape, seed=1)
        ours, reference = linears(weight), linears(weight)
        orthogonalization = {"scale": scale, **precision.get("orthogonalization", {})}
        config = {"name": "muon", "lr": 0.02, "nesterov": nesterov, **precision, "orthogonalization": orthogonalization}
        optimizer = torch.optim.Muon(reference.parameters(), lr=0.02, weight_decay=0.0, nesterov=nesterov, adjust_lr_fn=theirs)
        ours[0].weight.grad, reference[0].weight.grad = gradient.clone(), gradient.clone()
        build_optimizer(ours, config).step()
        optimizer.step()
        assert relative_error(ours[0].weight - weight, reference[0].weight.detach() - weight) < 0.03

    @pytest.mark.promise("adamw-is-torchs", "muon-scale")
    @pytest.mark.parametrize("precision", [{}, EXACT], ids=["bfloat16", "float32"])
    def test_twenty_steps_of_training(self, precision: dict[str, Any]) -> None:
        ours, reference = models.build(), models.build()
        named = dict(reference.named_parameters())
        to_muon = ["up.weight", "blocks.0.weight", "blocks.1.weight", "blocks.2.weight", "odd.weight", "down.weight"]
        tables = ["embed.weight", "lm_head.weight"]
        rest = [{"params": [named.pop(name) for name in tables], "weight_decay": 0.1}]
        theirs = [torch.optim.Muon([named.pop(name) for name in to_muon], lr=0.02, weight_decay=0.1)]
        rest.append({"params": list(named.values()), "weight_decay": 0.0})
        theirs.append(torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), eps=1e-5))
        expected = train(reference, theirs)
        assert expected[-1] < 0.9 * expected[0]  # it does train
        assert train(ours, [build_optimizer(ours, {**MUON, **precision})]) == pytest.approx(expected, rel=0.01)


class TestAgainstTheFormula:
    """A float64 reference written from the papers; 1e-5 of the change: the rounding of fifteen float32 products, magnified
    by the steep quintic, and of the weights themselves.
    """

    @pytest.mark.promise("muon-scale", "muon-settings")
    @pytest.mark.parametrize("nesterov", [True, False])
    @pytest.mark.parametrize("momentum", [0.95, 0.5])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_five_steps_of_muon(self, shape: tuple[int, int], momentum: float, nesterov: bool) -> None:
        weight = 0.1 * matrix(*shape)
        model = linears(weight)
        settings = {"lr": 0.02, "momentum": momentum, "weight_decay": 0.1, "nesterov": nesterov}
        optimizer, reference = build_optimizer(model, {"name": "muon", **settings, **EXACT}), Muon(weight, **settings)
        for step in range(5):
            set_gradients(model.parameters(), step)
            reference.step(model[0].weight.grad)
            optimizer.step()
        assert relative_error(model[0].weight - weight, reference.weight - weight.double()) < 1e-5

    def test_a_small_bucket_changes_nothing(self) -> None:
        """1e-6: matrices are multiplied in other batches."""
        weights = [matrix(12, 20, seed) for seed in range(5)]
        whole, pieces = linears(*weights), linears(*weights)
        optimizers = [
            build_optimizer(model, {"name": "muon", **EXACT, "sharding": {"wire_dtype": "float32", "bucket_numel": numel}})
            for model, numel in ((whole, 2**26), (pieces, 300))
        ]
        for step in range(3):
            for model, optimizer in zip((whole, pieces), optimizers, strict=True):
                set_gradients(model.parameters(), step)
                optimizer.step()
        for index in range(5):
            assert relative_error(pieces[index].weight, whole[index].weight.detach()) < 1e-6


class TestAgainstTorchAdamW:
    @pytest.mark.promise("adamw-is-torchs")
    @pytest.mark.parametrize("implementation", ["fused", "foreach"])
    def test_twenty_steps_of_training(self, implementation: str) -> None:
        """1e-6 relative: torch's own two implementations differ by as much."""
        ours, reference = models.build(), models.build()
        theirs = torch.optim.AdamW(
            reference.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, **{implementation: True}
        )
        expected = train(reference, [theirs])
        found = train(ours, [build_optimizer(ours, {**ADAMW, "eps": 1e-5})])
        assert found == pytest.approx(expected, rel=1e-6)
        for name, parameter in reference.named_parameters():
            assert relative_error(ours.get_parameter(name), parameter.detach()) < 1e-6, name

    def test_scalars_are_not_decayed(self) -> None:
        model = nn.LayerNorm(4)
        optimizer = build_optimizer(model, {"name": "adamw", "lr": 0.1, "weight_decay": 0.5})
        model.weight.grad, model.bias.grad = torch.zeros(4), torch.zeros(4)
        optimizer.step()
        assert torch.equal(model.weight, torch.ones(4))


class TestKellerJordansGroups:
    @pytest.mark.promise("use-muon", "use-muon-several")
    def test_several_groups_of_each_kind_keep_their_own_hyperparameters(self) -> None:
        """They are compared with one torch optimizer per group. A tall matrix has a scale that is not 1."""
        weights = [matrix(40, 24, seed) for seed in range(4)]
        ours, reference = linears(*weights), linears(*weights)
        muon = [
            {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0},
            {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.3},
        ]
        adamw = [
            {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0},
            {"lr": 2e-3, "betas": (0.5, 0.8), "eps": 1e-3, "weight_decay": 0.2},
        ]
        optimizer = MuonWithAuxAdam(
            [{"params": [ours[i].weight], "use_muon": True, **muon[i]} for i in (0, 1)]
            + [{"params": [ours[i].weight], "use_muon": False, **adamw[i - 2]} for i in (2, 3)]
        )
        theirs = [torch.optim.Muon([reference[i].weight], **muon[i]) for i in (0, 1)]
        theirs += [torch.optim.AdamW([reference[i].weight], **adamw[i - 2]) for i in (2, 3)]
        for step in range(3):
            set_gradients(ours.parameters(), step)
            set_gradients(reference.parameters(), step)
            for each in (optimizer, *theirs):
                each.step()
        changes = [(ours[i].weight - weights[i], reference[i].weight.detach() - weights[i]) for i in range(4)]
        errors = [relative_error(found, expected) for found, expected in changes]
        assert max(errors[:2]) < 0.03  # bfloat16 inside both
        assert max(errors[2:]) < 1e-5

    @pytest.mark.promise("muon-defaults")
    def test_his_defaults(self) -> None:
        layer = nn.Linear(4, 4)
        optimizer = MuonWithAuxAdam([{"params": [layer.weight], "use_muon": True}, {"params": [layer.bias], "use_muon": False}])
        muon, adamw = optimizer.param_groups
        assert (muon["lr"], muon["momentum"], muon["weight_decay"]) == (0.02, 0.95, 0.0)
        assert (adamw["lr"], adamw["betas"], adamw["weight_decay"]) == (3e-4, (0.9, 0.95), 0.0)

    @pytest.mark.promise("use-muon-missing")
    def test_a_missing_flag_names_the_group(self) -> None:
        layer = nn.Linear(4, 4)
        groups = [{"params": [layer.weight], "use_muon": True}, {"params": [layer.bias], "lr": 0.1}]
        with pytest.raises(ConfigError, match=r"^param_groups\[1\]\.use_muon: got 'nothing'; allowed: True .* False"):
            MuonWithAuxAdam(groups)

    @pytest.mark.promise("use-muon-missing")
    def test_a_flag_that_is_no_boolean_names_the_group(self) -> None:
        with pytest.raises(ConfigError, match=r"^param_groups\[0\]\.use_muon: got 'yes'; allowed: "):
            MuonWithAuxAdam([{"params": list(nn.Linear(4, 4).parameters()), "use_muon": "yes"}])

    @pytest.mark.promise("unread-field")
    def test_a_setting_of_the_other_kind_names_the_group(self) -> None:
        layer = nn.Linear(4, 4)
        groups = [
            {"params": [layer.bias], "use_muon": False},
            {"params": [layer.weight], "use_muon": True, "betas": (0.9, 0.95)},
        ]
        with pytest.raises(ConfigError, match=r"^param_groups\[1\]\.betas: 'muon' does not read it \(read by adamw"):
            MuonWithAuxAdam(groups)

    def test_a_vector_flagged_for_muon_is_an_error(self) -> None:
        with pytest.raises(ConfigError, match=r"^param_groups\[0\]\.params\[1\]: got rule 'muon' for shape \(4,\)"):
            MuonWithAuxAdam([{"params": list(nn.Linear(4, 4).parameters()), "use_muon": True}])

    @pytest.mark.promise("use-muon")
    def test_the_flag_beats_aspect_ratio_and_role(self) -> None:
        """His users decide; an embedding or a thin matrix that they flag is orthogonalized."""
        table = nn.Embedding(100, 4)
        (group,) = MuonWithAuxAdam([{"params": [table.weight], "use_muon": True}]).param_groups
        assert "momentum" in group

    @pytest.mark.promise("muon-convolutions")
    @pytest.mark.parametrize("filters", [nn.Conv1d(4, 8, 5), nn.Conv2d(4, 8, 3)], ids=["Conv1d", "Conv2d"])
    def test_convolution_filters_are_one_matrix_here_too(self, filters: nn.Module) -> None:
        """His muon_update views them as (out, rest). No register(model) is called on this door."""
        weight = filters.weight.detach().clone()
        layer = linears(weight.flatten(1))
        set_gradients([filters.weight], 1)
        layer[0].weight.grad = filters.weight.grad.flatten(1).clone()
        for parameter in (filters.weight, layer[0].weight):
            MuonWithAuxAdam([{"params": [parameter], "use_muon": True}]).step()
        change = filters.weight.detach().flatten(1) - weight.flatten(1)
        assert relative_error(change, layer[0].weight.detach() - weight.flatten(1)) < 1e-6

    def test_nothing_about_it_makes_deepspeed_take_it_for_its_own_muon(self) -> None:
        """DeepSpeed looks for "muon" in the class name, and for parameters with an attribute `use_muon`."""
        layer = nn.Linear(4, 4, bias=False)
        optimizer = MuonWithAuxAdam([{"params": [layer.weight], "use_muon": True}])
        assert inspect.isfunction(MuonWithAuxAdam)
        assert "muon" not in type(optimizer).__name__.lower()
        assert not hasattr(layer.weight, "use_muon")
        assert all("use_muon" not in group for group in optimizer.param_groups)


class TestGradients:
    @pytest.mark.parametrize("config", [MUON, ADAMW], ids=["muon", "adamw"])
    def test_a_gradient_of_zeros_is_a_gradient(self, config: dict[str, Any]) -> None:
        """It lets momentum fade and elementwise rules decay; a missing one does neither (see test_parameters)."""
        missing, zeros = models.build(), models.build()
        optimizers = [build_optimizer(model, config) for model in (missing, zeros)]
        for step in range(3):
            for model, optimizer in zip((missing, zeros), optimizers, strict=True):
                set_gradients(model.parameters(), step)
                if step > 0:
                    model.embed.weight.grad = None if model is missing else torch.zeros_like(model.embed.weight)
                optimizer.step()
        assert not torch.equal(missing.embed.weight, zeros.embed.weight)
        assert missing.embed.weight.grad is None

    @pytest.mark.parametrize("steps_before", [0, 3])
    def test_a_matrix_whose_whole_gradient_is_zero_is_neither_updated_nor_decayed(self, steps_before: int) -> None:
        """Its momentum still points somewhere, and Newton-Schulz would march on at full speed."""
        model = linears(matrix(8, 12), matrix(8, 12, seed=1))
        optimizer = build_optimizer(model, MUON)
        for step in range(steps_before):
            set_gradients(model.parameters(), step)
            optimizer.step()
        idle, busy = model[0].weight.detach().clone(), model[1].weight.detach().clone()
        set_gradients(model.parameters(), 9)
        model[0].weight.grad.zero_()
        optimizer.step()
        assert torch.equal(model[0].weight, idle)
        assert not torch.equal(model[1].weight, busy)

    def test_momentum_fades_while_the_gradient_is_zero(self) -> None:
        model = linears(matrix(8, 12))
        optimizer = build_optimizer(model, MUON)
        set_gradients(model.parameters(), 0)
        optimizer.step()
        before = optimizer.state[model[0].weight]["momentum_buffer"].clone()
        model[0].weight.grad.zero_()
        optimizer.step()
        torch.testing.assert_close(optimizer.state[model[0].weight]["momentum_buffer"], 0.95 * before)

    def test_one_element_that_is_not_zero_is_enough(self) -> None:
        model = linears(matrix(8, 12))
        before = model[0].weight.detach().clone()
        model[0].weight.grad = torch.zeros(8, 12)
        model[0].weight.grad[3, 4] = 1e-20
        build_optimizer(model, MUON).step()
        assert not torch.equal(model[0].weight, before)

    @pytest.mark.parametrize("config", [MUON, {**MUON, "nesterov": False}, ADAMW], ids=["muon", "no nesterov", "adamw"])
    def test_gradients_are_never_written_to(self, config: dict[str, Any]) -> None:
        model = models.build()
        optimizer = build_optimizer(model, config)
        for step in range(3):
            set_gradients(model.parameters(), step)
            before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            optimizer.step()
            assert_same_bits({name: parameter.grad for name, parameter in model.named_parameters()}, before)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("config", [MUON, ADAMW], ids=["muon", "adamw"])
    def test_one_that_is_not_finite_names_its_parameter_and_changes_nothing(self, config: dict[str, Any], value: float) -> None:
        model = models.build()
        optimizer = build_optimizer(model, config)
        for step in range(2):
            set_gradients(model.parameters(), step)
            if step == 1:
                model.odd.weight.grad[2, 3] = value
                before, state = parameters_of(model), optimizer.state[model.up.bias]["exp_avg"].clone()
                with pytest.raises(RuntimeError, match=r"^odd\.weight: its gradient is not finite; nothing was changed"):
                    optimizer.step()
            else:
                optimizer.step()
        assert_same_bits(parameters_of(model), before)
        assert torch.equal(optimizer.state[model.up.bias]["exp_avg"], state)

    def test_a_transposed_gradient_is_read_right(self) -> None:
        model, reference = linears(matrix(8, 12)), linears(matrix(8, 12))
        gradient = matrix(8, 12, seed=1)
        model[0].weight.grad, reference[0].weight.grad = gradient.T.contiguous().T, gradient
        build_optimizer(model, MUON).step()
        build_optimizer(reference, MUON).step()
        assert torch.equal(model[0].weight, reference[0].weight)


class TestMatrices:
    """Whatever a matrix is part of, its update is a function of it alone. 1e-6: float32 products in other batches."""

    def after_one_step(self, model: nn.Module, gradients: Sequence[Tensor]) -> list[Tensor]:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        build_optimizer(model, {**MUON, **EXACT}).step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    @pytest.mark.parametrize("shape", SHAPES)
    def test_matrices_of_one_shape_do_not_influence_each_other(self, shape: tuple[int, int]) -> None:
        weights = [matrix(*shape, seed) for seed in range(3)]
        gradients = [matrix(*shape, seed) for seed in (10, 11, 12)]
        gradients[1] = gradients[1] * 1e6
        together = self.after_one_step(linears(*weights), gradients)
        for found, weight, gradient in zip(together, weights, gradients, strict=True):
            (alone,) = self.after_one_step(linears(weight), [gradient])
            assert relative_error(found, alone) < 1e-6

    @pytest.mark.promise("muon-convolutions")
    @pytest.mark.parametrize(
        "filters", [nn.Conv1d(4, 8, 5), nn.Conv2d(4, 8, 3), nn.Conv3d(2, 8, 2)], ids=["Conv1d", "Conv2d", "Conv3d"]
    )
    def test_convolution_filters_are_stepped_as_the_matrix_of_outputs_by_the_rest(self, filters: nn.Module) -> None:
        filters.bias = None
        weight = filters.weight.detach().flatten(1).clone()
        gradient = matrix(*weight.shape, seed=1)
        (as_matrix,) = self.after_one_step(linears(weight), [gradient])
        (found,) = self.after_one_step(filters, [gradient.view_as(filters.weight)])
        assert relative_error(found.flatten(1), as_matrix) < 1e-6

    def test_a_bank_of_experts_is_stepped_as_separate_matrices(self) -> None:
        weights = torch.stack([matrix(6, 10, seed) for seed in range(4)])
        gradients = torch.stack([matrix(6, 10, seed) for seed in range(10, 14)])
        gradients[2] = 0  # an expert that saw no token
        bank = nn.ParameterList([weights.clone()])
        (found,) = self.after_one_step(bank, [gradients])
        separate = self.after_one_step(linears(*weights), list(gradients))
        for expert in range(4):
            assert relative_error(found[expert], separate[expert]) < 1e-6
        assert torch.equal(found[2], weights[2])


class TestState:
    @pytest.mark.promise("state-buffers")
    def test_it_has_torchs_names(self) -> None:
        """Muon has one buffer, AdamW two."""
        model = nn.Sequential(nn.Linear(4, 6))
        optimizer = build_optimizer(model, MUON)
        set_gradients(model.parameters(), 0)
        optimizer.step()
        assert set(optimizer.state[model[0].weight]) == {"momentum_buffer", "step"}
        assert set(optimizer.state[model[0].bias]) == {"exp_avg", "exp_avg_sq", "step"}
        shapes = {name: tuple(value.shape) for name, value in optimizer.state[model[0].weight].items()}
        assert shapes == {"momentum_buffer": (6, 4), "step": ()}

    def test_steps_are_counted_per_parameter(self) -> None:
        model = nn.Sequential(nn.Linear(4, 6))
        optimizer = build_optimizer(model, MUON)
        for step in range(3):
            set_gradients(model.parameters(), step)
            optimizer.step()
        assert [state["step"].item() for state in optimizer.state.values()] == [3, 3]

    def test_a_group_holds_only_what_a_schedule_may_change(self) -> None:
        optimizer = build_optimizer(nn.Linear(4, 4), MUON)
        matrices, scalars = optimizer.param_groups
        assert set(matrices) == {"params", "optforge_group", "lr", "weight_decay", "momentum"}
        assert set(scalars) == {"params", "optforge_group", "lr", "weight_decay", "betas"}

    @pytest.mark.parametrize("config", [MUON, ADAMW], ids=["muon", "adamw"])
    def test_a_saved_and_loaded_run_goes_on_bit_for_bit(self, config: dict[str, Any]) -> None:
        """Momentum and step count are part of it."""
        straight = models.build()
        train(straight, [build_optimizer(straight, config)], steps=6)
        first = models.build()
        optimizer = build_optimizer(first, config)
        train(first, [optimizer], steps=3)
        file = io.BytesIO()
        torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)  # tensors and plain data, no pickled classes
        second = models.build(seed=1)
        resumed = build_optimizer(second, config)
        second.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
        train(second, [resumed], steps=3, first=3)
        assert_same_bits(parameters_of(second), parameters_of(straight))

    def test_a_loaded_state_equals_the_saved_one(self) -> None:
        model = models.build()
        optimizer = build_optimizer(model, MUON)
        train(model, [optimizer], steps=2)
        saved = optimizer.state_dict()
        other = build_optimizer(models.build(), MUON)
        other.load_state_dict(saved)
        loaded = other.state_dict()
        assert loaded["param_groups"] == saved["param_groups"]
        assert loaded["state"].keys() == saved["state"].keys()
        for index, state in saved["state"].items():
            assert_same_bits(loaded["state"][index], state)

    def test_a_checkpoint_of_other_groups_is_refused_before_anything_changes(self) -> None:
        model = models.build()
        optimizer = build_optimizer(model, MUON)
        train(model, [optimizer], steps=1)
        buffer = optimizer.state[model.up.weight]["momentum_buffer"]
        with pytest.raises(ConfigError, match=r"the checkpoint holds the parameter groups .* allowed: this run's"):
            optimizer.load_state_dict(build_optimizer(models.build(), ADAMW).state_dict())
        assert optimizer.state[model.up.weight]["momentum_buffer"] is buffer

    def test_a_checkpoint_that_was_routed_otherwise_names_the_parameter(self) -> None:
        """A hidden layer of 8 by 88 was adamw's until version 0.2; with the limit of then its checkpoint still fits."""

        def optimizer(**options: Any) -> OptForge:
            model = nn.ModuleDict({"thin": nn.Linear(8, 88, bias=False), "square": nn.Linear(8, 8, bias=False)})
            found = build_optimizer(model, {**MUON, "roles": {"matrix": {"lr": 0.1}}, **options})
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            found.step()
            return found

        saved = optimizer(max_aspect_ratio=10).state_dict()
        said = "thin.weight: is in the parameter group 'matrix.adamw' of the checkpoint and in 'matrix.muon' of this run"
        with pytest.raises(ConfigError, match=re.escape(said)):
            optimizer().load_state_dict(saved)
        optimizer(max_aspect_ratio=10).load_state_dict(saved)

    def test_learning_rates_of_a_checkpoint_are_loaded(self) -> None:
        optimizer, other = build_optimizer(nn.Linear(4, 4), MUON), build_optimizer(nn.Linear(4, 4), MUON)
        optimizer.param_groups[0]["lr"] = 0.123
        other.load_state_dict(optimizer.state_dict())
        assert other.param_groups[0]["lr"] == 0.123


class TestStep:
    def test_a_closure_is_run_with_gradients_and_its_loss_returned(self) -> None:
        model = models.build()
        optimizer = build_optimizer(model, MUON)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(*models.batch(0))
            loss.backward()
            return loss

        before = parameters_of(model)
        loss = optimizer.step(closure)
        assert loss is not None
        assert loss.item() == pytest.approx(models.build()(*models.batch(0)).item())
        assert not torch.equal(model.up.weight, before["up.weight"])

    @pytest.mark.parametrize(
        ("dtype", "config"),
        [
            (torch.bfloat16, MUON),
            (torch.float16, MUON),
            (torch.bfloat16, ADAMW),
            (torch.float16, ADAMW),
            (torch.float64, ADAMW),  # a matrix rule refuses it: see test_parameters
        ],
    )
    def test_parameters_of_any_floating_dtype_are_stepped(self, dtype: torch.dtype, config: dict[str, Any]) -> None:
        """As in float32, up to 2%: bfloat16 rounds weights (1/256) and gradients, which Newton-Schulz magnifies."""
        narrow, reference = models.build().to(dtype), models.build()
        for model in (narrow, reference):
            optimizer = build_optimizer(model, config)
            set_gradients(model.parameters(), 0)
            optimizer.step()
        for name, parameter in reference.named_parameters():
            found = narrow.get_parameter(name)
            assert found.dtype == dtype
            assert (found.detach().double() - parameter.detach().double()).norm() <= 0.02 * parameter.norm() + 1e-3, name

    def test_without_a_closure_it_returns_nothing(self) -> None:
        assert build_optimizer(models.build(), MUON).step() is None

    @pytest.mark.promise("muon-settings")
    @pytest.mark.parametrize("key", ["momentum", "lr", "weight_decay"])
    def test_what_a_schedule_changes_takes_effect(self, key: str) -> None:
        changed, other = linears(matrix(8, 12)), linears(matrix(8, 12))
        for model in (changed, other):
            optimizer = build_optimizer(model, MUON)
            for step in range(2):
                set_gradients(model.parameters(), step)
                if model is changed and step == 1:
                    optimizer.param_groups[0][key] /= 2
                optimizer.step()
        assert not torch.equal(changed[0].weight, other[0].weight)

    @pytest.mark.promise("muon-settings")
    def test_steps_of_newton_schulz_take_effect(self) -> None:
        results = []
        for steps in (5, 2):
            model = linears(matrix(8, 12))
            set_gradients(model.parameters(), 0)
            build_optimizer(model, {"name": "muon", "orthogonalization": {"steps": steps}}).step()
            results.append(model[0].weight.detach())
        assert not torch.equal(*results)

    def test_one_rate_written_into_groups_that_differ_is_refused(self) -> None:
        """What DeepSpeed's own schedulers do."""
        model = nn.Linear(4, 4)
        optimizer = build_optimizer(model, MUON)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        set_gradients(model.parameters(), 0)
        with pytest.raises(ConfigError, match=r"muon 0\.02, scalar\.adamw 0\.003\), but .* to 0\.01; .*OptForgeSchedule"):
            optimizer.step()

    def test_rates_that_a_loop_scales_by_hand_are_fine(self) -> None:
        """0.02 and 0.01, both halved: the first group now has the rate that the second one had."""
        model = nn.Linear(4, 4)
        optimizer = build_optimizer(model, {"name": "muon", "lr": 0.02, "adamw": {"lr": 0.01}})
        for step in range(3):
            set_gradients(model.parameters(), step)
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
        assert [group["lr"] for group in optimizer.param_groups] == [0.0025, 0.00125]

    def test_groups_of_ones_own_may_carry_settings(self) -> None:
        """Stronger than the configuration, weaker than an override."""
        model = linears(matrix(8, 12), matrix(8, 12, seed=1))
        build_optimizer(model, MUON)  # registers the names
        groups: list[dict[str, Any]] = [
            {"params": [model[0].weight], "lr": 0.5},
            {"params": [model[1].weight], "momentum": 0.1},
        ]
        optimizer = OptForge(groups, **MUON)
        assert [(group["lr"], group["momentum"]) for group in optimizer.param_groups] == [(0.5, 0.95), (0.02, 0.1)]
