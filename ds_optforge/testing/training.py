"""Checks of training under ZeRO: the same numbers everywhere, in bfloat16 too, with telemetry, and on averaged weights.

Each yields a sentence for every failure. All ranks of a process group call it together.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist

import ds_optforge
from ds_optforge.rules import MatrixRule
from ds_optforge.rules.around import KEYS
from ds_optforge.testing import model as awkward
from ds_optforge.testing.compare import far_losses, far_weights, other_bits, other_numbers, other_run
from ds_optforge.testing.engines import (
    HALF,
    IDLE,
    PLACES,
    STEPS,
    Place,
    Run,
    advance,
    engine_at,
    optimizer_of,
    plain,
    trained,
    whole_weights,
)
from ds_optforge.testing.params import settings_of, tolerance

Params = Mapping[str, Any]
# bfloat16 weights: losses of weights that are rounded to 8 bits, with gradients that are.
TOLERANCE_IN_BFLOAT16 = 0.02


def at(place: object, problems: Iterator[str]) -> Iterator[str]:
    """The same sentences, each with where it happened."""
    yield from (f"{place}: {problem}" for problem in problems)


def far_run(found: Run, expected: Run, allowed: float) -> Iterator[str]:
    """Losses and weights that are too far off."""
    yield from far_losses(found.losses, expected.losses, allowed)
    yield from far_weights(found.end, expected.end, allowed)


def parity(rule: str, params: Params) -> Iterator[str]:
    """Every stage, with and without CPU offload, ends where one process without DeepSpeed does."""
    for place in (*PLACES, Place(3, sub_groups=True)):
        yield from at(place, far_run(trained(place, params), plain(params), tolerance(params)))


def small_buckets(rule: str, params: Params) -> Iterator[str]:
    """The same where a bucket holds less than a matrix."""
    sharding = {**params.get("sharding", {}), "bucket_numel": 700}
    for place in (Place(2), Place(3)):
        run = trained(place, {**params, "sharding": sharding})
        yield from at(f"{place}, small buckets", far_run(run, plain(params), tolerance(params)))


def frozen_and_unused(rule: str, params: Params) -> Iterator[str]:
    """What is frozen never changes; a matrix rule leaves a matrix without any gradient as it is, decay included."""
    for place in ("plain PyTorch", *PLACES):
        run = trained(place, params) if isinstance(place, Place) else plain(params)
        kept = [awkward.FROZEN]
        if settings_of(rule).needs_matrix():
            kept.append(awkward.UNUSED)
            yield from at(place, other_bits(_without_gradient(run.end), _without_gradient(run.weights[0])))
            idle = [{awkward.SOMETIMES: run.weights[steps][awkward.SOMETIMES]} for steps in (IDLE + 1, IDLE)]
            yield from at(f"{place}, step {IDLE + 1}", other_bits(*idle))
        yield from at(place, other_bits(*({name: weights[name] for name in kept} for weights in (run.end, run.weights[0]))))


def _without_gradient(weights: Mapping[str, Any]) -> Mapping[str, Any]:
    """The matrix of the bank that has no part."""
    return {f"the last matrix of {awkward.BANK}": weights[awkward.BANK][-1]}


def bfloat16(rule: str, params: Params) -> Iterator[str]:
    """bf16 engines of stages 2 and 3 have the losses of float32, to 2%."""
    for stage in (2, 3):
        place = Place(stage, bf16=True)
        run = trained(place, params)
        yield from at(place, far_losses(run.losses, plain(params).losses, TOLERANCE_IN_BFLOAT16))


def telemetry(rule: str, params: Params) -> Iterator[str]:
    """A record has the same numbers on every rank and stage as in one process, and changes no step."""
    watched = {**params, "telemetry": {"every": 2}}
    expected = plain(watched).telemetry
    yield from at("plain PyTorch", _undeclared(rule, expected["groups"]))
    for stage in range(4):
        place = Place(stage)
        run = trained(place, watched)
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, run.telemetry)
        if any(found != of_ranks[0] for found in of_ranks):
            yield f"{place}: ranks recorded different numbers: {of_ranks}"
        yield from at(place, _other_record(run.telemetry, expected))
        yield from at(f"{place}, with telemetry", other_run(run, trained(place, params), STEPS))


def _other_record(found: dict[str, Any], expected: dict[str, Any]) -> Iterator[str]:
    """1e-4: as in `parity`, and a difference of two float32 weights. 5%: padding counts as state."""
    if (found["step"], found["groups"].keys()) != (expected["step"], expected["groups"].keys()):
        yield f"recorded {found['step'], sorted(found['groups'])}, expected {expected['step'], sorted(expected['groups'])}"
        return
    for group, numbers in expected["groups"].items():
        yield from at(group, other_numbers(found["groups"][group], numbers, {"": 1e-4, "state_bytes": 0.05}))


def _undeclared(rule: str, groups: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """A momentum is compared with the gradient where a buffer is declared to be one; only matrices are orthogonal."""
    builds = settings_of(rule).builds
    names = {"update_rms", "parameter_rms", "update_to_parameter", "effective_lr", "state_bytes"}
    if any(buffer.momentum for buffer in builds.buffers):
        names.add("momentum_gradient_cosine")
    for group, numbers in groups.items():
        if f".{rule}" in group:
            found = set(numbers) - ({"orthogonality_error"} if issubclass(builds, MatrixRule) else set())
            if found != names:
                yield f"{group}: recorded {sorted(found)}, expected {sorted(names)}"


def averages(rule: str, params: Params) -> Iterator[str]:
    """Weights to evaluate with are those of one process, go in and out bit for bit, and disturb nothing.

    A rule without them is left alone.
    """
    averages = settings_of(rule).builds.averages or not params.keys().isdisjoint(KEYS.values())
    for place in PLACES if averages else (Place(2),):
        yield from at(place, _evaluated(place, params))


def _evaluated(place: Place, params: Params) -> Iterator[str]:
    with engine_at(place, params) as engine:
        losses = advance(engine, 0, HALF)
        before = whole_weights(engine.module)
        with ds_optforge.evaluation_weights(engine):
            inside = whole_weights(engine.module)
            if optimizer_of(engine).averages_weights:
                yield from _not_refused(engine)
        after = whole_weights(engine.module)
        losses += advance(engine, HALF, STEPS)
        end = whole_weights(engine.module)
    yield from at("after the evaluation", other_bits(after, before))
    if expected := plain(params).averages:
        yield from at("inside the evaluation", far_weights(inside, expected, tolerance(params)))
        if next(other_bits(inside, before), "") == "":
            yield "inside the evaluation: the weights are those before it"
    else:
        yield from at("inside the evaluation", other_bits(inside, before))
    run = Run(losses, {STEPS: end})
    yield from at("after an evaluation", other_run(run, trained(place, params), STEPS))


def _not_refused(engine: Any) -> Iterator[str]:
    try:
        optimizer_of(engine).step()
        yield "step() on averaged weights was not refused"
    except RuntimeError:
        pass
