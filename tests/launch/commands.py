"""Running the commands of docs/launching.md as a user would, shortened to three steps on a small text."""

from __future__ import annotations

import json
import os
import random
import shlex
import socket
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STEPS = 3
LAUNCH_LIMIT = 900  # seconds; the first launch on a machine also compiles a DeepSpeed operator

# What the other launchers are compared with.
DEEPSPEED = "deepspeed --num_gpus 2 train.py --ds_config ds_configs/muon_zero2.json"
TORCHRUN = "torchrun --nproc-per-node 2 train.py --ds_config ds_configs/muon_zero3.json"

Process = subprocess.CompletedProcess[str]
Runner = Callable[[str], Process]

# Two runs on one machine need two ports; the commands in the docs leave the default.
PORT_OPTIONS = {"deepspeed ": "--master_port", "torchrun ": "--master-port", "accelerate launch ": "--main_process_port"}


def free_port() -> str:
    """One from below those that the system gives to others between now and when it is bound."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("localhost", random.randrange(20_000, 32_000)))
            return str(probe.getsockname()[1])


@contextmanager
def port_of_a_run() -> Iterator[str]:
    """A `free_port` for one launch, cleaned up after."""
    port = free_port()
    try:
        yield port
    finally:
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            buffer.unlink()  # 69 MB of memory that DeepSpeed's launcher leaves behind for every rank and port


def environment() -> dict[str, str]:
    """This process's environment, as in a shell with the virtual environment active.

    But for one thing: nothing here is compiled, and DeepSpeed's import of its own Muon loads torch's compiler, a fifth of the
    time of a launch.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    return inherited | {"PATH": path, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}


def on_this_machine(command: str, **variables: str) -> Process:
    """Run the command line from the repository's root, at a port of its own, with these variables in its environment."""
    with port_of_a_run() as port:
        for program, option in PORT_OPTIONS.items():
            if command.startswith(program):
                command = command.replace(program, f"{program}{option}={port} ", 1)
        # mpirun has no such option; and it counts one slot a core, where a machine may have a single one.
        for_mpi = {"MASTER_PORT": port, "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"} if "mpi" in command else {}
        return subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env=environment() | for_mpi | variables,
            capture_output=True,
            text=True,
            timeout=LAUNCH_LIMIT,
        )


@dataclass(frozen=True)
class Run:
    """A finished launch of train.py and what it left in its --out folder."""

    process: Process
    out: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        assert self.process.returncode == 0, self.process.stdout + self.process.stderr
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.metrics]

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.out / "summary.json").read_text()))


class Launches:
    """Runs each command once in a session: the curve of one launcher is what those of the others are compared with."""

    def __init__(self, text: Path, folder: Path) -> None:
        self._text, self._folder = text, folder
        self._finished: dict[str, Run] = {}

    def __call__(self, command: str, runner: Runner = on_this_machine) -> Run:
        if command not in self._finished:
            out = self._folder / str(len(self._finished))
            small = f"--steps {STEPS} --sequence-length 32 --data {shlex.quote(str(self._text))} --out {shlex.quote(str(out))}"
            self._finished[command] = Run(runner(f"{command} {small}"), out)
        return self._finished[command]
