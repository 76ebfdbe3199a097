"""What the ranks of a pool read and write through the safe accessors of deepspeed.utils. Every function returns plain data."""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

import ds_optforge
from ds_optforge.optimizer import groups_of
from tests import models
from tests.distributed.cases import MUON, engine_config, run_steps


def _buffers() -> dict[str, list[str]]:
    """The state buffers of each parameter."""
    groups = groups_of(ds_optforge.build_optimizer(models.build(), MUON)).members.values()
    return {route.name: [buffer.name for buffer in members.rule.buffers] for members in groups for route in members.routes}


def access(stage: int) -> dict[str, Any]:
    """Read gradients before the first step and all else after it, write it and read it again: what is wrong."""
    engine = ds_optforge.initialize(model=models.build(), config=engine_config(stage, MUON))[0]
    wrong: list[str] = []
    try:
        tokens, targets = models.batch(0)
        share = slice(dist.get_rank(), None, dist.get_world_size())
        engine.backward(engine(tokens[share], targets[share]))
        wrong += [f"{name} gradient" for name, p in engine.module.named_parameters() if safe_get_full_grad(p) is None]
        engine.step()
        for name, parameter in engine.module.named_parameters():
            for key in _buffers()[name]:
                found = safe_get_full_optimizer_state(parameter, key)
                if found is None or not found.any():
                    wrong.append(f"{name} {key}")
            # DeepSpeed's ZeRO-3 writes only parameters that divide by the ranks: it fails on a padded last partition.
            if stage < 3 or getattr(parameter, "ds_numel", 0) % dist.get_world_size() == 0:
                wrong += _write(name, parameter)
        run_steps(engine, 1, 1)
        return {"wrong": wrong}
    finally:
        engine.destroy()


def _write(name: str, parameter: torch.Tensor) -> list[str]:
    """Write the weight and the state, and read them again."""
    wrong = []
    for key in _buffers()[name]:
        value = torch.full_like(safe_get_full_optimizer_state(parameter, key), 0.25)
        safe_set_full_optimizer_state(parameter, value, key)
        if not torch.equal(safe_get_full_optimizer_state(parameter, key), value):
            wrong.append(f"{name} {key}, written")
    weight = torch.full_like(safe_get_full_fp32_param(parameter), 0.5)
    safe_set_full_fp32_param(parameter, weight)
    if not torch.equal(safe_get_full_fp32_param(parameter), weight):
        wrong.append(f"{name}, written")
    return wrong
