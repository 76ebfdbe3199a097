"""What a recorded step says, against the same numbers computed from weights and gradients here."""

import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_optforge import ConfigError, OptForge, build_optimizer
from ds_optforge.rules import rule_names
from ds_optforge.step.health import PATIENCE
from ds_optforge.step.telemetry import SAMPLE
from tests import models, oracles
from tests.layers import linears, matrix, set_gradients, snapshot

LR = 0.02
MUON = {"name": "muon", "lr": LR, "weight_decay": 0.1, "adamw": {"lr": 3e-3}, **oracles.EXACT}
ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1, "betas": [0.9, 0.95]}
CAUTIOUS = {**ADAMW, "cautious_weight_decay": True}


def watched(model: nn.Module, params: dict[str, Any], every: int = 1) -> OptForge:
    return build_optimizer(model, {**params, "telemetry": {"every": every}})


def take_steps(model: nn.Module, optimizer: OptForge, steps: int) -> tuple[dict[str, Tensor], list[list[Tensor]]]:
    """The weights before the last step, and the gradients of each step, in float64."""
    before, gradients = snapshot(model), []
    for step in range(steps):
        set_gradients(model.parameters(), step)
        gradients.append([parameter.grad.double() for parameter in model.parameters() if parameter.grad is not None])
        before = snapshot(model)
        optimizer.step()
    return before, gradients


def rms(tensors: list[Tensor]) -> float:
    return float(torch.cat([tensor.double().flatten() for tensor in tensors]).square().mean().sqrt())


def cosine(left: list[Tensor], right: list[Tensor]) -> float:
    a, b = (torch.cat([tensor.double().flatten() for tensor in side]) for side in (left, right))
    return float(a @ b / (a.norm() * b.norm()))


def averages(gradients: list[list[Tensor]], rate: float) -> list[Tensor]:
    """m <- rate m + (1 - rate) g, from zero."""
    found = [torch.zeros_like(gradient) for gradient in gradients[0]]
    for step in gradients:
        found = [rate * m + (1 - rate) * g for m, g in zip(found, step, strict=True)]
    return found


def orthogonality_error(factor: Tensor) -> float:
    """||O O^T - I||_F / sqrt(min(rows, cols))"""
    gram = factor @ factor.T if factor.shape[0] <= factor.shape[1] else factor.T @ factor
    return float((gram - torch.eye(len(gram), dtype=gram.dtype)).norm() / math.sqrt(len(gram)))


