"""A long training holds no more than a short one: after a warm-up, neither memory nor files, threads or tensors grow."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import lasting
from tests.distributed.cases import MUON, engine_config
from tests.distributed.conftest import Pools
from tests.oracles import EXACT

MIB = 2**20
ADAMW = {"lr": 3e-3, "eps": 1e-5}
SCHEDULE = {
    "scheduler": {"type": "OptForgeSchedule", "params": {"name": "cosine", "total_num_steps": 4000, "warmup_num_steps": 10}}
}


def configuration(stage: int, rule: str, **params: Any) -> dict[str, Any]:
    given = {**MUON, **EXACT, "name": rule, "adamw": ADAMW, **params}
    return engine_config(stage, given, gradient_clipping=1.0, **SCHEDULE)


GATHER = {"sharding": {"wire_dtype": "float32", "mode": "gather"}}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
RUNS: dict[str, tuple[dict[str, Any], str]] = {  # configuration, how it is saved
    "muon, ZeRO-2": (configuration(2, "muon", **GATHER), ""),
    "muon, ZeRO-3": (configuration(3, "muon", **GATHER), ""),
    "normuon, telemetry, ZeRO-2": (configuration(2, "normuon", telemetry={"every": 1}), ""),
    "soap_muon, ZeRO-1": (configuration(1, "soap_muon", eps=100.0), ""),
    "muon, qk_clip, ZeRO-3": (configuration(3, "muon", qk_clip={"tau": 1.0}), ""),
    "muon, offload": (configuration(2, "muon") | OFFLOAD, ""),
    "normuon, saves in the background, ZeRO-3": (configuration(3, "normuon"), "background"),
    "soap_muon, saves and loads, ZeRO-2": (configuration(2, "soap_muon", eps=100.0), "load"),
}


def growth(found: list[lasting.Held], name: str) -> int:
    """Between the first sample, which ends the warm-up, and the least of the last three.

    The least, because threads of gloo may hold a buffer, and a thread that has ended is counted for a moment more.
    """
    values = [getattr(sample, name) for sample in found]
    return int(min(values[-3:]) - values[0])


def assert_flat(found: list[lasting.Held], memory: int) -> None:
    for name in ("files", "threads", "tensors", "objects"):
        assert growth(found, name) <= 0, (name, found)
    assert growth(found, "memory") <= memory, found


@pytest.mark.parametrize("run", ["muon, qk_clip, ZeRO-3", "normuon, saves in the background, ZeRO-3"])
def test_a_training_holds_after_its_steps_what_it_held_after_the_first(run: str, pools: Pools, tmp_path: Path) -> None:
    """The short version, which sees tensors, objects, files and threads of a step or a save; of memory only much."""
    config, save = RUNS[run]
    for found in pools[2].run(lasting.last, config, 120, 6, str(tmp_path), save, every=10):
        assert_flat(found, memory=8 * MIB)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_an_hour_of_steps_holds_what_the_first_minutes_held(run: str, pools: Pools, tmp_path: Path) -> None:
    """3,600 steps, an hour at one a second; 180 of them with a save."""
    config, save = RUNS[run]
    for found in pools[2].run(lasting.last, config, 3600, 12, str(tmp_path), save, timeout_s=3000.0):
        assert_flat(found, memory=2 * MIB)
