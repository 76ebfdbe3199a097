"""Measure the time that Muon adds to an iteration over AdamW's: ds_optforge and DeepSpeed's built-in Muon.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/step.py [--quick] [--out DIR]

Byte GPTs of width 512 and 1024 on ZeRO-2 and ZeRO-3; one short sequence per rank, so that the optimizer dominates. All
candidates take turns of one iteration, so that a change of the machine's speed meets all of them; an iteration lasts until
the slowest rank is done. An overhead is the median, over the rounds, of the candidate's iteration minus AdamW's in the
same round; "of it in engine.step" is the same for that call alone. "products" are the matrix products of the matrices that the
plan gives to a rank (as in orthogonalization.py; the slowest rank), run in the same rounds. "CPU" is the overhead in
processor time of a rank's process, which other programs on the machine add less to. AdamW steps the matrices too, so its
time on them is subtracted with the rest. Prints a table; writes step.json and step.png.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import deepspeed
import torch
from candidates import (
    ADAMW,
    BUILT_IN,
    GATHER,
    NS_METHODS,
    SHARD_LOCAL,
    Section,
    adamw,
    batch,
    built_in,
    engine_of,
    muon,
    network,
    plan_of,
    torch_adamw,
)
from deepspeed import comm
from orthogonalization import STEPS, gram_products, standard_products
from report import DEFAULT_OUT, Column, figure, save, show, write

from ds_optforge.orthogonalize import uses_gram
from workload import Corpus, load_corpus

MODELS = {512: 4, 1024: 2}  # layers of each width
SECONDS = 60  # wall time for the rounds of one width and stage
ROUNDS = (4, 12)  # fewest and most
RARELY = 3  # the built-in Gram form takes part in every third round: it is several times slower here
PRODUCTS = "products"
COLUMNS = [
    Column("width", "width"),
    Column("stage", "ZeRO"),
    Column("optimizer", "optimizer"),
    Column("iteration_ms", "iteration, ms", ".0f"),
    Column("overhead_ms", "over AdamW, ms", ".0f"),
    Column("in_step_ms", "of it in engine.step", ".0f"),
    Column("cpu_ms", "CPU, ms", ".0f"),
    Column("over_incumbent", "of built-in's", ".2f"),
    Column("cpu_over_incumbent", "CPU, of built-in's", ".2f"),
    Column("products_ms", "products, ms", ".0f"),
    Column("over_products", "over products", ".2f"),
    Column("cpu_over_products", "CPU, over products'", ".2f"),
]
TITLE = "Time of an iteration over AdamW's, {} ranks"


@dataclass
class Candidate:
    """One engine; by round, the seconds of its iteration: wall time, wall time of engine.step, processor time."""

    name: str
    run: Callable[[int], tuple[float, float, float]]
    samples: dict[int, tuple[float, float, float]] = field(default_factory=dict)


def main() -> None:
    """Measure every width and stage, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one width of 128, ZeRO-2 alone, two rounds")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    deepspeed.init_distributed("gloo")
    deepspeed.utils.logger.setLevel("WARNING")
    corpus = load_corpus(str(Path(__file__)) if args.quick else None)
    rows = []
    for width, layers in ({128: 2} if args.quick else MODELS).items():
        for stage in (2,) if args.quick else (2, 3):
            rows += measure(width, layers, stage, corpus, (2, 2) if args.quick else ROUNDS)
    if comm.get_rank() == 0:
        title = TITLE.format(comm.get_world_size())
        show(title, COLUMNS, rows)
        write("step", title, rows, args.out)
        draw(rows, title, args.out)


def sections() -> dict[str, Section]:
    """The optimizer sections that are compared."""
    found = {ADAMW: adamw(), f"{ADAMW} of torch": torch_adamw(), GATHER: muon(), SHARD_LOCAL: muon({"mode": "shard_local"})}
    return found | {BUILT_IN.format(method): built_in(method) for method in NS_METHODS}


def measure(width: int, layers: int, stage: int, corpus: Corpus, rounds: tuple[int, int]) -> list[dict[str, Any]]:
    """Train all candidates in turns; return a row for each."""
    engines = {name: engine_of(network(width, layers), stage, section) for name, section in sections().items()}
    candidates = [
        Candidate(name, lambda step, engine=engine: iterate(engine, corpus, step)) for name, engine in engines.items()
    ]
    products = own_products(width, layers, stage)
    candidates.append(Candidate(PRODUCTS, lambda step: time_products(products)))
    for candidate in candidates:  # allocates state, plans, and warms up
        candidate.run(0)
        candidate.run(1)
    take_turns(candidates, rounds)
    for engine in engines.values():
        engine.destroy()
    return table(width, stage, {candidate.name: of_all_ranks(candidate.samples) for candidate in candidates})


def take_turns(candidates: list[Candidate], rounds: tuple[int, int]) -> None:
    """Run rounds of one iteration per candidate until the time is up, the same number on all ranks."""
    start, (fewest, most) = perf_counter(), rounds
    for turn in range(most):
        late = torch.tensor(float(perf_counter() - start > SECONDS))
        comm.all_reduce(late)
        if turn >= fewest and late.item():
            break
        for candidate in candidates:
            if candidate.name != BUILT_IN.format("gram") or turn % RARELY == 0:
                candidate.samples[turn] = candidate.run(turn + 2)


