"""`"average"`: an average of the trained weights of every rule, in plain PyTorch.

The oracle is torch.optim.swa_utils, bit for bit: the same lerp of the same float32 weights.
"""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from ds_optforge import ConfigError, build_optimizer, evaluation_weights
from ds_optforge.optimizer import OptForge
from tests import models
from tests.layers import linears, matrix

STEPS, START = 8, 4
EMA, TAIL = {"kind": "ema", "decay": 0.9}, {"kind": "tail", "start": START}
RULES: dict[str, dict[str, Any]] = {
    "muon": {"name": "muon", "lr": 0.02, "weight_decay": 0.1, "adamw": {"lr": 3e-3}},
    "normuon": {"name": "normuon", "lr": 0.02, "weight_decay": 0.1, "cautious_weight_decay": True, "adamw": {"lr": 3e-3}},
    "adamw": {"name": "adamw", "lr": 3e-3},
    "lion": {"name": "lion", "lr": 1e-3},
    "sgd": {"name": "sgd", "lr": 0.1},
}


def train(model: nn.Module, optimizer: OptForge, oracle: AveragedModel | None = None, last: int = STEPS) -> None:
    """Train up to step ``last``; the oracle takes part from step START on, if it is a tail's."""
    for step in range(last):
        model(*models.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if oracle is not None and (step + 1 >= START or oracle.multi_avg_fn.__name__ == "ema_update"):
            oracle.update_parameters(model)


def evaluated(model: nn.Module, optimizer: OptForge) -> dict[str, Tensor]:
    with evaluation_weights(optimizer):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def gradient(model: nn.Module, *values: float | None) -> None:
    """One constant gradient for each parameter; None for none."""
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.grad = None if value is None else torch.full_like(parameter, value)


@pytest.mark.promise("average-any-rule", "averaged-round-trip")
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("average", [EMA, TAIL], ids=["ema", "tail"])
def test_the_average_is_that_of_torchs_swa_utils(name: str, average: dict[str, Any]) -> None:
    model = models.build()
    function = get_ema_multi_avg_fn(0.9) if average is EMA else get_swa_multi_avg_fn()
    oracle = AveragedModel(model, multi_avg_fn=function)
    optimizer = build_optimizer(model, {**RULES[name], "average": average})
    train(model, optimizer, oracle)
    trained = bits(model)
    assert_same_bits(evaluated(model, optimizer), bits(oracle.module))
    assert_same_bits(bits(model), trained)
    assert not torch.equal(oracle.module.up.weight, model.up.weight)


@pytest.mark.parametrize("name", RULES)
def test_training_is_as_without(name: str) -> None:
    averaged, plain = models.build(), models.build()
    train(averaged, build_optimizer(averaged, {**RULES[name], "average": EMA}))
    train(plain, build_optimizer(plain, RULES[name]))
    assert_same_bits(bits(averaged), bits(plain))


class TestByHand:
    """sgd with rate 1 and gradients of -1 counts: the weights are 1, 2, 3, ... after each step."""

    def averages(self, average: dict[str, Any], steps: int = 5) -> list[float]:
        model = nn.Linear(3, 2, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = build_optimizer(model, {"name": "sgd", "lr": 1.0, "momentum": 0.0, "average": average})
        found = []
        for _ in range(steps):
            gradient(model, -1.0)
            optimizer.step()
            found.append(evaluated(model, optimizer)["weight"].unique().item())
        return found

    def test_an_ema_begins_with_the_weights_after_the_first_step(self) -> None:
        """Not with zeros or the initial weights: 1; then half of the average and half of the weight."""
        assert self.averages({"kind": "ema", "decay": 0.5}) == [1.0, 1.5, 2.25, 3.125, 4.0625]

    def test_an_ema_may_begin_later(self) -> None:
        """Until then there is no average, and the trained weights are evaluated."""
        assert self.averages({"kind": "ema", "decay": 0.5, "start": 3}) == [1.0, 2.0, 3.0, 3.5, 4.25]

    def test_a_tail_is_the_mean_from_its_start_on(self) -> None:
        assert self.averages({"kind": "tail", "start": 3}) == [1.0, 2.0, 3.0, 3.5, 4.0]

    def test_the_default_decay_is_that_of_torch(self) -> None:
        """Float32: 1 + 0.001 (2 - 1)."""
        assert self.averages({"kind": "ema"}, 2) == [1.0, pytest.approx(1.001, abs=1e-7)]


def test_a_skipped_parameter_keeps_its_average_and_a_gradient_of_zeros_counts_its_weight() -> None:
    """As its weight and its number of steps: nothing of it changes in that step."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = build_optimizer(model, {"name": "sgd", "lr": 1.0, "momentum": 0.0, "average": {"kind": "tail", "start": 1}})
    for values in ((-1.0, -1.0), (-1.0, -1.0), (None, 0.0)):
        gradient(model, *values)
        optimizer.step()
    first, second = evaluated(model, optimizer).values()
    assert first.unique().item() == 1.5  # of 1 and 2
    assert second.unique().item() == pytest.approx(5 / 3)  # of 1, 2 and 2


def test_a_matrix_without_gradient_counts_its_unchanged_weight() -> None:
    """A matrix rule leaves it alone, decay included."""
    model = linears(matrix(8, 8), matrix(8, 8))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = build_optimizer(model, {"name": "muon", "lr": 0.02, "weight_decay": 0.1, "average": EMA})
    for _ in range(3):
        gradient(model, 0.1, 0.0)
        optimizer.step()
    found = evaluated(model, optimizer)
    assert torch.equal(found["1.weight"], before[1])
    assert not torch.equal(found["0.weight"], before[0])


@pytest.mark.promise("average-any-rule")
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_kept_in_float32_whatever_the_model_and_the_state_are(dtype: torch.dtype, state_dtype: str) -> None:
    """In bfloat16 an average of decay 0.999 would stand still."""
    model = nn.Linear(64, 64, bias=False).to(dtype)
    config = {"name": "muon", "lr": 0.02, "state_dtype": state_dtype, "average": {"kind": "ema"}}
    optimizer = build_optimizer(model, config)
    expected = None
    for step in range(5):
        torch.manual_seed(step)
        model.weight.grad = torch.randn_like(model.weight)
        optimizer.step()
        weight = model.weight.detach().float()
        expected = weight.clone() if expected is None else expected.lerp_(weight, 1 - 0.999)
    kept = optimizer.state[model.weight]["weight_average"]
    assert kept.dtype == torch.float32
    assert torch.equal(kept, expected)
    assert evaluated(model, optimizer)["weight"].dtype == dtype


def test_weights_of_other_strides_are_averaged() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(4, 8, 3, bias=False).to(memory_format=torch.channels_last)
    oracle = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = build_optimizer(model, {"name": "muon", "average": EMA})
    for step in range(3):
        torch.manual_seed(step)
        model.weight.grad = torch.randn(8, 4, 3, 3)
        optimizer.step()
        oracle.update_parameters(model)
    with evaluation_weights(optimizer):
        assert torch.equal(model.weight, oracle.module.weight)
        assert model.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.promise("averaged-refusal")
def test_a_step_and_a_checkpoint_are_refused_inside() -> None:
    model = models.build()
    optimizer = build_optimizer(model, {**RULES["muon"], "average": EMA})
    train(model, optimizer, last=2)
    optimizer.eval()
    for action in (optimizer.step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match="on averaged weights; leave evaluation_weights"):
            action()
    optimizer.train()
    optimizer.step()


class TestStateDict:
    @pytest.mark.parametrize("average", [EMA, TAIL, {"kind": "tail", "start": 3}])
    def test_a_run_goes_on_from_it_bit_for_bit(self, average: dict[str, Any]) -> None:
        first = models.build()
        optimizer = build_optimizer(first, {**RULES["muon"], "average": average})
        train(first, optimizer, last=START)
        second = models.build()
        second.load_state_dict(first.state_dict())
        other = build_optimizer(second, {**RULES["muon"], "average": average})
        other.load_state_dict(optimizer.state_dict())
        for model, stepping in ((first, optimizer), (second, other)):
            train(model, stepping, last=3)
        assert_same_bits(evaluated(second, other), evaluated(first, optimizer))

    @pytest.mark.parametrize(
        ("saved", "loading", "message"),
        [
            ({}, {"average": EMA}, 'average: the checkpoint holds no .weight_average. of the group of .*: no "average"'),
            ({"average": EMA}, {}, 'average: the checkpoint holds .weight_average. of the group of .*: the same "average"'),
        ],
    )
    def test_one_with_an_average_and_one_without_are_told_apart(
        self, saved: dict[str, Any], loading: dict[str, Any], message: str
    ) -> None:
        first, second = models.build(), models.build()
        optimizer = build_optimizer(first, {**RULES["muon"], **saved})
        train(first, optimizer, last=1)
        with pytest.raises(ConfigError, match=message):
            build_optimizer(second, {**RULES["muon"], **loading}).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"name": "muon", "average": {}}, "average.kind: missing"),
        ({"name": "muon", "average": {"kind": "swa"}}, "average.kind: got 'swa' (str); allowed: 'ema' or 'tail'"),
        ({"name": "muon", "average": {"kind": "ema", "decay": 1.0}}, "average.decay: got 1.0 (float); allowed: less than 1"),
        (
            {"name": "muon", "average": {"kind": "ema", "start": 0}},
            "average.start: got 0 (int); allowed: greater than",
        ),
        ({"name": "muon", "average": {"kind": "tail"}}, "average.start: missing with kind 'tail'; allowed: the step"),
        ({"name": "muon", "average": {**TAIL, "decay": 0.9}}, "average.decay: got 0.9 with kind 'tail'"),
        (
            {"name": "schedule_free_adamw", "average": EMA},
            "average: got a section with 'schedule_free_adamw', which averages its weights itself; allowed: none",
        ),
        (
            {"name": "muon", "average": TAIL, "roles": {"embedding": {"name": "schedule_free_adamw"}}},
            "average: got a section with 'schedule_free_adamw'",
        ),
    ],
)
def test_what_cannot_be_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_optimizer(models.build(), params)
