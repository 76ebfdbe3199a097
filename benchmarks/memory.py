"""Measure the peak workspace of an optimizer step on each rank beside its bound: two buckets and the largest matrix.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/memory.py [--quick] [--out DIR]

torch's profiler reports every allocation of a tensor and the level after it: exact, and with the operator that made it. It
runs from before the engine is built, so levels are absolute: "held" is what is allocated before a step (parameters,
gradients, state, kept buffers); peaks are above the level at the entrance of `Optimizer.step`, `engine.step` and the
iteration. A check is the peak of resident memory that the kernel counts during `Optimizer.step` of one more iteration,
without the profiler: it also sees what torch's allocator does not.

A bucket is a send and a receive buffer of bucket_numel elements each; the bound is two of them and what orthogonalizing the
largest matrix takes: the matrix and the temporaries of its iteration, measured alone. The built-in Muon orthogonalizes
outside of `Optimizer.step`, so for it the iteration counts. Prints a table; writes memory.json (with what was allocated at
the peak, by operator) and memory.png. On the CPU, with gloo.
"""

import argparse
import ctypes
import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from candidates import ADAMW, BUILT_IN, GATHER, SHARD_LOCAL, Section, adamw, batch, built_in, engine_of, muon, network
from deepspeed import comm
from report import DEFAULT_OUT, Column, figure, save, show, write
from torch.profiler import ProfilerActivity, profile, record_function

from ds_optforge.orthogonalize import orthogonalize
from workload import Corpus, load_corpus

MB = 1e6
LIBC = ctypes.CDLL(None)
LAYERS = 4
ITERATIONS = 3  # the first allocates state, the second what DeepSpeed keeps from then on
ITERATION, ENGINE_STEP, OPTIMIZER_STEP = "the iteration", "engine.step", "Optimizer.step"
RANGES = (ITERATION, ENGINE_STEP, OPTIMIZER_STEP)
COLUMNS = [
    Column("stage", "ZeRO"),
    Column("optimizer", "optimizer"),
    Column("held_mb", "held, MB", ".1f"),
    Column("iteration_mb", "peak of iteration, MB", ".1f"),
    Column("over_adamw_mb", "held + peak, over AdamW, MB", ".1f"),
    Column("engine_step_mb", "of engine.step, MB", ".1f"),
    Column("workspace_mb", "of Optimizer.step, MB", ".2f"),
    Column("resident_mb", "by the kernel, MB", ".2f"),
    Column("over_bound", "share of bound", ".2f"),
]


