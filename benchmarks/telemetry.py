"""Measure the time of a telemetry record: engines that record every step beside engines that record none.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/telemetry.py [--quick] [--out DIR]

Byte GPTs of width 512 and 1024 on ZeRO-2 and ZeRO-3, with Muon and with AdamW. An iteration of 16 bytes per rank is the worst
case, for the optimizer dominates; the same record is compared with an iteration of 512 bytes too. Both engines take turns
of one iteration, which lasts until the slowest rank is done; a record's time is the median, over the rounds, of the
difference within a round. With {"every": 10} it adds to every tenth step; the shares are of the time of all steps. "CPU" is
the same in processor time of a rank's process, which other programs on the machine add less to. Prints a table; writes
telemetry.json and telemetry.png.
"""

import argparse
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import deepspeed
import torch
from candidates import LENGTH, Section, adamw, engine_of, muon
from deepspeed import comm
from report import DEFAULT_OUT, Column, figure, save, show, write

from workload import Corpus, load_corpus, micro_batch_rows
from workload.gpt import GPT, GPTConfig

MODELS = {512: 4, 1024: 2}  # layers of each width
SECONDS = 20  # wall time for the rounds of one row
ROUNDS = (6, 30)  # fewest and most
LONG, LONG_ROUNDS = 512, 3  # bytes of an ordinary sequence
EVERY = 10
COLUMNS = (
    Column("width", "width"),
    Column("stage", "ZeRO"),
    Column("optimizer", "optimizer"),
    Column("iteration_ms", f"iteration of {LENGTH} bytes, ms", ".1f"),
    Column("record_ms", "a record, ms", ".2f"),
    Column("share", f"every {EVERY} steps", ".2%"),
    Column("cpu_share", "CPU", ".2%"),
    Column("long_iteration_ms", f"iteration of {LONG} bytes, ms", ".0f"),
    Column("long_share", f"every {EVERY} steps", ".2%"),
    Column("cpu_long_share", "CPU", ".2%"),
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
    rounds, long_rounds = ((2, 2), 1) if args.quick else (ROUNDS, LONG_ROUNDS)
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


def measure(
    width: int, layers: int, stage: int, name: str, corpus: Corpus, rounds: tuple[int, int], long_rounds: int
) -> dict[str, Any]:
    """Measure one width, stage and rule; return its row of the table."""
    section = muon() if name == "muon" else adamw()
    watched: Section = {**section, "params": {**section["params"], "telemetry": {"every": 1}}}
    off, on = (engine_of(network(width, layers), stage, given) for given in (section, watched))
    for warm_up in range(2):  # allocates state and plans
        for engine in (off, on):
            iterate(engine, corpus, warm_up, LENGTH)
    pairs: list[tuple[tuple[float, float], tuple[float, float]]] = []
    start, (fewest, most) = perf_counter(), rounds
    for turn in range(most):
        late = torch.tensor(float(perf_counter() - start > SECONDS))
        comm.all_reduce(late)
        if turn >= fewest and late.item():
            break
        order = (off, on) if turn % 2 == 0 else (on, off)
        found = {engine is on: iterate(engine, corpus, turn, LENGTH) for engine in order}
        pairs.append((found[False], found[True]))
    long = [iterate(off, corpus, turn, LONG) for turn in range(long_rounds)]
    for engine in (off, on):
        engine.destroy()
    row: dict[str, Any] = {"width": width, "stage": stage, "optimizer": name, "rounds": len(pairs)}
    for index, clock in enumerate(("", "cpu_")):
        iteration = median(usual[index] for usual, _ in pairs)
        record = median(recording[index] - usual[index] for usual, recording in pairs)
        long_iteration = median(usual[index] for usual in long)
        row |= {f"{clock}iteration_ms": iteration, f"{clock}record_ms": record, f"{clock}long_iteration_ms": long_iteration}
        row |= {f"{clock}share": record / EVERY / iteration, f"{clock}long_share": record / EVERY / long_iteration}
    if comm.get_rank() == 0:
        print(row, flush=True)
    return row


def network(width: int, layers: int) -> GPT:
    """Build a byte GPT that takes the long sequences too."""
    torch.manual_seed(0)
    return GPT(GPTConfig(layers=layers, width=width, heads=width // 64, sequence_length=LONG))


def iterate(engine: Any, corpus: Corpus, step: int, length: int) -> tuple[float, float]:
    """Run one iteration; return milliseconds: wall time of the slowest rank, and mean processor time of the ranks."""
    world = comm.get_world_size()
    tokens, targets = corpus.batch(step, 0, world, length, micro_batch_rows(0, comm.get_rank(), world, 1))
    comm.barrier()
    start, cpu = perf_counter(), process_time()
    engine.backward(engine(tokens, targets))
    engine.step()
    slowest = torch.tensor(1e3 * (perf_counter() - start), dtype=torch.float64)
    total = torch.tensor(1e3 * (process_time() - cpu), dtype=torch.float64)
    comm.all_reduce(slowest, op=comm.ReduceOp.MAX)
    comm.all_reduce(total)
    return slowest.item(), total.item() / world


def draw(rows: list[dict[str, Any]], title: str, out: Path) -> None:
    """Draw bars: the share of a step, for both lengths."""
    fig, axes = figure(10.0, 4.5)
    for offset, key, length in ((-0.2, "cpu_share", LENGTH), (0.2, "cpu_long_share", LONG)):
        places = [place + offset for place in range(len(rows))]
        drawn = axes.bar(places, [100 * row[key] for row in rows], 0.4, label=f"{length} bytes a step")
        axes.bar_label(drawn, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(rows)), [f"{row['optimizer']}\nwidth {row['width']}\nZeRO-{row['stage']}" for row in rows])
    axes.set_ylabel(f"% of the processor time of a step, recording every {EVERY}")
    axes.set_title(title)
    axes.axhline(1.0, color="tab:red", linewidth=0.8, linestyle=":")
    axes.legend(fontsize=8)
    save("telemetry", fig, out)


if __name__ == "__main__":
    main()
    comm.destroy_process_group()  # a rank that leaves it open sometimes aborts at its end
