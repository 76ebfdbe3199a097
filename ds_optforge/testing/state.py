"""Checks of a rule's state: its formats, and the two kinds of checkpoints.

Each yields a sentence for every failure. All ranks of a process group call it together.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import ds_optforge
from ds_optforge.errors import ConfigError
from ds_optforge.testing import model as awkward
from ds_optforge.testing.compare import far_losses, other_run
from ds_optforge.testing.engines import (
    HALF,
    PLACES,
    STEPS,
    Place,
    Run,
    advance,
    device,
    engine_at,
    plain,
    shared_folder,
    state_formats,
    trained,
    whole_weights,
)
from ds_optforge.testing.params import TOLERANCE_OF_COMPACT_STATE, formats_of, in_format, slow_rates, tolerance
from ds_optforge.testing.training import at, far_run

Params = Mapping[str, Any]
# Of losses after a move to another stage: compact state is requantized at the cuts.
TOLERANCE_AFTER_MOVE = 1e-3


def state_formats_track_float32(rule: str, params: Params) -> Iterator[str]:
    """Losses of compact state are those of float32 to 2%; on a CPU, offload changes no bit of them."""
    yield from _slow_averages(rule, params)
    for form in formats_of(rule):
        if form == "float32":
            continue
        wanted = in_format(params, form)
        reference = plain({**wanted, "state_dtype": "float32"})
        for stage in (1, 2, 3):
            kept, offloaded = (trained(Place(stage, offload), wanted) for offload in (False, True))
            yield from at(f"{form}, {Place(stage)}", far_losses(kept.losses, reference.losses, TOLERANCE_OF_COMPACT_STATE))
            if device().type == "cpu":
                yield from at(f"{form}, {Place(stage, True)}, beside no offload", other_run(offloaded, kept, STEPS))
            else:
                found = far_losses(offloaded.losses, reference.losses, TOLERANCE_OF_COMPACT_STATE)
                yield from at(f"{form}, {Place(stage, True)}", found)


def _slow_averages(rule: str, params: Params) -> Iterator[str]:
    """bfloat16 refuses averages that would stand still in it."""
    if slow := slow_rates(rule):
        try:
            ds_optforge.build_optimizer(awkward.build(), {**params, **slow, "state_dtype": "bfloat16"})
            yield f"bfloat16, {slow}: was not refused"
        except ConfigError as error:
            if "state_dtype" not in str(error):
                yield f"bfloat16, {slow}: was refused for another reason: {error}"


def engine_checkpoint(rule: str, params: Params) -> Iterator[str]:
    """``engine.save_checkpoint``: a fresh engine goes on bit for bit, in every state format and place."""

    def save(engine: Any, folder: str) -> None:
        engine.save_checkpoint(folder)

    def load(engine: Any, folder: str) -> None:
        engine.load_checkpoint(folder)

    for form, place in product(formats_of(rule), PLACES):
        wanted = in_format(params, form)
        with shared_folder() as folder:
            _save(place, wanted, folder, save)
            run = _resumed(place, wanted, folder, load)
        yield from at(f"{form}, {place}", _same_run(run, trained(place, wanted)))


def portable_checkpoint(rule: str, params: Params) -> Iterator[str]:
    """``ds_optforge.save_checkpoint``: goes on bit for bit in the same place, and as well elsewhere."""
    here = Place(2)
    for form in formats_of(rule):
        wanted = in_format(params, form)
        expected = trained(here, wanted)
        with shared_folder() as folder:
            _save(here, wanted, folder, ds_optforge.save_checkpoint)
            run = _resumed(here, wanted, folder, ds_optforge.load_checkpoint)
            yield from at(f"{form}, {here}", _same_run(run, expected))
            for place in (Place(0), Place(1, offload=True), Place(3)):
                run = _resumed(place, wanted, folder, ds_optforge.load_checkpoint)
                yield from at(f"{form}, {here} to {place}", _moved_run(run, expected, wanted))


def _moved_run(run: Run, expected: Run, params: Params) -> Iterator[str]:
    uninterrupted = Run(expected.losses[HALF:], expected.weights)
    if params["state_dtype"] == "float32":
        yield from far_run(run, uninterrupted, tolerance(params))
    else:
        yield from far_losses(run.losses, uninterrupted.losses, TOLERANCE_AFTER_MOVE)


def _save(place: Place, params: Params, folder: str, save: Callable[[Any, str], Any]) -> None:
    with engine_at(place, params) as engine:
        advance(engine, 0, HALF)
        save(engine, folder)


def _resumed(place: Place, params: Params, folder: str, load: Callable[[Any, str], Any]) -> Run:
    """The other half of the steps, by a fresh engine."""
    with engine_at(place, params) as engine:
        load(engine, folder)
        losses = advance(engine, HALF, STEPS)
        return Run(losses, {STEPS: whole_weights(engine.module)}, state=state_formats(engine))


def _same_run(resumed: Run, uninterrupted: Run) -> Iterator[str]:
    yield from other_run(resumed, uninterrupted, STEPS - HALF)
    if resumed.state != uninterrupted.state:
        yield f"state {resumed.state} for {uninterrupted.state}"
