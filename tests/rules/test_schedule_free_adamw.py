"""Schedule-Free AdamW against the authors' package, `schedulefree`."""

import io
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor, nn

from ds_optforge import OptForge, build_optimizer
from ds_optforge.rules.base import ElementwiseRule, MatrixRule
from ds_optforge.rules.schedule_free_adamw import ScheduleFreeAdamW
from tests import models
from tests.layers import bytes_per_parameter, linears, matrix, set_gradients, snapshot

CONFIG = {"name": "schedule_free_adamw", "lr": 0.01}


def oracle(model: nn.Module, **settings: Any) -> schedulefree.AdamWScheduleFree:
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), **{"lr": 0.01, "betas": (0.9, 0.999), **settings})
    optimizer.train()
    return optimizer


def trained(steps: int = 3, **settings: Any) -> tuple[models.AwkwardNet, OptForge]:
    """A model and its optimizer after a few steps of training."""
    model = models.build()
    optimizer = build_optimizer(model, {**CONFIG, **settings})
    train(model, optimizer, 0, steps)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(*models.batch(step)).backward()
        optimizer.step()


@pytest.mark.promise("schedule-free-points")
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("warmup_steps", [0, 5, 40])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.7, 0.9)])
@pytest.mark.parametrize("shape", [(24, 40), (33, 7), (1, 5)])
def test_all_three_points_are_the_oracles(
    shape: tuple[int, int], betas: tuple[float, float], warmup_steps: int, weight_decay: float
) -> None:
    """y is compared after every step, z and x at the end. 1e-12: float64, in another order of operations."""
    settings = {"betas": betas, "warmup_steps": warmup_steps, "weight_decay": weight_decay, "eps": 1e-8}
    ours, reference = linears(matrix(*shape, dtype=torch.float64)), linears(matrix(*shape, dtype=torch.float64))
    optimizer, theirs = build_optimizer(ours, {**CONFIG, **settings}), oracle(reference, **settings)
    weight, expected = ours[0].weight, reference[0].weight
    for step in range(20):
        set_gradients(ours.parameters(), step)
        set_gradients(reference.parameters(), step)  # the oracle overwrites its gradient
        optimizer.step()
        theirs.step()
        torch.testing.assert_close(weight.detach(), expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(optimizer.state[weight]["z"], theirs.state[expected]["z"], rtol=0, atol=1e-12)
    optimizer.eval()
    theirs.eval()
    torch.testing.assert_close(weight.detach(), expected.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "rates", [(0.02, 0.01, 0.005, 0.01, 0.02, 0.03), (0.0, 0.0, 0.01, 0.02, 0.0)], ids=["falls", "begins at 0"]
)
def test_weights_follow_the_largest_rate_so_far(rates: tuple[float, ...]) -> None:
    """A schedule on top changes the rate from step to step, and the oracle's with it. 1e-12: float64."""
    ours, reference = linears(matrix(9, 5, dtype=torch.float64)), linears(matrix(9, 5, dtype=torch.float64))
    optimizer, theirs = build_optimizer(ours, CONFIG), oracle(reference)
    for step, rate in enumerate(rates):
        set_gradients(ours.parameters(), step)
        set_gradients(reference.parameters(), step)
        for group in (*optimizer.param_groups, *theirs.param_groups):
            group["lr"] = rate
        optimizer.step()
        theirs.step()
        torch.testing.assert_close(ours[0].weight.detach(), reference[0].weight.detach(), rtol=0, atol=1e-12)


@pytest.mark.promise("schedule-free-warm-up")
@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_the_first_steps_ramp_up(warmup_steps: int) -> None:
    """With a constant gradient, z moves by the learning rate, which grows by lr / warmup_steps a step."""
    model = linears(torch.zeros(2, 2, dtype=torch.float64))
    optimizer = build_optimizer(model, {**CONFIG, "warmup_steps": warmup_steps})
    moved = []
    for _ in range(6):
        before = optimizer.state[model[0].weight].get("z", torch.zeros(2, 2)).clone()
        model[0].weight.grad = torch.ones(2, 2, dtype=torch.float64)
        optimizer.step()
        moved.append((before - optimizer.state[model[0].weight]["z"])[0, 0].item())
    expected = [0.01 * min((step + 1) / max(warmup_steps, 1), 1) for step in range(6)]
    assert moved == pytest.approx(expected, rel=1e-6)  # eps beside a gradient of 1


@pytest.mark.promise("state-buffers")
def test_its_state_is_two_buffers() -> None:
    """The average is recomputed, not stored."""
    model = linears(matrix(8, 12))
    optimizer = build_optimizer(model, CONFIG)
    set_gradients(model.parameters(), 0)
    optimizer.step()
    state = optimizer.state[model[0].weight]
    assert {name for name, value in state.items() if isinstance(value, Tensor)} == {"exp_avg_sq", "z", "step"}


class TestEvaluation:
    @pytest.mark.promise("schedule-free-points", "averaged-round-trip")
    def test_the_average_is_the_oracles_on_a_real_model(self) -> None:
        """1e-5: float32, with an eps that keeps tiny gradients from deciding."""
        model, optimizer = trained(steps=20, eps=1e-5, warmup_steps=5)
        reference = models.build()
        theirs = oracle(reference, eps=1e-5, warmup_steps=5, weight_decay=0.0)
        train(reference, theirs, 0, 20)
        optimizer.eval()
        theirs.eval()
        for name, weight in snapshot(reference).items():
            torch.testing.assert_close(model.get_parameter(name).detach(), weight, rtol=1e-5, atol=1e-5)

    @pytest.mark.promise("averaged-round-trip")
    def test_there_and_back_is_bit_exact(self) -> None:
        model, optimizer = trained()
        before = snapshot(model)
        optimizer.eval()
        assert not any(torch.equal(model.get_parameter(name), weight) for name, weight in before.items())
        optimizer.train()
        for name, weight in before.items():
            assert torch.equal(model.get_parameter(name), weight), name

    @pytest.mark.promise("averaged-evaluation")
    def test_the_model_computes_with_the_average(self) -> None:
        model, optimizer = trained(steps=10)
        at_training_point = model(*models.batch(0)).item()
        optimizer.eval()
        at_average = model(*models.batch(0)).item()
        exported = models.build()
        exported.load_state_dict(model.state_dict())
        assert at_average != at_training_point
        assert exported(*models.batch(0)).item() == at_average

    @pytest.mark.promise("averaged-round-trip")
    def test_training_goes_on_as_if_nothing_had_been(self) -> None:
        straight, _ = trained(steps=6)
        model, optimizer = trained(steps=3)
        optimizer.eval()
        optimizer.train()
        train(model, optimizer, 3, 3)
        for name, weight in snapshot(straight).items():
            assert torch.equal(model.get_parameter(name), weight), name

    def test_saying_it_twice_changes_nothing(self) -> None:
        model, optimizer = trained()
        before = snapshot(model)
        optimizer.eval()
        inside = snapshot(model)
        optimizer.eval()
        assert all(torch.equal(model.get_parameter(name), weight) for name, weight in inside.items())
        optimizer.train()
        optimizer.train()
        assert all(torch.equal(model.get_parameter(name), weight) for name, weight in before.items())

    def test_before_the_first_step_the_average_is_the_weight(self) -> None:
        model = models.build()
        before = snapshot(model)
        optimizer = build_optimizer(model, CONFIG)
        optimizer.eval()
        assert all(torch.equal(model.get_parameter(name), weight) for name, weight in before.items())

    @pytest.mark.promise("averaged-refusal")
    def test_a_step_inside_is_refused(self) -> None:
        model, optimizer = trained()
        optimizer.eval()
        inside = snapshot(model)
        with pytest.raises(RuntimeError, match=r"^step\(\) on averaged weights; leave evaluation_weights\(\) or call"):
            optimizer.step()
        assert all(torch.equal(model.get_parameter(name), weight) for name, weight in inside.items())
        optimizer.train()
        optimizer.step()

    @pytest.mark.promise("averaged-refusal")
    def test_a_training_checkpoint_inside_is_refused(self) -> None:
        _, optimizer = trained()
        optimizer.eval()
        with pytest.raises(RuntimeError, match=r"^state_dict\(\) on averaged weights; leave evaluation_weights\(\) or call"):
            optimizer.state_dict()
        optimizer.train()
        assert optimizer.state_dict()["state"]

    def test_only_the_parameters_it_trains_are_averaged(self) -> None:
        model, optimizer = trained(roles={"embedding": {"name": "adamw", "lr": 0.01}})
        before = snapshot(model)
        optimizer.eval()
        same = [name for name, weight in before.items() if torch.equal(model.get_parameter(name), weight)]
        assert same == ["embed.weight"]


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    """Sums of weights and the largest rate so far are state too."""
    straight, _ = trained(steps=6, warmup_steps=4)
    first, optimizer = trained(steps=3, warmup_steps=4)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = models.build(seed=1)
    resumed = build_optimizer(second, {**CONFIG, "warmup_steps": 4})
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, 3, 3)
    for name, weight in snapshot(straight).items():
        assert torch.equal(second.get_parameter(name), weight), name


