"""What the ranks of a pool run under schedulers of DeepSpeed and of torch. Every function returns plain data."""

from typing import Any

import deepspeed
import torch
from torch.optim.lr_scheduler import OneCycleLR

import ds_optforge
from tests import models
from tests.distributed.cases import MUON, engine_config, full_parameters, run_steps

RATES = {"matrix": 0.02, "embedding": 3e-3, "unembedding": 3e-3, "scalar": 3e-3}


def refused(stage: int, door: str) -> dict[str, Any]:
    """Train under a scheduler that writes one rate into every group: what was refused, and whether any weight changed."""
    model = models.build()
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 4}}
    if door == "section":  # `register` cannot see it; its rates are zero for two steps
        ds_optforge.register(model)
        engine = deepspeed.initialize(model=model, config=engine_config(stage, MUON, scheduler=warmup))[0]
    elif door == "factory":
        scheduler = lambda optimizer: OneCycleLR(optimizer, max_lr=0.02, total_steps=20)  # noqa: E731
        engine = ds_optforge.initialize(model=model, config=engine_config(stage, MUON), lr_scheduler=scheduler)[0]
    else:
        optimizer = ds_optforge.build_optimizer(model, MUON)
        scheduler = OneCycleLR(optimizer, max_lr=0.02, total_steps=20)
        config = {key: value for key, value in engine_config(stage, MUON).items() if key != "optimizer"}
        engine = ds_optforge.initialize(model=model, config=config, optimizer=optimizer, lr_scheduler=scheduler)[0]
    before = full_parameters(engine.module)
    try:
        run_steps(engine, 0, 4)
    except ds_optforge.ConfigError as error:
        after = full_parameters(engine.module)
        return {"error": str(error), "unchanged": all(torch.equal(after[name], before[name]) for name in before)}
    finally:
        engine.destroy()
    return {"error": "", "unchanged": False}


def rates_under(stage: int, kind: str, params: dict[str, Any]) -> list[dict[str, float]]:
    """Train with a scheduler section: the rate of each group after each step."""
    # A list has a rate for each group, and the groups' order is that of the model's parameters.
    order = [group["optforge_group"] for group in ds_optforge.build_optimizer(models.build(), MUON).param_groups]
    listed = [RATES[name.split(".")[0]] for name in order]
    params = {key: listed if value == "listed" else value for key, value in params.items()}
    config = engine_config(stage, MUON, scheduler={"type": kind, "params": params})
    engine = ds_optforge.initialize(model=models.build(), config=config)[0]
    try:
        seen = []
        for step in range(8):
            run_steps(engine, step, 1)
            seen.append({group["optforge_group"]: group["lr"] for group in engine.optimizer.param_groups})
        return seen
    finally:
        engine.destroy()