def iterate(engine: Any, corpus: Corpus, step: int) -> tuple[float, float, float]:
    """Run one iteration on all ranks together; return the seconds that `Candidate` lists."""
    tokens, targets = batch(corpus, step)
    comm.barrier()
    start, cpu = perf_counter(), process_time()
    engine.backward(engine(tokens, targets))
    before = perf_counter()
    engine.step()
    end = perf_counter()
    return end - start, end - before, process_time() - cpu


def own_products(width: int, layers: int, stage: int) -> list[Callable[[], None]]:
    """Make the matrix products of each matrix that the plan gives to this rank, with memory of their own."""
    plan = plan_of(network(width, layers), stage, comm.get_world_size())
    shapes: Counter[tuple[int, int]] = Counter()
    for matrix, owner in zip(plan.layout.matrices, plan.owners, strict=True):
        shapes[matrix.rows, matrix.cols] += owner == comm.get_rank()
    return [
        (gram_products if uses_gram(*shape, STEPS) else standard_products)(torch.zeros(1, *shape, dtype=torch.bfloat16))
        for shape, count in shapes.items()
        for _ in range(count)
    ]


def time_products(products: list[Callable[[], None]]) -> tuple[float, float, float]:
    """Run the products on all ranks at the same time, as in a step; return the seconds that `Candidate` lists."""
    comm.barrier()
    start, cpu = perf_counter(), process_time()
    for run in products:
        run()
    end = perf_counter()
    return end - start, 0.0, process_time() - cpu


def of_all_ranks(samples: dict[int, tuple[float, float, float]]) -> dict[int, dict[str, float]]:
    """Reduce over the ranks; return milliseconds by round: the slowest rank's wall times, the mean of processor times."""
    found = {}
    for turn, sample in samples.items():
        slowest, total = 1e3 * torch.tensor(sample), 1e3 * torch.tensor(sample)
        comm.all_reduce(slowest, op=comm.ReduceOp.MAX)
        comm.all_reduce(total)
        cpu = total[2].item() / comm.get_world_size()
        found[turn] = {"iteration": slowest[0].item(), "step": slowest[1].item(), "cpu": cpu}
    return found


def table(width: int, stage: int, samples: dict[str, dict[int, dict[str, float]]]) -> list[dict[str, Any]]:
    """Make the rows, one per candidate: medians and ratios."""

    def over_adamw(name: str, what: str) -> float:
        return median(sample[what] - samples[ADAMW][turn][what] for turn, sample in samples[name].items())

    products = samples.pop(PRODUCTS)
    products_ms, products_cpu = (median(sample[what] for sample in products.values()) for what in ("iteration", "cpu"))
    incumbents = [BUILT_IN.format(method) for method in NS_METHODS]
    best, best_cpu = (min(over_adamw(name, what) for name in incumbents) for what in ("iteration", "cpu"))
    rows = []
    for name in samples:
        overhead, cpu = over_adamw(name, "iteration"), over_adamw(name, "cpu")
        row: dict[str, Any] = {
            "width": width,
            "stage": stage,
            "optimizer": name,
            "rounds": len(samples[name]),
            "iteration_ms": median(sample["iteration"] for sample in samples[name].values()),
            "overhead_ms": overhead,
            "in_step_ms": over_adamw(name, "step"),
            "cpu_ms": cpu,
        }
        if not name.startswith(ADAMW):
            row |= {"over_incumbent": overhead / best, "cpu_over_incumbent": cpu / best_cpu}
            row |= {"products_ms": products_ms, "over_products": overhead / products_ms}
            row["cpu_over_products"] = cpu / products_cpu
        rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], title: str, out: Path) -> None:
    """Draw grouped bars: the overheads of each width and stage, and the products."""
    cases = sorted({(row["width"], row["stage"]) for row in rows})
    names = [GATHER, SHARD_LOCAL, *(BUILT_IN.format(method) for method in NS_METHODS)]
    found = {(row["width"], row["stage"], row["optimizer"]): row for row in rows}
    fig, axes = figure(max(8.0, 2.8 * len(cases)), 4.8)
    for index, name in enumerate(names):
        bars = [found[(*case, name)] for case in cases]
        places = [place + (index - 1.5) * 0.2 for place in range(len(cases))]
        drawn = axes.bar(places, [row["overhead_ms"] for row in bars], 0.2, label=name)
        axes.bar_label(drawn, [f"{row['over_incumbent']:.2f}" for row in bars], fontsize=8)
    for place, case in enumerate(cases):
        products = found[(*case, GATHER)]["products_ms"]
        label = "matrix products of a rank" if place == 0 else None
        axes.hlines(products, place - 0.4, place + 0.4, color="black", linestyle=":", label=label)
    axes.set_xticks(range(len(cases)), [f"width {width}\nZeRO-{stage}" for width, stage in cases])
    axes.set_ylabel("ms over AdamW's iteration")
    axes.set_title(f"{title} (numbers: over the better built-in's)")
    axes.margins(y=0.15)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.legend(fontsize=8)
    save("step", fig, out)


if __name__ == "__main__":
    main()
    comm.destroy_process_group()  # a rank that leaves it open sometimes aborts at its end