def main() -> None:
    """Measure every candidate on ZeRO-2 and ZeRO-3, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="width 128 instead of 512, ZeRO-3 alone, no built-in Muon")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    deepspeed.init_distributed("gloo")
    deepspeed.utils.logger.setLevel("WARNING")
    give_back_at_once()
    count_all_threads()
    corpus = load_corpus(str(Path(__file__)) if args.quick else None)
    sizes = Sizes.of(width=128 if args.quick else 512)
    rows = [row for stage in ((3,) if args.quick else (2, 3)) for row in measure_stage(stage, sizes, corpus, args.quick)]
    if comm.get_rank() == 0:
        title = (
            f"Workspace of a step, the larger of {comm.get_world_size()} ranks, byte GPT of width {sizes.width}. Bucket: "
            f"{sizes.bucket_mb:.2f} MB; largest matrix: {sizes.matrix_mb:.2f} MB, with temporaries {sizes.working_set_mb:.2f}; "
            f"bound: {sizes.bound_mb:.2f}"
        )
        show(title, COLUMNS, rows)
        write("memory", title, rows, args.out, sizes=asdict(sizes))
        draw(rows, sizes, args.out)


def give_back_at_once() -> None:
    """Make the C library return blocks of 64 KB and more to the kernel when they are freed, so that its count is exact."""
    m_mmap_threshold = -3
    LIBC.mallopt(m_mmap_threshold, 2**16)


def count_all_threads() -> None:
    """Make torch's allocator also count memory that other threads release: gloo's hold the buffers that travel."""
    libc10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(libc10, "FLAGS_caffe2_report_cpu_memory_usage").value = True


@dataclass(frozen=True)
class Sizes:
    """The terms of the bound, in MB. A bucket's buffer holds two of the largest matrices, (4 * width, width).

    Attributes:
        width: width of the model.
        bucket_numel: elements of one of a bucket's two buffers.
        bucket_mb, matrix_mb: a bucket with both buffers, and the largest matrix.
        working_set_mb: the largest matrix and the temporaries of its iteration.
        bound_mb: two buckets and the working set.
    """

    width: int
    bucket_numel: int
    bucket_mb: float
    matrix_mb: float
    working_set_mb: float
    bound_mb: float

    @classmethod
    def of(cls, width: int) -> "Sizes":
        """Measure the working set of the largest matrix of a model of this width."""
        largest = torch.ones(4 * width, width, dtype=torch.bfloat16)
        matrix, bucket = largest.nbytes / MB, 2 * 2 * largest.nbytes / MB
        orthogonalize(largest)
        working_set = matrix + peak(recorded(partial(orthogonalize, largest)).events) / MB
        return cls(width, 2 * largest.numel(), bucket, matrix, working_set, 2 * bucket + working_set)


@dataclass(frozen=True)
class Allocation:
    """An event of torch's allocator: it allocated ``size`` bytes at ``address``, or freed them where ``size`` is negative.

    Attributes:
        time: nanoseconds.
        level: bytes that the whole process has allocated after it.
        within: operators and ranges around it, from the outermost.
    """

    time: int
    address: int
    size: int
    level: int
    within: tuple[str, ...]


@dataclass(frozen=True)
class Recording:
    """All allocations in order, and (name, first and last nanosecond) of each range."""

    events: list[Allocation]
    ranges: list[tuple[str, int, int]]

    def calls(self, name: str) -> list[list[Allocation]]:
        """The events of all threads during each range whose name begins with ``name``."""
        windows = sorted((start, end) for label, start, end in self.ranges if label.startswith(name))
        return [[event for event in self.events if start <= event.time <= end] for start, end in windows]


def recorded(run: Callable[[], Any]) -> Recording:
    """Call ``run`` and record every allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    recording = Recording([], [])
    for root in profiler.profiler.kineto_results.experimental_event_tree():
        _enter(root, (), recording)
    recording.events.sort(key=lambda event: event.time)
    return recording


def _enter(node: Any, within: tuple[str, ...], recording: Recording) -> None:
    if node.name == "[memory]":
        event = node.typed[1]
        recording.events.append(Allocation(node.start_time_ns, event.ptr, event.alloc_size, event.total_allocated, within))
    elif node.name.startswith(RANGES):
        recording.ranges.append((node.name, node.start_time_ns, node.end_time_ns))
    for child in node.children:
        _enter(child, (*within, node.name), recording)


def peak(events: list[Allocation]) -> int:
    """Bytes from the level before the first event to the highest level."""
    return max(event.level for event in events) - before(events) if events else 0


def before(events: list[Allocation]) -> int:
    """Bytes allocated before the first event."""
    return events[0].level - events[0].size


def at_peak(events: list[Allocation]) -> list[dict[str, Any]]:
    """List the memory allocated at the highest level by operator, the largest first."""
    highest = max(range(len(events)), key=lambda index: events[index].level)
    live: dict[int, Allocation] = {}
    for event in events[: highest + 1]:
        live[event.address] = event
    sizes: Counter[tuple[str, int]] = Counter()
    for event in live.values():
        if event.size > 0:
            sizes[" > ".join(label for label in event.within if not label.startswith(RANGES)), event.size] += 1
    largest = sorted(sizes.items(), key=lambda item: -item[0][1] * item[1])[:12]
    return [{"operator": path, "mb": size / MB, "count": count} for (path, size), count in largest]


def measure_stage(stage: int, sizes: Sizes, corpus: Corpus, quick: bool) -> list[dict[str, Any]]:
    """Measure every candidate on one stage; return a row for each."""
    rows: list[dict[str, Any]] = []
    for name, section in sections(sizes, quick).items():
        found = largest_of_ranks(measure(sizes.width, stage, section, corpus))
        bounded = "sharding" in section["params"]
        over = found["workspace_mb"] / sizes.bound_mb if bounded else None
        rows.append({"stage": stage, "optimizer": name, **found, "over_bound": over})
        rows[-1]["over_adamw_mb"] = found["total_mb"] - rows[0]["total_mb"]
    return rows


def sections(sizes: Sizes, quick: bool) -> dict[str, Section]:
    """The optimizer sections that are compared."""
    bucket = {"bucket_numel": sizes.bucket_numel}
    found = {
        ADAMW: adamw(),
        GATHER: muon(bucket),
        f"{GATHER}, 8-bit state": muon(bucket, state_dtype="8bit"),
        SHARD_LOCAL: muon({"mode": "shard_local", **bucket}),
    }
    return found if quick else {**found, BUILT_IN.format("standard"): built_in("standard")}


