"""Measure the validation loss of the sharding modes: gather, shard_local, and gathering every 2, 5 and 10 steps.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/modes.py [--steps 100] [--seeds 3] [--quick] [--out DIR]

Run it with 2 and with 4 ranks. All modes train the tiny byte GPT on ZeRO-3, where every matrix is cut, from the same weights
on the same batches of the same global size; a seed draws weights and batches. Writes modes_RANKS.json and a picture.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from report import DEFAULT_OUT, Column, figure, save, show, write

import ds_optforge
from workload import Corpus, build_model, load_corpus, micro_batch_rows

BATCH, LENGTH, WINDOWS = 16, 128, 32
MODES: dict[str, dict[str, Any]] = {
    "gather": {},
    "every 2": {"mode": "shard_local", "gather_every": 2},
    "every 5": {"mode": "shard_local", "gather_every": 5},
    "every 10": {"mode": "shard_local", "gather_every": 10},
    "shard_local": {"mode": "shard_local"},
}
COLUMNS = (
    Column("mode", "mode"),
    Column("loss", "validation loss", ".4f"),
    Column("deviation", "deviation over seeds", ".4f"),
    Column("over_gather", "over gather", "+.4f"),
    Column("over_gather_deviation", "its deviation", ".4f"),
)


def main() -> None:
    """Train every mode with every seed, and report."""
    run("modes", {mode: {"sharding": sharding} for mode, sharding in MODES.items()}, __doc__ or "")


def run(name: str, modes: Mapping[str, Mapping[str, Any]], doc: str) -> None:
    """Train with every mode's settings of Muon and with every seed, and report against the first mode.

    Args:
        name: of the files that are written, with the number of ranks behind it.
        modes: settings by the mode's name.
        doc: what the benchmark measures, in its first line.
    """
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two steps, one seed: to see that it runs")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds = 2, 1
    deepspeed.init_distributed("gloo")
    deepspeed.utils.logger.setLevel("WARNING")
    corpus = load_corpus(None)
    losses = {mode: [train(found, seed, args.steps, corpus) for seed in range(args.seeds)] for mode, found in modes.items()}
    if comm.get_rank() == 0:
        report(f"{name}_{comm.get_world_size()}", losses, args)


def train(settings: Mapping[str, Any], seed: int, steps: int, corpus: Corpus) -> float:
    """Train ``steps`` steps with ``settings`` of Muon; return the validation loss in nats per byte."""
    torch.manual_seed(seed)
    model = build_model("tiny", LENGTH)
    params = {"name": "muon", "lr": 0.02, "adamw": {"lr": 0.003, "betas": [0.9, 0.95]}, **settings}
    config = {
        "train_batch_size": BATCH,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "OptForge", "params": params},
        "scheduler": {"type": "OptForgeSchedule", "params": {"name": "linear", "warmup_ratio": 0.05, "total_num_steps": steps}},
    }
    engine = ds_optforge.initialize(model=model, config=config)[0]
    rows = micro_batch_rows(0, comm.get_rank(), comm.get_world_size(), engine.train_micro_batch_size_per_gpu())
    for step in range(steps):
        loss = engine(*corpus.batch(step, seed, BATCH, LENGTH, rows))
        engine.backward(loss)
        engine.step()
    engine.eval()
    with torch.no_grad():
        found = engine(*corpus.validation_windows(LENGTH, WINDOWS)).item()
    engine.destroy()
    return float(found)


def report(name: str, losses: dict[str, list[float]], args: argparse.Namespace) -> None:
    """Print the table, write the numbers and draw them."""
    rows, first = [], next(iter(losses.values()))
    for mode, found in losses.items():
        over = [loss - base for loss, base in zip(found, first, strict=True)]
        row = {"mode": mode, "losses": found, "loss": mean(found), "over_gather": mean(over)}
        if len(found) > 1:
            row |= {"deviation": stdev(found), "over_gather_deviation": stdev(over)}
        rows.append(row)
    ranks = comm.get_world_size()
    title = f"tiny GPT, ZeRO-3, {ranks} ranks ({128 // ranks} of 128 rows a rank), {args.steps} steps, {args.seeds} seeds"
    show(title, COLUMNS, rows)
    write(name, title, rows, args.out)
    fig, axes = figure()
    for place, row in enumerate(rows):
        axes.plot([place] * len(row["losses"]), row["losses"], "o", color="tab:blue", alpha=0.5)
        axes.plot(place, row["loss"], "_", color="tab:red", markersize=24)
    axes.set_xticks(range(len(rows)), [row["mode"] for row in rows])
    axes.set_ylabel("validation loss (nats per byte)")
    axes.set_title(f"{title}\ndots: seeds, line: mean", fontsize=10)
    save(name, fig, args.out)


if __name__ == "__main__":
    main()
    comm.destroy_process_group()  # a rank that leaves it open sometimes aborts at its end
