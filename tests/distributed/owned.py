"""What the ranks of a pool run with rules whose owners keep state, on gradients that are the same bits everywhere."""

from typing import Any

import torch
from torch import Tensor, nn

import ds_optforge
from tests.distributed import cases
from tests.layers import matrix

SHAPES = {"square": (24, 24), "wide": (18, 40), "tall": (36, 20), "odd": (33, 7), "bank": (3, 16, 12)}
STEPS = 5


class Given(nn.Module):
    """Weights whose gradients are drawn, whatever the weights are: the loss is their product with what was drawn."""

    def __init__(self) -> None:
        super().__init__()
        for index, (name, shape) in enumerate(SHAPES.items()):
            self.register_parameter(name, nn.Parameter(0.1 * matrix(*shape, seed=index)))

    def forward(self, step: int) -> Tensor:
        return sum((parameter * gradient(name, step)).sum() for name, parameter in self.named_parameters())


def gradient(name: str, step: int) -> Tensor:
    """Of a step from 0 on; the second matrix of the bank has none in the first step, the third never has."""
    drawn = matrix(*SHAPES[name], seed=100 * (step + 1) + len(name))
    if name == "bank":
        drawn[2] = 0.0
        if step == 0:
            drawn[1] = 0.0
    return drawn


def engine_of(config: dict[str, Any]) -> Any:
    return ds_optforge.initialize(model=Given(), config=config)[0]


def run(engine: Any, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        engine.backward(engine(step))
        engine.step()


def run_and_save(config: dict[str, Any], folder: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Train, save both kinds of checkpoint, and go on; the weights then, and the bytes of this rank's state by name."""
    engine = engine_of(config)
    run(engine, 0, STEPS)
    ds_optforge.save_checkpoint(engine, f"{folder}/portable")
    engine.save_checkpoint(f"{folder}/engine")
    run(engine, STEPS, 2)
    found = cases.full_parameters(engine.module), state_bytes(engine)
    engine.destroy()
    return found


def resume(config: dict[str, Any], folder: str, how: str, again: str) -> dict[str, Tensor]:
    """A fresh run that loads what `run_and_save` saved, saves it ``again``, and goes on; the weights then."""
    engine = engine_of(config)
    if how == "portable":
        ds_optforge.load_checkpoint(engine, f"{folder}/portable")
    else:
        assert engine.load_checkpoint(f"{folder}/engine")[0] is not None
    ds_optforge.save_checkpoint(engine, again)
    run(engine, STEPS, 2)
    found = cases.full_parameters(engine.module)
    engine.destroy()
    return found


def refused(config: dict[str, Any], folder: str, how: str = "engine") -> str:
    """What a checkpoint of other owners or matrices makes a load say, or the first step after it."""
    engine = engine_of(config)
    try:
        if how == "engine":
            engine.load_checkpoint(f"{folder}/engine")
        else:
            ds_optforge.load_checkpoint(engine, f"{folder}/portable")
        run(engine, STEPS, 1)
    except (ds_optforge.ConfigError, ds_optforge.CheckpointError) as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def state_bytes(engine: Any) -> dict[str, int]:
    """Bytes of this rank's state, by name."""
    found: dict[str, int] = {}
    for state in cases.base_optimizer(engine).state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                found[name] = found.get(name, 0) + value.nbytes
    return found