def test_gradients_stay_unchanged() -> None:
    """The oracle's do not."""
    model = linears(matrix(8, 12))
    optimizer = build_optimizer(model, {**CONFIG, "weight_decay": 0.1})
    set_gradients(model.parameters(), 0)
    before = model[0].weight.grad.clone()
    optimizer.step()
    assert torch.equal(model[0].weight.grad, before)


def test_it_is_an_elementwise_rule() -> None:
    rule = ScheduleFreeAdamW(eps=1e-8, warmup_steps=0)
    assert isinstance(rule, ElementwiseRule)
    assert not isinstance(rule, MatrixRule)


@pytest.mark.promise("state-buffers", "8bit-size")
@pytest.mark.parametrize(("state_dtype", "nbytes"), [("float32", 8.0), ("bfloat16", 6.0), ("8bit", 5.016)])
def test_bytes_of_state_per_parameter(state_dtype: str, nbytes: float) -> None:
    """Two buffers, but z is a weight: 4 bytes. 0.001: the step counters."""
    if state_dtype == "8bit":
        pytest.importorskip("bitsandbytes")
    config = {"name": "schedule_free_adamw", "state_dtype": state_dtype, "betas": (0.9, 0.99)}
    assert bytes_per_parameter(config) == pytest.approx(nbytes, abs=1e-3)
