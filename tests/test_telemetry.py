"""What a recorded step says, against the same numbers computed from weights and gradients here."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_optforge import ConfigError, OptForge, build_optimizer
from ds_optforge.rules import rule_names
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
