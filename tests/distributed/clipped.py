"""What the ranks of a pool run with QK-clip."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

import ds_optforge
from tests import attentions
from tests.distributed import cases


def build(config: dict[str, Any], family: str) -> Any:
    return ds_optforge.initialize(model=attentions.FAMILIES[family](), config=config)[0]


def run_steps(engine: Any, first: int, steps: int, batch: int | None = None) -> list[dict[str, Any]]:
    """Train on this rank's share of each micro-batch, of one ``batch`` again and again or of a new one; the logits seen."""
    rank, world, parts = dist.get_rank(), dist.get_world_size(), engine.gradient_accumulation_steps()
    seen = []
    for step in range(first, first + steps):
        tokens = attentions.batch(step if batch is None else batch, engine.train_batch_size())
        for micro in torch.chunk(tokens, parts):
            share = torch.chunk(micro, world)[rank]
            engine.backward(engine(input_ids=share, labels=share).loss)
            engine.step()
        seen.append(cases.base_optimizer(engine).attention_logits)
    return seen


def train(config: dict[str, Any], family: str, steps: int, batch: int | None = None) -> dict[str, Any]:
    """Parameters, and the logits that each step has seen."""
    engine = build(config, family)
    seen = run_steps(engine, 0, steps, batch)
    found = {"parameters": cases.full_parameters(engine.module), "seen": seen}
    engine.destroy()
    return found


def save_and_resume(config: dict[str, Any], folder: str, portable: bool) -> Mapping[str, Any]:
    """3 steps, save, 3 steps; and these again in a fresh engine that loads: parameters, logits."""
    engine = build(config, "llama")
    run_steps(engine, 0, 3)
    if portable:
        ds_optforge.save_checkpoint(engine, folder)
    else:
        engine.save_checkpoint(folder)
    straight = {"seen": run_steps(engine, 3, 3), "parameters": cases.full_parameters(engine.module)}
    engine.destroy()
    fresh = build(config, "llama")
    if portable:
        ds_optforge.load_checkpoint(fresh, folder)
    else:
        fresh.load_checkpoint(folder)
    resumed = {"seen": run_steps(fresh, 3, 3), "parameters": cases.full_parameters(fresh.module)}
    fresh.destroy()
    return {"straight": straight, "resumed": resumed}


def collectives(config: dict[str, Any]) -> dict[str, int]:
    """How many all-reduces an optimizer's step makes, with and without QK-clip."""
    counts = {}
    for name in ("with", "without"):
        params = dict(config["optimizer"]["params"])
        if name == "without":
            del params["qk_clip"]
        engine = build({**config, "optimizer": {"type": "OptForge", "params": params}}, "llama")
        run_steps(engine, 0, 1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run_steps(engine, 1, 1)
        counts[name] = sum(event.name == "c10d::allreduce_" for event in profile.events())
        engine.destroy()
    return counts


def cut_by_tensor_parallelism(config: dict[str, Any]) -> None:
    build(config, "llama")
