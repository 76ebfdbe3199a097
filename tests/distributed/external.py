"""The rule of another package: how it is installed beside this one, and what ranks run with it, or without it."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch

import ds_optforge
from ds_optforge import build_optimizer
from tests import models
from tests.distributed import cases

PACKAGE = Path(__file__).parents[1] / "external_rule"
PARAMS: dict[str, Any] = {
    "name": "steady_muon",
    "lr": 0.01,
    "weight_decay": 0.1,
    "adamw": {"lr": 3e-3, "eps": 1e-5},
    "sharding": {"wire_dtype": "float32"},
}


def install(folder: Path) -> str:
    """The Python of a new environment that has the package, from its wheel, and all that the running one has."""
    source, wheels, environment = folder / "source", folder / "wheels", folder / "environment"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index", "--quiet"]
    _run([*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", str(wheels), str(source)])
    venv.create(environment, with_pip=False, symlinks=True)
    python = str(environment / "bin" / "python")
    _run([*pip, "--python", python, "install", *offline, *map(str, wheels.glob("*.whl"))])
    (own,) = environment.glob("lib/python*/site-packages")
    (own / "running.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def _run(command: list[str]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def train_by_json(config: dict[str, Any], steps: int) -> dict[str, Any]:
    """The one line and JSON, and nothing that imports the rule."""
    model = models.build()
    ds_optforge.register(model)
    engine = deepspeed.initialize(model=model, config=config)[0]
    losses = cases.run_steps(engine, 0, steps)
    result = {"losses": losses, "parameters": cases.full_parameters(engine.module)}
    result["rules"] = {group["optforge_group"] for group in cases.base_optimizer(engine).param_groups}
    engine.destroy()
    return result


def telemetry_of_one_process(params: dict[str, Any], steps: int, model_options: Mapping[str, Any]) -> dict[str, Any]:
    """What plain PyTorch records of its last step."""
    model = models.build(**model_options)
    optimizer = build_optimizer(model, params)
    for step in range(steps):
        model(*models.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.telemetry


def load_engine_checkpoint(config: dict[str, Any], folder: str) -> tuple[str, bool]:
    """Load what ``engine.save_checkpoint`` wrote into a run that has taken a step: the error, and whether state stayed."""
    engine = cases.build_engine(config, {})
    cases.run_steps(engine, 0, 1)
    base = cases.base_optimizer(engine)
    before = [value.clone() for state in base.state.values() for value in state.values()]
    message = ""
    try:
        engine.load_checkpoint(folder)
    except ds_optforge.ConfigError as error:
        message = str(error)
    after = [value for state in base.state.values() for value in state.values()]
    engine.destroy()
    return message, len(before) == len(after) and all(map(torch.equal, before, after))


def load_weights_alone(config: dict[str, Any], folder: str) -> dict[str, Any]:
    """`load_checkpoint` with strict=False: the weights, the buffers there are, and the losses of five steps more."""
    engine = cases.build_engine(config, {})
    ds_optforge.load_checkpoint(engine, folder, strict=False)
    result: dict[str, Any] = {"parameters": cases.full_parameters(engine.module)}
    result["steps"] = [float(state["step"]) for state in cases.base_optimizer(engine).state.values() if state]
    result["losses"] = cases.run_steps(engine, 5, 5)
    engine.destroy()
    return result
