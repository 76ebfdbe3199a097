"""Compare Newton-Schulz of ds_optforge with its matrix products alone, torch.optim.Muon's and DeepSpeed's: time, accuracy.

    OMP_NUM_THREADS=1 python benchmarks/orthogonalization.py [--quick] [--out DIR]

Per shape and batch all candidates orthogonalize the same Gaussian bfloat16 matrices with five quintic steps, taking turns,
so that a change of the machine's speed meets all of them; times are medians of CPU time in one thread, which other
programs on the machine do not add to. "products" is the sequence of bmm and baddbmm
calls of the form that ours takes, into memory allocated before. torch.optim.Muon orthogonalizes one matrix after the other;
DeepSpeed's functions and ours take the batch. The distance is ||X - U V^T|| / ||U V^T|| with U V^T computed in float64.
Prints a table; writes orthogonalization.json and orthogonalization.png.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from deepspeed.runtime.zero.muon.original_muon import zeropower_via_gram_newtonschulz, zeropower_via_newtonschulz5
from report import DEFAULT_OUT, Column, figure, save, show, write
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from ds_optforge.orthogonalize import at_once, flops, orthogonalize, uses_gram

SHAPES = [(512, 512), (1024, 1024), (512, 2048), (2048, 512), (1024, 4096), (4096, 1024)]
BATCHES = [1, 4, 8, 24]
LARGEST = 4 * 1024 * 4096  # elements of a batch: beyond it one round of all candidates takes over ten seconds
SECONDS = 160  # wall time for all cases, shared out by FLOPs
LARGEST_FOR_HALF = 512 * 2048  # DeepSpeed's Gram form runs in float16, which a CPU without such products does slowly
COMPILED_BATCH = 4  # ours under torch.compile: one compilation a shape, each takes seconds
TRIPLE, STEPS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7
COLUMNS = [
    Column("shape", "shape"),
    Column("batch", "x"),
    Column("form", "form"),
    Column("auto_ms", "ours", ".1f"),
    Column("standard_ms", "std", ".1f"),
    Column("gram_ms", "Gram", ".1f"),
    Column("compiled_ms", "comp.", ".1f"),
    Column("products_ms", "prod", ".1f"),
    Column("torch_ms", "torch", ".1f"),
    Column("deepspeed_standard_ms", "DS std", ".1f"),
    Column("deepspeed_gram_ms", "DS Gram", ".1f"),
    Column("over_products", "/prod", ".2f"),
    Column("over_torch", "x torch", ".2f"),
    Column("over_deepspeed", "x DS", ".2f"),
    Column("distance", "dist", ".3f"),
    Column("torch_distance", "torch", ".3f"),
    Column("deepspeed_distance", "DS", ".3f"),
]
TITLE = (
    "Orthogonalization of bfloat16 matrices, five quintic steps; CPU milliseconds, /prod: ours over its products alone,\n"
    "x torch, x DS: how many times faster ours is; dist, torch, DS: distance to the polar factor"
)


def main() -> None:
    """Measure every shape and batch, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="512 wide matrices, batches 1 and 4")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = [(b, r, c) for r, c in SHAPES for b in BATCHES if b * r * c <= LARGEST]
    if args.quick:
        cases = [(b, r, c) for b, r, c in cases if b <= 4 and min(r, c) == 512]
    deadline = perf_counter() + (SECONDS / 4 if args.quick else SECONDS)
    rows = []
    for index, case in enumerate(cases):
        left = sum(work(*later) for later in cases[index:])
        rows.append(measure(*case, seconds=(deadline - perf_counter()) * work(*case) / left))
    show(TITLE, COLUMNS, rows)
    write("orthogonalization", TITLE, rows, args.out)
    draw(rows, args.out)


def work(batch: int, rows: int, cols: int) -> float:
    """Weight of a case when time is shared out: its FLOPs, and a constant for compiling and the exact factor."""
    return batch * flops(rows, cols, STEPS) + 1e11


def measure(batch: int, rows: int, cols: int, seconds: float) -> dict[str, Any]:
    """Measure one case for about ``seconds``; return its row of the table."""
    given = torch.randn(batch, rows, cols).bfloat16()
    until = perf_counter() + seconds
    run = candidates(given)
    found = {name: function() for name, function in run.items()}  # compiles and warms up
    times = {name: 1e3 * value for name, value in alternate(run, until).items()}
    polar = polar_factor(given[0])
    far = {name: distance(result, polar) for name, result in found.items() if name != "products"}
    theirs = min((name for name in times if name.startswith("deepspeed")), key=times.__getitem__)
    return {
        "shape": f"{rows}x{cols}",
        "batch": batch,
        "form": "gram" if uses_gram(rows, cols, STEPS) else "standard",
        **{f"{name}_ms": value for name, value in times.items()},
        "over_products": times["auto"] / times["products"],
        "over_torch": times["torch"] / times["auto"],
        "over_deepspeed": times[theirs] / times["auto"],
        "distance": far["auto"],
        "torch_distance": far["torch"],
        "deepspeed_distance": far[theirs],
    }


