"""Measure the processor time that QK-clip adds to an iteration.

    OMP_NUM_THREADS=1 python benchmarks/qk_clip.py [--quick] [--out DIR]

A Llama of transformers over bytes, of four layers of width 128, in one process. Muon without QK-clip, with it in every step and
with it in every tenth take turns of ten iterations: forward pass, backward pass and step. A ratio is the median over the rounds
of the processor time with QK-clip over that without it in the same round, so that other programs on the machine change little.
In "clips", tau is so small that every head is clipped; in "watches", so large that none is. It writes qk_clip.json.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from report import DEFAULT_OUT, Column, show, write

from ds_optforge import build_optimizer
from workload.llama import Llama

ITERATIONS, ROUNDS = 10, 12  # iterations of a turn, turns of each
BATCH, LENGTHS = 4, (128, 512)
TAUS = {"clips": 1e-3, "watches": 1e6}
COLUMNS = [
    Column("tokens", "tokens of a sequence"),
    Column("kind", "QK-clip"),
    Column("every", "every"),
    Column("ratio", "iteration over that without", ".3f"),
]
TITLE = "Processor time of an iteration with QK-clip"


def turn(length: int, clip: dict[str, Any] | None) -> Callable[[], float]:
    """A function that trains for `ITERATIONS` with Muon, and returns the seconds of processor time that they took."""
    torch.manual_seed(0)
    model = Llama(length)
    optimizer = build_optimizer(model, {"name": "muon", "lr": 0.001, **({"qk_clip": clip} if clip else {})})
    tokens = torch.randint(256, (BATCH, length))

    def run() -> float:
        start = process_time()
        for _ in range(ITERATIONS):
            model(tokens, tokens.roll(-1, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return process_time() - start

    return run


def measured(length: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each kind of clip."""
    kinds = [(kind, every) for kind in TAUS for every in (1, 10)]
    plain = turn(length, None)
    turns = {kind: turn(length, {"tau": TAUS[kind[0]], "every": kind[1]}) for kind in kinds}
    ratios: dict[tuple[str, int], list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        base = plain()
        for kind, run in turns.items():
            seconds = run()
            if number:  # the first turn allocates
                ratios[kind].append(seconds / base)
    return [{"tokens": length, "kind": k, "every": every, "ratio": median(ratios[k, every])} for k, every in kinds]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short round: to see that it runs")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    rows = [row for length in ((16,) if args.quick else LENGTHS) for row in measured(length, 1 if args.quick else ROUNDS)]
    show(TITLE, COLUMNS, rows)
    print(write("qk_clip", TITLE, rows, args.out))


if __name__ == "__main__":
    main()
