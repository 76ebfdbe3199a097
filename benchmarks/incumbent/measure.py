"""Compare Muon of ds_optforge with DeepSpeed's built-in Muon: loss, bytes and time of a step.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/incumbent/measure.py [--steps 100] [--clipping 1.0] [--out DIR]

All candidates train the same byte GPT on the same batches with the same learning rates and gradient_clipping, in one run,
taking turns of ten steps, so that a change of the machine's speed meets all of them. Bytes are those that the loopback
interface counted in a step, AdamW's subtracted; times are medians. Prints a table; writes incumbent.json.
"""

import argparse
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from rich.console import Console
from rich.table import Table

import ds_optforge
from workload import Corpus, build_model, load_corpus, micro_batch_rows

BATCH, LENGTH, TURN = 16, 128, 10
MUON_LR, ADAM_LR = 0.02, 0.003


@dataclass
class Candidate:
    """One engine and its measurements; ``losses``, ``bytes`` and ``seconds`` have one number per step."""

    name: str
    engine: Any
    losses: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    """Measure all candidates on ZeRO-2, then on ZeRO-3, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--clipping", type=float, default=1.0, help="gradient_clipping, which divides the built-in's update")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args()
    deepspeed.init_distributed("gloo")
    deepspeed.utils.logger.setLevel("WARNING")
    corpus = load_corpus(None)
    rows = [row for stage in (2, 3) for row in measure(stage, corpus, args)]
    if comm.get_rank() == 0:
        report(rows, args)


def optimizers(stage: int) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """(optimizer section, zero_optimization section) of each candidate."""
    beside = {"lr": ADAM_LR, "betas": [0.9, 0.95]}
    ours = {"name": "muon", "lr": MUON_LR, "momentum": 0.95, "adamw": beside}
    theirs = {"lr": MUON_LR, "momentum": 0.95, "muon_lr": MUON_LR, "adam_lr": ADAM_LR, "betas": [0.9, 0.95]}
    # On ZeRO-3 the built-in Muon asks for all-reduced gradients.
    zero = {"reduce_scatter": False} if stage == 3 else {}
    found = {
        "adamw": ({"type": "OptForge", "params": {"name": "adamw", **beside}}, {}),
        "ds_optforge muon": ({"type": "OptForge", "params": ours}, {}),
    }
    for method in ("standard", "gram"):
        section = {"type": "Muon", "params": {**theirs, "ns_method": method}}
        found[f"built-in muon, {method}"] = (section, zero)
    return found


def build(stage: int, optimizer: dict[str, Any], zero: dict[str, Any], args: argparse.Namespace) -> Any:
    """Build an engine on the byte GPT, with the same weights for every candidate."""
    torch.manual_seed(0)
    net = build_model(args.model, LENGTH)
    ds_optforge.register(net)
    config = {
        "train_batch_size": BATCH,
        "gradient_clipping": args.clipping,
        "zero_optimization": {"stage": stage, **zero},
        "optimizer": optimizer,
    }
    return deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)[0]


def measure(stage: int, corpus: Corpus, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train all candidates in turns; return a row for each."""
    candidates = [Candidate(name, build(stage, optimizer, zero, args)) for name, (optimizer, zero) in optimizers(stage).items()]
    for first in range(0, args.steps, TURN):
        for candidate in candidates:
            for step in range(first, min(first + TURN, args.steps)):
                train_step(candidate, corpus, step)
    adamw = candidates[0]
    rows = []
    for candidate in candidates:
        rows.append(
            {
                "stage": stage,
                "optimizer": candidate.name,
                "loss": sum(candidate.losses[-TURN:]) / TURN,
                "megabytes": (median(candidate.bytes) - median(adamw.bytes)) / 1e6,
                "milliseconds": 1e3 * median(candidate.seconds),
                "overhead_ms": 1e3 * (median(candidate.seconds) - median(adamw.seconds)),
            }
        )
        candidate.engine.destroy()
    return rows


def train_step(candidate: Candidate, corpus: Corpus, step: int) -> None:
    """Take one optimizer step, counted and timed on all ranks together."""
    engine = candidate.engine
    rows = micro_batch_rows(0, comm.get_rank(), comm.get_world_size(), engine.train_micro_batch_size_per_gpu())
    tokens, targets = corpus.batch(step, 0, BATCH, LENGTH, rows)
    comm.barrier()
    sent, start = loopback_bytes(), perf_counter()
    loss = engine(tokens, targets)
    engine.backward(loss)
    engine.step()
    comm.barrier()
    candidate.seconds.append(perf_counter() - start)
    candidate.bytes.append(loopback_bytes() - sent)
    mean = loss.detach().clone()
    comm.all_reduce(mean)
    candidate.losses.append(mean.item() / comm.get_world_size())


def loopback_bytes() -> int:
    """Bytes that the loopback interface has sent so far: the traffic between all ranks of this machine.

    Raises:
        RuntimeError: the kernel lists no loopback interface.
    """
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise RuntimeError("/proc/net/dev has no loopback interface")


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print the table and write the numbers."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread(s) a rank, {comm.get_world_size()} ranks"
    title = f"{args.model} GPT, {args.steps} steps, clipping {args.clipping}; {machine}"
    table = Table("stage", "optimizer", "loss", "MB a step over AdamW", "ms a step", "ms over AdamW", title=title)
    for row in rows:
        cells = [row["loss"], row["megabytes"], row["milliseconds"], row["overhead_ms"]]
        table.add_row(
            str(row["stage"]), row["optimizer"], *(f"{cell:.3f}" if i < 2 else f"{cell:.1f}" for i, cell in enumerate(cells))
        )
    Console(width=120).print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "ds_optforge": ds_optforge.__version__}
    (args.out / "incumbent.json").write_text(json.dumps({"title": title, "versions": versions, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
    comm.destroy_process_group()  # a rank that leaves it open sometimes aborts at its end