class TestNumbers:
    def test_of_a_matrix_rule(self) -> None:
        model = linears(matrix(12, 20), matrix(20, 12, seed=1), matrix(16, 16, seed=2))
        optimizer = watched(model, MUON)
        before, gradients = take_steps(model, optimizer, steps=3)
        momenta = averages(gradients, 0.95)
        directions = [0.05 * g + 0.95 * m for g, m in zip(gradients[-1], momenta, strict=True)]
        errors = [orthogonality_error(oracles.newton_schulz(direction)) for direction in directions]
        change = rms([after - before[name] for name, after in snapshot(model).items()])
        parameter = rms(list(before.values()))
        found = optimizer.telemetry["groups"]["matrix.muon"]
        assert found == {
            "update_rms": pytest.approx(change, rel=1e-4),
            "parameter_rms": pytest.approx(parameter, rel=1e-5),
            "update_to_parameter": pytest.approx(change / parameter, rel=1e-4),
            "momentum_gradient_cosine": pytest.approx(cosine(momenta, gradients[-1]), abs=1e-5),
            "orthogonality_error": pytest.approx(math.sqrt(sum(error**2 for error in errors) / 3), rel=1e-3),
            "effective_lr": pytest.approx(LR * (1 + math.sqrt(20 / 12) + 1) / 3),
            "state_bytes": 4 * (240 + 240 + 256),
        }
        assert 0.05 < found["orthogonality_error"] < 0.5  # five quintic steps leave singular values between 0.7 and 1.2

    @pytest.mark.parametrize(
        ("params", "rate", "nbytes"),
        [(ADAMW, 0.9, 8), ({"name": "lion"}, 0.99, 4), (CAUTIOUS, 0.9, 8)],
        ids=["adamw", "lion", "cautious"],
    )
    def test_of_an_elementwise_rule(self, params: dict[str, Any], rate: float, nbytes: int) -> None:
        model = linears(matrix(12, 20), matrix(20, 12, seed=1))
        optimizer = watched(model, params)
        before, gradients = take_steps(model, optimizer, steps=3)
        change, parameter = rms([w - before[key] for key, w in snapshot(model).items()]), rms(list(before.values()))
        assert optimizer.telemetry["groups"][f"matrix.{params['name']}"] == {
            "update_rms": pytest.approx(change, rel=1e-4),
            "parameter_rms": pytest.approx(parameter, rel=1e-5),
            "update_to_parameter": pytest.approx(change / parameter, rel=1e-4),
            "momentum_gradient_cosine": pytest.approx(cosine(averages(gradients, rate), gradients[-1]), abs=1e-5),
            "effective_lr": optimizer.param_groups[0]["lr"],
            "state_bytes": nbytes * 480,
        }

    def test_schedule_free_has_no_momentum_and_its_own_warm_up(self) -> None:
        model = linears(matrix(12, 20))
        optimizer = watched(model, {"name": "schedule_free_adamw", "warmup_steps": 4})
        take_steps(model, optimizer, steps=3)
        found = optimizer.telemetry["groups"]["matrix.schedule_free_adamw"]
        assert "momentum_gradient_cosine" not in found
        assert found["effective_lr"] == pytest.approx(2.5e-3 * 3 / 4)

    def test_bytes_of_8_bit_state_count_codes_and_scales(self) -> None:
        pytest.importorskip("bitsandbytes")
        model = linears(matrix(64, 128))
        optimizer = watched(model, {"name": "adamw_8bit"})
        take_steps(model, optimizer, steps=1)
        assert optimizer.telemetry["groups"]["matrix.adamw_8bit"]["state_bytes"] == 2 * (8192 + 4 * 8192 // 256)

    def test_every_group_has_its_own(self) -> None:
        model = models.build()
        optimizer = watched(model, MUON)
        take_steps(model, optimizer, steps=1)
        groups = {group["optforge_group"] for group in optimizer.param_groups}
        assert (
            set(optimizer.telemetry["groups"])
            == groups
            == {
                "embedding.adamw",
                "matrix.muon",
                "scalar.adamw",
                "unembedding.adamw",
            }
        )

    def test_a_matrix_without_a_gradient_is_no_matrix_that_is_not_orthogonal(self) -> None:
        idle, alone = linears(matrix(12, 20), matrix(20, 12, seed=1)), linears(matrix(12, 20))
        errors = []
        for model in (idle, alone):
            optimizer = watched(model, MUON)
            set_gradients(model.parameters(), 0)
            for parameter in list(model.parameters())[1:]:
                parameter.grad = None
            optimizer.step()
            errors.append(optimizer.telemetry["groups"]["matrix.muon"]["orthogonality_error"])
        assert errors[0] == pytest.approx(errors[1])

    def test_weights_that_are_zero_have_no_ratio(self) -> None:
        model = linears(torch.zeros(8, 8))
        optimizer = watched(model, MUON)
        take_steps(model, optimizer, steps=1)
        found = optimizer.telemetry["groups"]["matrix.muon"]
        assert found["parameter_rms"] == 0
        assert "update_to_parameter" not in found

    def test_only_a_sample_of_many_matrices_is_looked_at(self) -> None:
        """Equal matrices with equal gradients, but for as many others as the sample has room for: it cannot see them all."""
        count = 2 * SAMPLE
        model = linears(*(matrix(8, 12) for _ in range(count)))
        optimizer = watched(model, MUON)
        errors = []
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = matrix(8, 12, seed=index)
            errors.append(orthogonality_error(oracles.newton_schulz(matrix(8, 12, seed=index, dtype=torch.float64))) ** 2)
        optimizer.step()
        found = optimizer.telemetry["groups"]["matrix.muon"]["orthogonality_error"]
        assert min(errors) < found**2 < max(errors)
        assert found**2 != pytest.approx(sum(errors) / count, rel=1e-6)


class TestWhen:
    def test_off_there_is_nothing(self) -> None:
        model = linears(matrix(8, 12))
        optimizer = build_optimizer(model, MUON)
        take_steps(model, optimizer, steps=2)
        assert optimizer.telemetry == {}

    def test_every_third_step(self) -> None:
        model = linears(matrix(8, 12))
        optimizer = watched(model, MUON, every=3)
        seen = []
        for step in range(7):
            set_gradients(model.parameters(), step)
            optimizer.step()
            seen.append(optimizer.telemetry.get("step"))
        assert seen == [None, None, 3, 3, 3, 6, 6]

    def test_a_resumed_run_records_the_same_steps(self) -> None:
        model = linears(matrix(8, 12))
        optimizer = watched(model, MUON, every=3)
        take_steps(model, optimizer, steps=2)
        other = watched(model, MUON, every=3)
        other.load_state_dict(optimizer.state_dict())
        take_steps(model, other, steps=1)
        assert other.telemetry["step"] == 3

    def test_groups_that_count_differently_are_recorded_all_the_same(self) -> None:
        """As after loading what fits of another optimizer's state."""
        model = nn.Linear(8, 8)
        optimizer = watched(model, MUON, every=2)
        take_steps(model, optimizer, steps=2)
        optimizer.state[model.bias]["step"] += 1
        seen = []
        for step in range(4):
            set_gradients(model.parameters(), step)
            optimizer.step()
            seen.append(optimizer.telemetry["step"])
        assert seen == [2, 4, 4, 6] or seen == [4, 4, 6, 6]
        assert set(optimizer.telemetry["groups"]) == {"matrix.muon", "scalar.adamw"}

    @pytest.mark.parametrize("params", [*({"name": name} for name in rule_names()), CAUTIOUS], ids=[*rule_names(), "cautious"])
    def test_the_steps_are_the_same_with_it(self, params: dict[str, Any]) -> None:
        """Bit for bit; 600 x 500 is more than what is looked at at a time."""
        if params["name"] == "adamw_8bit":
            pytest.importorskip("bitsandbytes")
        weights = []
        for watch in (True, False):
            model = linears(matrix(600, 500), matrix(40, 33, seed=1))
            optimizer = watched(model, params, every=2) if watch else build_optimizer(model, params)
            take_steps(model, optimizer, steps=4)
            weights.append([parameter.detach() for parameter in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def rank_one(step: int, rows: int = 32, cols: int = 48) -> Tensor:
    """The same direction in every step."""
    return torch.outer(matrix(rows, 1, seed=7).flatten(), matrix(cols, 1, seed=8).flatten())


def noise(step: int, rows: int = 32, cols: int = 48) -> Tensor:
    return matrix(rows, cols, seed=step)


def growing(step: int) -> Tensor:
    return 1.5**step * noise(0)


class TestHealth:
    """A warning where a number is outside of its range for `PATIENCE` records."""

    @staticmethod
    def warnings(
        caplog: pytest.LogCaptureFixture,
        gradients: Sequence[Callable[[int], Tensor]],
        params: dict[str, Any] = MUON,
        weights: Sequence[Tensor] = (matrix(32, 48),),
    ) -> list[str]:
        """What is warned of in steps with these gradients of the first of the weights; every step is recorded."""
        model = linears(*weights)
        optimizer = watched(model, params)
        with caplog.at_level(logging.WARNING, logger="ds_optforge"):
            for step, gradient in enumerate(gradients):
                next(model.parameters()).grad = gradient(step).to(weights[0].dtype)
                optimizer.step()
        return [record.getMessage() for record in caplog.records]

    @pytest.mark.parametrize("scale", ["shape", "match_rms_adamw", "spectral", "none"])
    @pytest.mark.parametrize("name", ["muon", "muon_squared", "aurora", "normuon"])
    def test_none_on_ordinary_gradients(self, name: str, scale: str, caplog: pytest.LogCaptureFixture) -> None:
        params = {"name": name, "lr": LR, "weight_decay": 1.0, "orthogonalization": {"scale": scale}, "adamw": {"lr": 1e-3}}
        assert self.warnings(caplog, [noise] * (PATIENCE + 1), params) == []

    @pytest.mark.parametrize("params", [ADAMW, CAUTIOUS, {"name": "lion"}, {"name": "sgd"}, {"name": "schedule_free_adamw"}])
    def test_none_of_an_elementwise_rule_on_ordinary_gradients(
        self, params: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        assert self.warnings(caplog, [noise] * (PATIENCE + 1), params) == []

    def test_a_momentum_of_one_direction_is_warned_of_once(self, caplog: pytest.LogCaptureFixture) -> None:
        """It names the group, the number and its value, the range and the page. sqrt(31 / 32) = 0.984."""
        error, size = sorted(self.warnings(caplog, [rank_one] * (2 * PATIENCE + 2), {**MUON, "weight_decay": 0.0}))
        assert re.fullmatch(
            r"matrix\.muon: orthogonality_error is 0\.98\d in step 20, and has been outside of its healthy range "
            r"\(here 0 to 0\.[56]\d*\) for 20 records; docs/telemetry\.md says what to do",
            error,
        )
        assert size.startswith("matrix.muon: update_rms is ")

    def test_the_records_are_in_a_row(self, caplog: pytest.LogCaptureFixture) -> None:
        """Between them the momentum of noise is a larger one."""
        loud = [lambda step: 1e6 * noise(step)] * 2
        few = [rank_one] * (PATIENCE - 1)
        model_of_one_step = {**MUON, "momentum": 0.0, "weight_decay": 0.0}
        assert self.warnings(caplog, [*few, *loud, *few], model_of_one_step) == []
        assert len(self.warnings(caplog, [*few, rank_one], model_of_one_step)) == 2

    def test_updates_that_bfloat16_weights_swallow_are_too_small(self, caplog: pytest.LogCaptureFixture) -> None:
        """1e-6 a step, beside weights of 1."""
        params = {**MUON, "lr": 1e-5, "weight_decay": 0.0}
        (found,) = self.warnings(caplog, [noise] * PATIENCE, params, [torch.ones(32, 48, dtype=torch.bfloat16)])
        assert found.startswith("matrix.muon: update_rms is 0 in step 20")

    def test_matrices_without_gradients_are_in_the_size_of_the_groups_update(self, caplog: pytest.LogCaptureFixture) -> None:
        """One of four alike has one: half of the group's root mean square."""
        weights = [matrix(32, 48, seed=seed) for seed in range(4)]
        (found,) = self.warnings(caplog, [noise] * PATIENCE, {**MUON, "weight_decay": 0.0}, weights)
        assert found.startswith("matrix.muon: update_rms is ")

    def test_adamws_updates_are_too_large_while_gradients_grow(self, caplog: pytest.LogCaptureFixture) -> None:
        """By half in each step: (0.5 / (1 - 0.5 / 1.5)) / sqrt(0.1 / (1 - 0.9 / 1.5^2)) = 1.84 times the rate."""
        (found,) = self.warnings(caplog, [growing] * (PATIENCE + 9), {**ADAMW, "betas": [0.5, 0.9], "weight_decay": 0.0})
        assert re.match(r"matrix\.adamw: update_rms is 0\.001[78]\d? in step \d+, .*\(here 0 to 0\.00101\)", found)

    def test_a_large_decay_is_part_of_the_range(self, caplog: pytest.LogCaptureFixture) -> None:
        """A third of the weight in each step, far more than the update."""
        assert self.warnings(caplog, [noise] * PATIENCE, {**MUON, "weight_decay": 16.0}) == []

    def test_a_rule_that_says_nothing_is_never_warned_of(self, caplog: pytest.LogCaptureFixture) -> None:
        assert self.warnings(caplog, [growing] * PATIENCE, {"name": "sgd", "lr": 1e-6}) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_other_dtypes(dtype: torch.dtype) -> None:
    model = linears(matrix(24, 32, dtype=dtype))
    optimizer = watched(model, MUON)
    before, _ = take_steps(model, optimizer, steps=1)
    found = optimizer.telemetry["groups"]["matrix.muon"]
    assert found["update_rms"] == pytest.approx(rms([model[0].weight.detach() - before["0.weight"]]), rel=0.01)
    assert found["momentum_gradient_cosine"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"every": 0}, r"params\.telemetry\.every: got 0 .*greater than or equal to 1"),
        ({}, r"params\.telemetry\.every: missing"),
        ({"evry": 2, "every": 2}, r"params\.telemetry\.evry: unknown key; did you mean 'every'\?"),
    ],
)
def test_bad_sections_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(linears(matrix(8, 12)), {**MUON, "telemetry": section})
