"""What ranks do with DeepSpeed's built-in Muon, beside OptForge's on the same model and batch."""

from typing import Any

import deepspeed

import ds_optforge
from tests import models
from tests.distributed import cases

MATRIX = "blocks.0.weight"


def engine_of(optimizer: dict[str, Any], stage: int, **extra: Any) -> Any:
    """An engine on `models.AwkwardNet` with this optimizer section."""
    config = {**cases.engine_config(stage, {}, **extra), "optimizer": optimizer}
    model = models.build()
    ds_optforge.register(model)
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def size_of_a_step(optimizer: dict[str, Any], stage: int, **extra: Any) -> float:
    """The Frobenius norm of what one step changes a square matrix by."""
    engine = engine_of(optimizer, stage, **extra)
    try:
        before = cases.full_parameters(engine.module)[MATRIX]
        cases.run_steps(engine, 0, 1)
        return float((cases.full_parameters(engine.module)[MATRIX] - before).norm())
    finally:
        engine.destroy()


def first_step(optimizer: dict[str, Any], stage: int, **extra: Any) -> None:
    """Build an engine and take a step."""
    engine = engine_of(optimizer, stage, **extra)
    try:
        cases.run_steps(engine, 0, 1)
    finally:
        engine.destroy()


def save(optimizer: dict[str, Any], stage: int, folder: str) -> None:
    """Take a step, and save what the engine saves."""
    engine = engine_of(optimizer, stage)
    cases.run_steps(engine, 0, 1)
    engine.save_checkpoint(folder, tag="one")
    engine.destroy()


def load(optimizer: dict[str, Any], stage: int, folder: str) -> None:
    """Load it into a new engine."""
    engine = engine_of(optimizer, stage)
    try:
        engine.load_checkpoint(folder, tag="one")
    finally:
        engine.destroy()
