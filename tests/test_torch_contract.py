"""The contract of torch.optim.Optimizer, for every registered rule, and every scheduler of torch by what it does."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from ds_optforge import ConfigError, OptForge, build_optimizer
from ds_optforge.rules import rule_names
from ds_optforge.testing.params import settings_of, usual
from tests.layers import set_gradients

RULES = rule_names()


def built(rule: str) -> tuple[nn.Module, OptForge]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12))
    return model, build_optimizer(model, usual(rule))


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("rule", RULES)
class TestEveryRule:
    def test_it_is_a_torch_optimizer_with_the_rules_scheduled_settings_as_defaults(self, rule: str) -> None:
        _, optimizer = built(rule)
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert set(optimizer.defaults) - {"differentiable"} == set(settings_of(rule).builds.scheduled)

    def test_a_group_has_its_parameters_its_name_and_the_settings_of_its_own_rule(self, rule: str) -> None:
        model, optimizer = built(rule)
        for group in optimizer.param_groups:
            scheduled = settings_of(group["optforge_group"].split(".")[1]).builds.scheduled
            assert set(group) == {"params", "optforge_group", *scheduled}
        given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert given == {id(parameter) for parameter in model.parameters()}

    def test_a_group_cannot_be_added_later(self, rule: str) -> None:
        """Its parameters would be planned apart from the rest, and under DeepSpeed no slice would hold them."""
        _, optimizer = built(rule)
        with pytest.raises(ConfigError, match=r"^add_param_group: .*allowed: all parameters when OptForge is built"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})

    def test_maximize_is_refused_by_name(self, rule: str) -> None:
        with pytest.raises(ConfigError, match=r"^optimizer\.params\.maximize: "):
            build_optimizer(nn.Linear(4, 4), {**usual(rule), "maximize": True})

    def test_its_repr_names_it_and_its_groups(self, rule: str) -> None:
        _, optimizer = built(rule)
        assert repr(optimizer).startswith("OptForge (\nParameter Group 0\n")
        assert all(group["optforge_group"] in repr(optimizer) for group in optimizer.param_groups)

    @pytest.mark.parametrize("to_none", [True, False])
    def test_zero_grad(self, rule: str, to_none: bool) -> None:
        model, optimizer = built(rule)
        set_gradients(model.parameters(), 0)
        optimizer.zero_grad(set_to_none=to_none)
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(gradient is None if to_none else not gradient.any() for gradient in gradients)

    def test_a_step_without_any_gradient_changes_nothing(self, rule: str) -> None:
        model, optimizer = built(rule)
        before = values(model)
        optimizer.step()
        assert all(map(torch.equal, values(model), before))
        assert not optimizer.state_dict()["state"]

    def test_a_closure_computes_the_gradients_of_the_step(self, rule: str) -> None:
        (model, optimizer), (other, stepped) = built(rule), built(rule)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(torch.ones(2, 12)).square().sum()
            loss.backward()
            return loss

        expected = other(torch.ones(2, 12)).square().sum()
        expected.backward()
        stepped.step()
        assert optimizer.step(closure) == expected
        assert all(map(torch.equal, model.parameters(), other.parameters()))

    def test_hooks_run_before_and_after_a_step(self, rule: str) -> None:
        model, optimizer = built(rule)
        set_gradients(model.parameters(), 0)
        start, seen = values(model), []
        same = lambda: all(map(torch.equal, values(model), start))  # noqa: E731
        optimizer.register_step_pre_hook(lambda *arguments: seen.append(("before", same())))
        optimizer.register_step_post_hook(lambda *arguments: seen.append(("after", same())))
        optimizer.step()
        assert seen == [("before", True), ("after", False)]

    def test_a_state_dict_goes_through_a_file_without_pickled_classes(self, rule: str) -> None:
        (model, optimizer), (other, resumed) = built(rule), built(rule)
        for step in range(2):
            set_gradients(model.parameters(), step)
            optimizer.step()
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        other.load_state_dict(weights)
        resumed.load_state_dict(state)
        for chosen, one in ((model, optimizer), (other, resumed)):
            set_gradients(chosen.parameters(), 2)
            one.step()
        assert all(map(torch.equal, model.parameters(), other.parameters()))


def chained(optimizer: torch.optim.Optimizer) -> Any:
    return schedulers.ChainedScheduler([schedulers.LinearLR(optimizer), schedulers.ExponentialLR(optimizer, 0.9)])


def sequential(optimizer: torch.optim.Optimizer) -> Any:
    parts = [schedulers.LinearLR(optimizer, 0.1, total_iters=3), schedulers.CosineAnnealingLR(optimizer, 10)]
    return schedulers.SequentialLR(optimizer, parts, milestones=[3])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (step + 1)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 3),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o),
    "LinearLR": lambda o: schedulers.LinearLR(o),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 7, eta_min=1e-5),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1, min_lr=1e-5),
    "ChainedScheduler": chained,
    "SequentialLR": sequential,
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, [0.02, 0.001], total_steps=12, cycle_momentum=False),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, [2e-3, 1e-4], [0.02, 0.001], step_size_up=3, cycle_momentum=False),
    "SWALR": lambda o: SWALR(o, [0.01, 0.0005], anneal_epochs=3),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_scheduler_of_torch_sets_the_rates_that_it_sets_for_torchs_own_optimizers(kind: str) -> None:
    """A group at 0.02 and one at 0.001, as two groups of torch.optim.SGD; and the step uses them."""
    model = nn.Linear(6, 4)
    ours = build_optimizer(model, {"name": "muon", "lr": 0.02, "adamw": {"lr": 0.001}})
    theirs = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.02}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.001}]
    )
    pairs = [(optimizer, SCHEDULERS[kind](optimizer)) for optimizer in (ours, theirs)]
    for step in range(10):
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer, _ in pairs]
        assert rates[0] == rates[1]
        set_gradients(model.parameters(), step)
        before = values(model)
        for optimizer, schedule in pairs:
            optimizer.step()
            schedule.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
        moved = [not torch.equal(a, b) for a, b in zip(values(model), before, strict=True)]
        assert moved == [rate > 0 for rate in rates[0]]


def test_no_scheduler_of_torch_is_left_out() -> None:
    known = {
        name
        for name, found in vars(schedulers).items()
        if isinstance(found, type) and issubclass(found, schedulers.LRScheduler) and found.__module__ == schedulers.__name__
    }
    assert known - {"LRScheduler", "_LRScheduler"} == set(SCHEDULERS) - {"SWALR"}
