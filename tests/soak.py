"""`make soak`: train.py is killed, stopped, moved and switched at random for ten minutes, and must end as if nothing had been.

    python tests/soak.py [--minutes 10] [--seed 0] [--out DIR]

A seed draws which optimizer trains which steps. One run trains them undisturbed, on two ranks and ZeRO-2. The other one is
interrupted all the time (SIGKILL of a rank, also while it saves; SIGTERM to the launcher), and each time goes on from its
newest checkpoint on other ranks, another ZeRO stage, with or without offload. Everything is float32, so that both must have
the same losses up to the order in which gradients are summed. The script prints what happened and writes soak.json.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch

from ds_optforge.rules import rule_names
from ds_optforge.testing.params import settings_of, usual
from tests.launch.commands import ROOT, environment, free_port

TOPOLOGIES = [(ranks, stage, offload) for ranks in (1, 2, 4) for stage in (1, 2, 3) for offload in (False, True)]
UNDISTURBED = (2, 2, False)
SEGMENTS, LENGTH, EVERY = 4, 240, 5  # optimizers in a row, steps of each, steps between checkpoints
# Losses may differ by this factor: summation order perturbs gradients by 1e-7, which training itself amplifies.
TOLERANCE = 1e-3


def trained_with_a_schedule() -> list[str]:
    """The rules that can take over from each other in this run."""
    return [name for name in rule_names() if not settings_of(name).builds.replaces_schedule]


def params_of(name: str) -> dict[str, Any]:
    """Without any bfloat16, at a quarter of the rule's own rate: a gentle run amplifies rounding less."""
    rate = settings_of(name).model_fields["lr"].default / 4
    return usual(name, {"lr": rate, **({"adamw": {"lr": 1e-3}} if settings_of(name).needs_matrix() else {})})


@dataclass
class Soak:
    """One run, in pieces."""

    out: Path
    order: list[str]
    disturbed: random.Random | None = None
    events: dict[str, int] = field(default_factory=dict)
    topologies: set[tuple[int, int, bool]] = field(default_factory=set)

    def count(self, event: str) -> None:
        self.events[event] = self.events.get(event, 0) + 1

    def train(self, deadline: float) -> None:
        """All segments, each with its optimizer. Past the deadline there are no more faults."""
        self.out.mkdir(parents=True)
        for number, name in enumerate(self.order):
            last = LENGTH * (number + 1)
            while self.saved() < last:
                switched = number > 0 and self.saved() == LENGTH * number
                self.launch(name, last, switched, faults=time.monotonic() < deadline)

    def saved(self) -> int:
        """Steps in the newest complete checkpoint."""
        found = sorted(self.out.glob("checkpoints/step_" + "[0-9]" * 8 + "/checkpoint.json"))
        return int(found[-1].parent.name.removeprefix("step_")) if found else 0

    def launch(self, name: str, last: int, switched: bool, faults: bool) -> None:
        """One launch, which may be cut short."""
        topology = self.disturbed.choice(TOPOLOGIES) if self.disturbed else UNDISTURBED
        self.topologies.add(topology)
        before = self.saved()
        process = subprocess.Popen(
            [*self.command(topology, name, last), *(["--switch-optimizer"] if switched else [])],
            cwd=ROOT,
            env=environment(),
            stdout=(self.out / "log.txt").open("a"),
            stderr=subprocess.STDOUT,
        )
        self.count("launches")
        hit = bool(self.disturbed and faults and self.disturb(process, self.disturbed))
        status = process.wait()
        if status != 0 and not hit:
            raise SystemExit(f"a launch that nobody disturbed ended with status {status}; see {self.out}/log.txt")
        self.count("launches that saved" if self.saved() > before else "launches that saved nothing")

    def command(self, topology: tuple[int, int, bool], name: str, last: int) -> list[str]:
        ranks, stage, offload = topology
        zero = {"stage": stage, **({"offload_optimizer": {"device": "cpu"}} if offload else {})}
        config = {
            "train_batch_size": 8,
            "gradient_clipping": 1.0,
            "zero_optimization": zero,
            "optimizer": {"type": "OptForge", "params": params_of(name)},
            "scheduler": {"type": "OptForgeSchedule", "params": {"name": "constant", "warmup_num_steps": 10}},
        }
        path = self.out / "config.json"
        path.write_text(json.dumps(config))
        launcher = ["torchrun", f"--nproc-per-node={ranks}", f"--master-port={free_port()}", "train.py", f"--ds_config={path}"]
        steps = [f"--steps={last}", f"--save-every={EVERY}", "--sequence-length=32", "--resume"]
        return [*launcher, *steps, f"--out={self.out}"]

    def disturb(self, process: "subprocess.Popen[bytes]", rng: random.Random) -> bool:
        """Wait a while, then kill a rank (perhaps in a save) or ask the launcher to stop; False: it was left alone."""
        fault = rng.choice(["kill", "kill in a save", "stop", "stop", "none"])
        until = time.monotonic() + rng.uniform(10.0, 25.0)
        while process.poll() is None and time.monotonic() < until:
            if fault == "kill in a save" and any(self.out.glob("checkpoints/*.incomplete/*")):
                break
            time.sleep(0.005)
        try:
            ranks = [child for child in psutil.Process(process.pid).children() if "train.py" in child.cmdline()]
            if not ranks or fault == "none":
                return False
            if fault == "stop":
                process.send_signal(signal.SIGTERM)
            else:
                rng.choice(ranks).send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:  # it ended first
            return False
        self.count(fault)
        return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="bound of the whole; faults end at three quarters of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="kept; default: a folder that is removed")
    args = parser.parse_args()
    start = time.monotonic()
    rng = random.Random(args.seed)
    order = rng.sample(trained_with_a_schedule(), k=SEGMENTS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        straight, random_run = Soak(folder / "undisturbed", order), Soak(folder / "disturbed", order, rng)
        straight.train(deadline=0.0)
        random_run.train(deadline=start + 60 * args.minutes * 0.75)
        return report(straight, random_run, args, time.monotonic() - start)


def report(straight: Soak, disturbed: Soak, args: argparse.Namespace, seconds: float) -> int:
    """Compare the two runs; 0 if they agree."""
    rows = [[json.loads(line)["loss"] for line in (run.out / "metrics.jsonl").open()] for run in (straight, disturbed)]
    worst = max(abs(a - b) / a for a, b in zip(*rows, strict=True))
    result = {
        "seed": args.seed,
        "optimizers": straight.order,
        "steps": len(rows[0]),
        "events": disturbed.events,
        "topologies": len(disturbed.topologies),
        "largest relative difference of a loss": worst,
        "tolerance": TOLERANCE,
        "minutes": round(seconds / 60, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "deepspeed": deepspeed.__version__},
    }
    print(json.dumps(result, indent=1))
    if args.out:
        (args.out / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
