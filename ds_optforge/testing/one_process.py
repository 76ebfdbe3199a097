"""Checks in plain PyTorch: odd gradients (all zero, not finite), what a step leaves of them, the state's size and its file.

Each yields a sentence for every failure. (Under ZeRO, DeepSpeed skips a step whose gradients are not finite.)
"""

import copy
import io
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import ds_optforge
from ds_optforge.optimizer import groups_of
from ds_optforge.rules.base import factors_of, kept_by, statistics_of
from ds_optforge.step.slices import Members
from ds_optforge.testing import model as awkward
from ds_optforge.testing.engines import device
from ds_optforge.testing.params import formats_of, in_format
from ds_optforge.testing.training import at
from ds_optforge.zero.group_plan import matrices_of

Params = Mapping[str, Any]


class Subject:
    """The awkward model and its optimizer, given gradients that are drawn."""

    def __init__(self, params: Params, steps: int = 0) -> None:
        self.model = awkward.build().to(device())
        self.optimizer = ds_optforge.build_optimizer(self.model, params)
        for step in range(steps):
            self.step(step)

    def step(self, seed: int) -> None:
        self.draw(seed)
        self.optimizer.step()

    def draw(self, seed: int) -> None:
        """Gradients that depend on the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)

    def everything(self) -> dict[str, Any]:
        """Copies of weights, state and what is in the groups."""
        found: dict[str, Any] = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        saved = copy.deepcopy(self.optimizer.state_dict())
        for index, state in saved["state"].items():
            found |= {f"state {index}, {key}": value for key, value in state.items()}
        return {**found, "param_groups": saved["param_groups"]}

    def matrices(self) -> list[str]:
        """The parameters that a matrix rule steps."""
        return [
            route.name for members in groups_of(self.optimizer).members.values() for route in members.routes if route.matrices
        ]


def other(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    """What is not the same bit for bit."""
    if found.keys() != expected.keys():
        yield f"{sorted(found.keys() ^ expected.keys())}: there before or afterwards only"
    names = [
        name
        for name in found.keys() & expected.keys()
        if not (torch.equal(found[name], expected[name]) if isinstance(found[name], Tensor) else found[name] == expected[name])
    ]
    if names:
        yield f"{', '.join(sorted(names))}: not the same bit for bit"


def zero_gradient(rule: str, params: Params) -> Iterator[str]:
    """A matrix whose gradient is all zero is neither updated nor decayed, and keeps its statistics and factors.

    Nothing becomes NaN. A parameter whose gradient is missing keeps everything, for every rule.
    """
    for form in formats_of(rule):
        for steps in (0, 2):
            missing, zero = (Subject(in_format(params, form), steps) for _ in range(2))
            before = missing.everything()
            missing.optimizer.zero_grad()
            zero.draw(steps)
            for parameter in zero.model.parameters():
                parameter.grad = None if parameter.grad is None else torch.zeros_like(parameter.grad)
            for subject in (missing, zero):
                subject.optimizer.step()
            where = f"{form}, after {steps} steps"
            yield from at(f"{where}, a missing gradient", other(missing.everything(), before))
            yield from at(where, _moved(zero, before))


def _moved(subject: Subject, before: Mapping[str, Any]) -> Iterator[str]:
    """Idle matrices that have changed, and values that are not finite."""
    after = subject.everything()
    matrices = subject.matrices()
    yield from other({name: after[name] for name in matrices}, {name: before[name] for name in matrices})
    rules = [members.rule for members in groups_of(subject.optimizer).members.values()]
    declared = {found.name for rule in rules for found in kept_by(rule)}
    kept = {name: value for name, value in after.items() if name.rpartition(", ")[2] in declared}
    yield from other(kept, {name: before.get(name, torch.zeros_like(value)) for name, value in kept.items()})
    broken = [name for name, value in after.items() if isinstance(value, Tensor) and not value.float().isfinite().all()]
    if broken:
        yield f"{', '.join(broken)}: not finite"


def nonfinite_gradient(rule: str, params: Params) -> Iterator[str]:
    """Is refused before any change, wherever it is; a run that skips the batch goes on as if it had not been."""
    for form in formats_of(rule):
        for steps in (0, 2):
            straight, interrupted = (Subject(in_format(params, form), steps) for _ in range(2))
            for name in ("embed.weight", "odd.weight", "norm.bias"):
                for value in (float("nan"), float("inf"), float("-inf")):
                    yield from at(f"{form}, after {steps} steps, {value} in {name}", _accepted(interrupted, name, value))
            for subject in (straight, interrupted):
                subject.step(steps)
            yield from at(f"{form}, after a refused step", other(interrupted.everything(), straight.everything()))


def _accepted(subject: Subject, name: str, value: float) -> Iterator[str]:
    before = subject.everything()
    subject.draw(99)
    gradient = subject.model.get_parameter(name).grad
    assert gradient is not None
    gradient.view(-1)[-1] = value
    try:
        subject.optimizer.step()
        yield "was not refused"
    except RuntimeError as error:
        if not str(error).startswith(f"{name}: its gradient is not finite"):
            raise
    yield from other(subject.everything(), before)


def gradients_unchanged(rule: str, params: Params) -> Iterator[str]:
    """A step only reads the gradients."""
    for form in formats_of(rule):
        subject = Subject(in_format(params, form))
        for step in range(3):
            subject.draw(step)
            before = {n: p.grad.clone() for n, p in subject.model.named_parameters() if p.grad is not None}
            subject.optimizer.step()
            after = {n: p.grad for n, p in subject.model.named_parameters() if p.grad is not None}
            yield from at(f"{form}, gradients of step {step + 1}", other(after, before))


def state_dict(rule: str, params: Params) -> Iterator[str]:
    """A saved and loaded run goes on bit for bit, in every state format; nothing but tensors and numbers is in the file."""
    for form in formats_of(rule):
        straight, interrupted = (Subject(in_format(params, form), 2) for _ in range(2))
        file = io.BytesIO()
        torch.save(interrupted.optimizer.state_dict(), file)
        file.seek(0)
        resumed = Subject(in_format(params, form))
        resumed.model.load_state_dict(interrupted.model.state_dict())
        resumed.optimizer.load_state_dict(torch.load(file, weights_only=True))
        for subject in (straight, resumed):
            subject.step(2)
        yield from at(form, other(resumed.everything(), straight.everything()))


def state_bytes(rule: str, params: Params) -> Iterator[str]:
    """State takes what the buffers, statistics and factors declare, and nothing more."""
    for form in formats_of(rule):
        optimizer = Subject(in_format(params, form), steps=1).optimizer
        found = sum(
            value.nbytes
            for state in optimizer.state.values()
            for key, value in state.items()
            if isinstance(value, Tensor) and key != "step"
        )
        expected = sum(map(_declared_bytes, groups_of(optimizer).members.values()))
        if found != expected:
            yield f"{form}: {found} bytes of state, {expected} declared"


def _declared_bytes(members: Members) -> int:
    """4 bytes a value, 2, or 1 and 4 for each block of 256; 4 for each statistic and each element of a factor."""
    total = 0
    for route in members.routes:
        for buffer in members.rule.buffers:
            form = "float32" if buffer.full_precision else members.settings.state_dtype
            blocks = -(-route.numel // 256) if form == "8bit" else 0
            total += route.numel * {"float32": 4, "bfloat16": 2, "8bit": 1}[form] + 4 * blocks
        for statistic in statistics_of(members.rule):
            for _, rows, cols in route.matrices:
                total += 4 * (1 if statistic.per == "matrix" else cols if route.transposed else rows)
        for factor in factors_of(members.rule):
            for matrix in matrices_of(0, route, route.numel):
                total += 4 * math.prod(matrix.factor(factor.of))
    return total
