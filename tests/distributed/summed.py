"""What the ranks of a pool run with the rule that keeps its sums. Every function returns plain data."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import ds_optforge
from tests.distributed import cases
from tests.rules import summing
from tests.rules.registering import registered


def engine_of(config: dict[str, Any]) -> Any:
    return ds_optforge.initialize(model=summing.Net(), config=config)[0]


def run_and_save(config: dict[str, Any], folder: str, steps: int) -> list[float]:
    """Train, and save the same moment as a portable and as an engine checkpoint; the losses of two steps more."""
    with registered(*summing.RULES):
        engine = engine_of(config)
        cases.run_steps(engine, 0, steps)
        ds_optforge.save_checkpoint(engine, f"{folder}/portable")
        engine.save_checkpoint(f"{folder}/engine")
        losses = cases.run_steps(engine, steps, 2)
        ds_optforge.save_checkpoint(engine, f"{folder}/later")
        engine.destroy()
        return losses


def resume(config: dict[str, Any], folder: str, how: str, steps: int, out: str) -> list[float]:
    """A fresh run that loads what `run_and_save` saved, saves it again, and takes two steps more."""
    with registered(*summing.RULES):
        engine = engine_of(config)
        if how == "portable":
            ds_optforge.load_checkpoint(engine, f"{folder}/portable")
        else:
            assert engine.load_checkpoint(f"{folder}/engine")[0] is not None
        ds_optforge.save_checkpoint(engine, f"{out}/again")
        losses = cases.run_steps(engine, steps, 2)
        ds_optforge.save_checkpoint(engine, f"{out}/later")
        engine.destroy()
        return losses


def collectives(config: dict[str, Any]) -> dict[str, Any]:
    """Of the third step: the elements of each all-reduce of float64 vectors, and how many all-reduces and all-to-alls.

    (DeepSpeed sums nothing in float64 but single numbers.)
    """
    with registered(*summing.RULES):
        engine = engine_of(config)
        cases.run_steps(engine, 0, 2)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            cases.run_steps(engine, 2, 1)
        engine.destroy()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if "args" in event]
    inputs = [event["args"] for event in events if event["name"] == "gloo:all_reduce"]
    vectors = [given["Input Dims"][0] for given in inputs if given["Input type"] == ["double"] and given["Input Dims"][0]]
    counts = {name: sum(event["name"] == f"c10d::{name}" for event in events) for name in ("allreduce_", "alltoall_base_")}
    return {"summed": sorted(numel for (numel,) in vectors), **counts}  # gloo runs them in threads
