"""Search for Muon's best learning rate as the model grows wider, for each scale of the update.

    OMP_NUM_THREADS=1 python benchmarks/lr_transfer.py [--seeds 3] [--quick] [--out DIR]

Byte GPTs of two layers, widths 64 to 512, each trained with the same seeds on the same batches with Muon's rate on a grid of
factors of 2; everything else, AdamW's rate for embeddings, head and norms included, stays as it is. A width's search starts
at the best rate of the width before and continues until two rates on either side of the best one are known. "best" is the
vertex of the parabola through the best rate and its neighbours. One search runs per core. Prints a table; writes
lr_transfer.json and lr_transfer.png.
"""

import argparse
import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import torch
from report import DEFAULT_OUT, Column, save, show, write

from ds_optforge import build_optimizer, build_scheduler
from ds_optforge.rules.muon import Scale
from workload import Corpus, load_corpus
from workload.gpt import GPT, GPTConfig

WIDTHS = (64, 128, 256, 512)
SCALES: tuple[Scale, ...] = get_args(Scale)
LAYERS, BATCH, LENGTH, STEPS, WINDOWS = 2, 8, 64, 50, 64
START = -5  # log2 of the rate at which the first search starts
REACH = 2  # rates on either side of the best one that are tried
COLUMNS = (
    Column("scale", "scale"),
    Column("width", "width"),
    Column("rate", "best learning rate", ".4f"),
    Column("over_narrowest", "over the narrowest model's", ".2f"),
    Column("loss", "validation loss there", ".3f"),
    Column("loss_at_narrowest", "at the narrowest model's best rate", ".3f"),
)


def main() -> None:
    """Search for every scale and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="of weights and batches; a loss is the mean over them")
    parser.add_argument("--quick", action="store_true", help="widths 16 and 32, two steps: to see that it runs")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    widths, steps, seeds = ((16, 32), 2, 1) if args.quick else (WIDTHS, STEPS, args.seeds)
    workers = min(len(SCALES), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        searches = pool.map(partial(search_widths, widths=widths, steps=steps, seeds=seeds), SCALES)
        found = dict(zip(SCALES, searches, strict=True))
    rows = [row for scale in SCALES for row in table(scale, found[scale])]
    title = f"Muon's best learning rate by width, {LAYERS} layers, {steps} steps of {BATCH * LENGTH} bytes, {seeds} seed(s)"
    show(title, COLUMNS, rows)
    write("lr_transfer", title, rows, args.out)
    draw(rows, title, args.out)


def search_widths(scale: Scale, widths: tuple[int, ...], steps: int, seeds: int) -> dict[int, dict[int, float]]:
    """Search every width, each from the best rate of the one before; return losses by width and by log2 of the rate."""
    found: dict[int, dict[int, float]] = {}
    start = START
    for width in widths:
        found[width] = search(
            lambda exponent, width=width: mean(train(scale, width, 2.0**exponent, steps, seed) for seed in range(seeds)), start
        )
        start = min(found[width], key=lambda exponent: found[width][exponent])
        losses = ", ".join(f"2^{exponent} {loss:.3f}" for exponent, loss in sorted(found[width].items()))
        print(f"{scale}, width {width}: {losses}", flush=True)
    return found


def search(loss_at: Callable[[int], float], start: int) -> dict[int, float]:
    """Find the best exponent; return losses by exponent, `REACH` neighbours on either side of the best included."""
    found: dict[int, float] = {}
    best = start
    while any(exponent not in found for exponent in range(best - REACH, best + REACH + 1)):
        # The nearest first: a better one may make the farthest unnecessary.
        exponents = sorted(range(best - REACH, best + REACH + 1), key=lambda exponent: abs(exponent - best))
        unknown = next(exponent for exponent in exponents if exponent not in found)
        found[unknown] = loss_at(unknown)
        best = min(found, key=lambda exponent: found[exponent])
    return found


def train(scale: Scale, width: int, lr: float, steps: int, seed: int) -> float:
    """Train one model; return the validation loss in nats per byte, infinite where it diverged."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(layers=LAYERS, width=width, heads=width // 16, sequence_length=LENGTH))
    params = {"name": "muon", "lr": lr, "orthogonalization": {"scale": scale}, "adamw": {"lr": 0.003, "betas": [0.9, 0.95]}}
    optimizer = build_optimizer(model, params)
    scheduler = build_scheduler(optimizer, {"name": "linear", "warmup_ratio": 0.1}, total_steps=steps)
    for step in range(steps):
        loss = model(*corpus().batch(step, seed, BATCH, LENGTH, slice(0, BATCH)))
        if not loss.isfinite():
            return math.inf
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found = model(*corpus().validation_windows(LENGTH, WINDOWS)).item()
    return found if math.isfinite(found) else math.inf


@cache
def corpus() -> Corpus:
    """The corpus of the standard library, read once per process."""
    return load_corpus(None)


def table(scale: Scale, found: dict[int, dict[int, float]]) -> list[dict[str, Any]]:
    """Make the rows of one scale, one per width."""
    narrowest = vertex(next(iter(found.values())))[0]
    rows = []
    for width, losses in found.items():
        exponent, loss = vertex(losses)
        rows.append(
            {
                "scale": scale,
                "width": width,
                "rate": 2**exponent,
                "over_narrowest": 2 ** (exponent - narrowest),
                "loss": loss,
                "loss_at_narrowest": losses.get(round(narrowest)),
                "losses": {f"{2.0**e:g}": losses[e] if math.isfinite(losses[e]) else None for e in sorted(losses)},
            }
        )
    return rows


def vertex(losses: dict[int, float]) -> tuple[float, float]:
    """(exponent, loss) at the lowest point of the parabola through the best exponent and its neighbours."""
    best = min(losses, key=lambda exponent: losses[exponent])
    left, middle, right = (losses[best + side] for side in (-1, 0, 1))
    curvature = left - 2 * middle + right
    if not (math.isfinite(curvature) and curvature > 0):
        return float(best), middle
    shift = (left - right) / (2 * curvature)
    return best + shift, middle - curvature * shift**2 / 2


def draw(rows: list[dict[str, Any]], title: str, out: Path) -> None:
    """Draw a plot per scale: loss against rate, a curve per width, a star at the best rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fig, plots = pyplot.subplots(1, len(SCALES), figsize=(2.8 * len(SCALES), 3.3), sharey=True, layout="constrained")
    widths = sorted({row["width"] for row in rows})
    for axes, scale in zip(plots, SCALES, strict=True):
        for row in (row for row in rows if row["scale"] == scale):
            color = pyplot.get_cmap("viridis")(0.85 * widths.index(row["width"]) / max(len(widths) - 1, 1))
            curve = [(float(rate), loss) for rate, loss in row["losses"].items() if loss is not None]
            axes.plot(*zip(*curve, strict=True), "o-", markersize=3, color=color, label=f"width {row['width']}")
            axes.plot(row["rate"], row["loss"], "*", markersize=13, color=color, markeredgecolor="black")
        axes.set_xscale("log", base=2)
        axes.set_title(scale)
        axes.set_xlabel("Muon's learning rate")
        axes.grid(color="0.92")
    plots[0].set_ylabel("validation loss (nats per byte)")
    plots[0].legend(fontsize=8)
    fig.suptitle(f"{title}; stars: best rate", fontsize=10)
    save("lr_transfer", fig, out)


if __name__ == "__main__":
    main()