def largest_of_ranks(own: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the rank with the largest workspace. Collective."""
    every: list[dict[str, Any]] = [{}] * comm.get_world_size()
    torch.distributed.all_gather_object(every, own)
    return max(every, key=lambda found: found["workspace_mb"])


def measure(width: int, stage: int, section: Section, corpus: Corpus) -> dict[str, Any]:
    """Train a few iterations on a new engine; return the figures of the last, and the kernel's of one more."""
    engines: list[Any] = []

    def run() -> None:
        engines.append(engine_of(network(width, LAYERS), stage, section))
        for step in range(ITERATIONS):
            iterate(engines[0], *batch(corpus, step))

    recording = recorded(run)
    resident = watch_resident(engines[0].optimizer.optimizer)
    iterate(engines[0], *batch(corpus, ITERATIONS))
    engines.pop().destroy()
    gc.collect()  # or it would be released during the next recording
    return figures(recording) | {"resident_mb": max(resident) / MB}


def iterate(engine: Any, tokens: torch.Tensor, targets: torch.Tensor) -> None:
    """Train one step, inside the ranges that a recording looks for."""
    with record_function(ITERATION):
        engine.backward(engine(tokens, targets))
        with record_function(ENGINE_STEP):
            engine.step()


def figures(recording: Recording) -> dict[str, Any]:
    """The figures of the last iteration, in MB."""
    iteration, engine_step = recording.calls(ITERATION)[-1], recording.calls(ENGINE_STEP)[-1]
    steps = [call for call in recording.calls(OPTIMIZER_STEP) if call and call[0].time > iteration[0].time]
    held = before(iteration) - before(recording.events)
    largest = max(steps, key=peak)
    return {
        "held_mb": held / MB,
        "workspace_mb": peak(largest) / MB,
        "engine_step_mb": peak(engine_step) / MB,
        "iteration_mb": peak(iteration) / MB,
        "total_mb": (held + peak(iteration)) / MB,
        "at_peak": at_peak(largest),
    }


def watch_resident(optimizer: torch.optim.Optimizer) -> list[int]:
    """Return a list to which every step of the optimizer appends the rise of resident memory in it, in bytes."""
    peaks: list[int] = []
    start = [0]

    def enter(*_: Any) -> None:
        LIBC.malloc_trim(0)  # what is free inside the heap would be used first, and not be counted
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts afresh from what is resident
        start[0] = _status("VmRSS")

    optimizer.register_step_pre_hook(enter)
    optimizer.register_step_post_hook(lambda *_: peaks.append(_status("VmHWM") - start[0]))
    return peaks


def _status(key: str) -> int:
    """Read a size from /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def draw(rows: list[dict[str, Any]], sizes: Sizes, out: Path) -> None:
    """Draw bars: the workspace of Optimizer.step with its bound, and the memory of an iteration over AdamW's."""
    fig, axes = figure(11, 4.5)
    axes.remove()
    left, right = fig.subplots(1, 2)
    ours = [row for row in rows if row["over_bound"] is not None]
    _bars(left, ours, "workspace_mb", lambda row: f"{row['over_bound']:.2f} of bound")
    left.axvline(sizes.bound_mb, color="black", linewidth=1, linestyle=":")
    left.set_xlabel(f"peak workspace of Optimizer.step, MB (dotted: bound, {sizes.bound_mb:.1f})")
    _bars(right, rows, "total_mb", lambda row: f"{row['over_adamw_mb']:+.1f} MB")
    right.set_xlabel("held + peak of an iteration, MB (over AdamW)")
    fig.suptitle(f"Memory of a rank: byte GPT of width {sizes.width}, {comm.get_world_size()} ranks")
    save("memory", fig, out)


def _bars(axes: Any, rows: list[dict[str, Any]], key: str, note: Callable[[dict[str, Any]], str]) -> None:
    names = [f"ZeRO-{row['stage']}\n{row['optimizer']}" for row in rows]
    bars = axes.barh(range(len(rows)), [row[key] for row in rows], color=[f"C{row['stage'] - 2}" for row in rows])
    axes.bar_label(bars, [note(row) for row in rows], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(row[key] for row in rows))


if __name__ == "__main__":
    main()
    comm.destroy_process_group()  # a rank that leaves it open sometimes aborts at its end
