"""What a record of telemetry costs: engines that record every step beside engines that record none.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/telemetry.py [--quick] [--out DIR]

Byte GPTs of width 512 and 1024 on ZeRO-2 and ZeRO-3, with Muon and with AdamW. An iteration is one sequence of 16 bytes per
rank, so that the optimizer dominates, which is the worst case; "of 512 bytes" is the same record beside an iteration on one
sequence of 512 bytes. Both engines take turns of one iteration, which lasts until the slowest rank is through; a record's
time is the median, over the rounds, of the difference within a round. With {"every": 10} it is paid in every tenth step.
Prints a table; writes telemetry.json and telemetry.png.
"""

import argparse
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import deepspeed
import torch
from candidates import LENGTH, Section, adamw, engine_of, muon
from deepspeed import comm
from report import DEFAULT_OUT, Column, figure, save, show, write

from ds_optforge.workload import Corpus, load_corpus, micro_batch_rows
from ds_optforge.workload.gpt import GPT, GPTConfig

MODELS = {512: 4, 1024: 2}  # layers of each width
ROUNDS = 30
LONG, LONG_ROUNDS = 512, 5  # bytes of an ordinary sequence
EVERY = 10
COLUMNS = (
    Column("width", "width"),
    Column("stage", "ZeRO"),
    Column("optimizer", "optimizer"),
    Column("iteration_ms", "iteration, ms", ".1f"),
    Column("record_ms", "a record, ms", ".2f"),
    Column("share", f"of the step's time, every {EVERY} steps", ".2%"),
    Column("long_iteration_ms", f"iteration of {LONG} bytes, ms", ".0f"),
    Column("long_share", "of its time", ".2%"),
)


def main() -> None:
    """Measure every width, stage and rule, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one width of 128, ZeRO-2 alone, two rounds")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    deepspeed.init_distributed("gloo")
    deepspeed.utils.logger.setLevel("WARNING")
    corpus = load_corpus(str(Path(__file__)) if args.quick else None)
    rounds, long_rounds = (2, 1) if args.quick else (ROUNDS, LONG_ROUNDS)
    rows = [
        measure(width, layers, stage, name, corpus, rounds, long_rounds)
        for width, layers in ({128: 2} if args.quick else MODELS).items()
        for stage in ((2,) if args.quick else (2, 3))
        for name in ("muon", "adamw")
    ]
    if comm.get_rank() == 0:
        title = f"Time of a record of telemetry, {comm.get_world_size()} ranks"
        show(title, COLUMNS, rows)
        write("telemetry", title, rows, args.out)
        draw(rows, title, args.out)


def measure(width: int, layers: int, stage: int, name: str, corpus: Corpus, rounds: int, long_rounds: int) -> dict[str, Any]:
    """One row."""
    section = muon() if name == "muon" else adamw()
    watched: Section = {**section, "params": {**section["params"], "telemetry": {"every": 1}}}
    off, on = (engine_of(network(width, layers), stage, given) for given in (section, watched))
    for warm_up in range(2):  # allocates state and plans
        for engine in (off, on):
            iterate(engine, corpus, warm_up, LENGTH)
    pairs = []
    for turn in range(rounds):
        order = (off, on) if turn % 2 == 0 else (on, off)
        found = {engine is on: iterate(engine, corpus, turn, LENGTH) for engine in order}
        pairs.append((found[False], found[True]))
    iteration, record = median(a for a, _ in pairs), median(b - a for a, b in pairs)
    long = median(iterate(off, corpus, turn, LONG) for turn in range(long_rounds))
    for engine in (off, on):
        engine.destroy()
    return {
        "width": width,
        "stage": stage,
        "optimizer": name,
        "rounds": rounds,
        "iteration_ms": 1e3 * iteration,
        "record_ms": 1e3 * record,
        "share": record / EVERY / iteration,
        "long_iteration_ms": 1e3 * long,
        "long_share": record / EVERY / long,
    }


def network(width: int, layers: int) -> GPT:
    """A byte GPT that takes the long sequences too."""
    torch.manual_seed(0)
    return GPT(GPTConfig(layers=layers, width=width, heads=width // 64, sequence_length=LONG))


def iterate(engine: Any, corpus: Corpus, step: int, length: int) -> float:
    """Seconds of one iteration on all ranks together, of the slowest."""
    world = comm.get_world_size()
    tokens, targets = corpus.batch(step, 0, world, length, micro_batch_rows(0, comm.get_rank(), world, 1))
    comm.barrier()
    start = perf_counter()
    engine.backward(engine(tokens, targets))
    engine.step()
    slowest = torch.tensor(perf_counter() - start, dtype=torch.float64)
    comm.all_reduce(slowest, op=comm.ReduceOp.MAX)
    return float(slowest)


def draw(rows: list[dict[str, Any]], title: str, out: Path) -> None:
    """Bars: the share of the step's time, for both lengths."""
    fig, axes = figure(10.0, 4.5)
    for offset, key, label in ((-0.2, "share", f"{LENGTH} bytes a step"), (0.2, "long_share", f"{LONG} bytes a step")):
        drawn = axes.bar([place + offset for place in range(len(rows))], [100 * row[key] for row in rows], 0.4, label=label)
        axes.bar_label(drawn, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(rows)), [f"{row['optimizer']}\nwidth {row['width']}\nZeRO-{row['stage']}" for row in rows])
    axes.set_ylabel(f"% of the time of a step, recording every {EVERY}")
    axes.set_title(title)
    axes.axhline(1.0, color="tab:red", linewidth=0.8, linestyle=":")
    axes.legend(fontsize=8)
    save("telemetry", fig, out)


if __name__ == "__main__":
    main()