def candidates(given: Tensor) -> dict[str, Callable[[], Any]]:
    """The functions that take turns on the matrices ``given``, (batch, rows, cols)."""
    _, rows, cols = given.shape
    found: dict[str, Callable[[], Any]] = {
        "auto": partial(orthogonalize, given),
        "standard": partial(orthogonalize, given, method="standard"),
        "gram": partial(orthogonalize, given, method="gram"),
        "products": (gram_products if uses_gram(rows, cols, STEPS) else standard_products)(given),
        "torch": lambda: [_zeropower_via_newtonschulz(one, TRIPLE, STEPS, EPS) for one in given.clone()],  # it writes to it
        "deepspeed_standard": partial(zeropower_via_newtonschulz5, given, STEPS),
    }
    if len(given) == COMPILED_BATCH:
        found["compiled"] = partial(torch.compile(orthogonalize, dynamic=False), given)
    if given.numel() <= LARGEST_FOR_HALF:
        found["deepspeed_gram"] = partial(zeropower_via_gram_newtonschulz, given, STEPS)
    return found


def standard_products(given: Tensor) -> Callable[[], None]:
    """Make a function that runs the products of the standard form on the short side of ``given``, (batch, rows, cols).

    The matrices are zero, so that no value can overflow.
    """
    matrices = torch.zeros_like(given if given.shape[1] <= given.shape[2] else given.mT.contiguous())
    batches = torch.split(matrices, at_once(given))
    grams, polynomials = (matrices.new_zeros(len(batches[0]), matrices.shape[1], matrices.shape[1]) for _ in range(2))
    outs = torch.empty_like(batches[0])

    def run() -> None:
        for x in batches:
            gram, polynomial, out = (buffer[: len(x)] for buffer in (grams, polynomials, outs))
            for a, b, c in (TRIPLE,) * STEPS:
                torch.bmm(x, x.mT, out=gram)
                torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
                torch.baddbmm(x, polynomial, x, beta=a, out=out)

    return run


def gram_products(given: Tensor) -> Callable[[], None]:
    """Make a function that runs the products of the Gram form on ``given``, (batch, rows, cols), tall ones not transposed.

    These are R, Z, R Z Z and Q, and X multiplied by Q twice.
    """
    tall = given.shape[1] > given.shape[2]
    batches = torch.split(torch.zeros_like(given), at_once(given))
    n = min(given.shape[1:])
    buffers = [given.new_zeros(len(batches[0]), n, n) for _ in range(4)]
    outs = torch.empty_like(batches[0])

    def run() -> None:
        for x in batches:
            r, z, q, spare = (buffer[: len(x)] for buffer in buffers)
            for steps in (2, 3):
                torch.bmm(*((x.mT, x) if tall else (x, x.mT)), out=r)
                for step in range(steps):
                    torch.baddbmm(r, r, r, beta=TRIPLE[1], alpha=TRIPLE[2], out=z)
                    if step + 1 < steps:
                        torch.bmm(r, z, out=spare)
                        torch.bmm(spare, z, out=r)
                    if step > 0:
                        torch.bmm(q, z, out=spare)
                torch.bmm(*((x, q) if tall else (q, x)), out=outs[: len(x)])

    return run


def alternate(run: dict[str, Callable[[], Any]], until: float) -> dict[str, float]:
    """Time the candidates in turns and return the median seconds of each: three rounds, then up to fifteen until ``until``."""
    seconds: dict[str, list[float]] = {name: [] for name in run}
    shuffled = Random(0)
    for turn in range(15):
        if turn >= 3 and perf_counter() > until:
            break
        # A new order each time: what ran before leaves its caches and its freed memory behind.
        for name in shuffled.sample(list(run), len(run)):
            start = process_time()
            run[name]()
            seconds[name].append(process_time() - start)
    return {name: median(values) for name, values in seconds.items()}


def polar_factor(matrix: Tensor) -> Tensor:
    """Compute U V^T of a matrix U S V^T, (rows, cols), in float64: (M M^T)^(-1/2) M by eigendecomposition of the short side."""
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().mT
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    polar = vectors @ ((vectors.mT @ wide) / values.sqrt().unsqueeze(-1))
    return polar if matrix.shape[0] <= matrix.shape[1] else polar.mT


def distance(found: Any, polar: Tensor) -> float:
    """Relative distance of the first matrix of a batch, (batch, rows, cols), to its polar factor, (rows, cols)."""
    return float((found[0].double() - polar).norm() / polar.norm())


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Draw grouped bars: each candidate's time over that of the products alone."""
    names = {"auto": "ds_optforge", "compiled": f"the same, compiled (batch {COMPILED_BATCH})", "torch": "torch.optim.Muon"}
    names |= {"deepspeed_standard": "DeepSpeed, standard"}
    fig, axes = figure(max(8.0, 0.6 * len(rows)), 4.5)
    for index, (name, label) in enumerate(names.items()):
        places = [place + (index - (len(names) - 1) / 2) * 0.2 for place in range(len(rows))]
        axes.bar(places, [row.get(f"{name}_ms", 0) / row["products_ms"] for row in rows], 0.2, label=label)
    axes.axhline(1, color="black", linewidth=1)
    axes.axhline(1.15, color="black", linewidth=1, linestyle=":")
    labels = ["\nx ".join(row["shape"].split("x")) + f"\n{row['batch']} of it" for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylabel("time / matrix products alone")
    axes.set_title("Orthogonalization: rows x columns, and how many (line: products alone; dotted: 1.15)")
    axes.legend()
    save("orthogonalization", fig, out)


if __name__ == "__main__":
    main()
