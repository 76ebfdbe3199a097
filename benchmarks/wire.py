"""Measure the bytes that Muon sends between two hosts beyond AdamW's, and their time on a slow link.

    python benchmarks/wire.py [--quick] [--out DIR]

Needs root and iproute2: the hosts are network namespaces (see hosts.py), 1 or 2 ranks each, started with torchrun. Bytes are
those that the interface of the first host counted in a step, in and out, headers included, AdamW's on the same stage
subtracted: the fewest of the steps, since retransmissions only add; candidates take turns of one step. Four ranks are
placed in blocks (0 and 1 on the first host, as torchrun does) and in turn (0 and 2, as `mpirun --map-by node` does): a ring of
gathers crosses the link twice as often then. "plan" is the figure of the exchange plan. "floor": on ZeRO-3 every matrix must be
collected on one rank and returned, which is 2 bytes per element, in and out together, for 2 ranks and for 4; on ZeRO-1 and 2
the fragments of straddling matrices. Then the same with the link capped: milliseconds of a step, means of five steps, because
every fifth one gathers. Prints tables; writes wire.json and wire.png.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from time import perf_counter, sleep
from typing import Any

import deepspeed
import torch
from candidates import (
    ADAMW,
    BUILT_IN,
    GATHER,
    SHARD_LOCAL,
    Section,
    adamw,
    batch,
    built_in,
    engine_of,
    muon,
    network,
    plan_of,
    sharded,
)
from deepspeed import comm
from hosts import Host, missing, traffic, two_hosts
from report import DEFAULT_OUT, Column, figure, save, show, write

from ds_optforge.zero.buckets import NO_STATISTICS, Kept, exchange_buckets
from workload import load_corpus

PORT = 29500
LINKS = {"1gbit": "1 Gbit/s", "100mbit": "100 Mbit/s"}  # by tc's name
QUIET = 0.02  # seconds after a barrier until its last packets have been counted
LAUNCH_LIMIT = 900  # seconds
NORMUON = "gather, normuon"
INCUMBENT = BUILT_IN.format("standard")
BYTES_COLUMNS = [
    Column("ranks", "ranks"),
    Column("placed", "placed"),
    Column("stage", "ZeRO"),
    Column("optimizer", "optimizer"),
    Column("megabytes", "MB over AdamW", ".3f"),
    Column("plan_megabytes", "plan, MB", ".3f"),
    Column("floor_megabytes", "floor, MB", ".3f"),
    Column("over_floor", "of floor", ".3f"),
    Column("less_than_incumbent", "times less than built-in", ".1f"),
]
TIME_COLUMNS = [
    Column("link", "link"),
    Column("optimizer", "optimizer, ZeRO-3, 2 ranks"),
    Column("milliseconds", "ms a step", ".0f"),
    Column("overhead_ms", "over AdamW, ms", ".0f"),
    Column("over_incumbent", "of built-in's", ".2f"),
]


@dataclass(frozen=True)
class Case:
    """One launch on two hosts.

    Attributes:
        ranks_per_host: number of ranks on each.
        rate: speed of the link, as `tc` writes it; None leaves it as fast as memory.
        stages: ZeRO stages to measure.
        steps: measured steps of each candidate.
        width, layers: size of the model.
        in_turn: True puts neighbouring ranks on different hosts.
    """

    ranks_per_host: int
    rate: str | None
    stages: tuple[int, ...]
    steps: int
    width: int
    layers: int
    in_turn: bool = False

    @property
    def world_size(self) -> int:
        """Number of ranks on both hosts."""
        return 2 * self.ranks_per_host

    @property
    def first_host(self) -> list[int]:
        """The ranks on the first host."""
        return list(range(0, self.world_size, 2) if self.in_turn else range(self.ranks_per_host))


@dataclass
class Candidate:
    """One engine, with the bytes at the interface and the seconds of every measured step."""

    name: str
    engine: Any
    bytes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    """Launch every case and report; with --rank-of, run one rank of a case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="width 128, ZeRO-3, 2 ranks, 1 Gbit/s")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)  # a case as JSON, in the processes that torchrun starts
    args = parser.parse_args()
    if args.rank_of:
        be_a_rank(Case(**json.loads(args.rank_of)), args.out)
        return
    if reason := missing():
        sys.exit(f"wire.py: {reason}")
    rows = [row for case in cases(args.quick) for row in launch(case)]
    report(rows, args.out)


def cases(quick: bool) -> list[Case]:
    """List the launches: three for the bytes, one per link for the times."""
    if quick:
        return [Case(1, "1gbit", (3,), steps=5, width=128, layers=2)]
    # With three layers, cuts of ZeRO-1 and ZeRO-2 go through a matrix, between the hosts too.
    counted = [Case(1, None, (1, 2, 3), steps=5, width=512, layers=3), Case(2, None, (2, 3), steps=5, width=512, layers=3)]
    counted.append(Case(2, None, (3,), steps=5, width=512, layers=3, in_turn=True))
    return counted + [Case(1, rate, (3,), steps=5, width=512, layers=1) for rate in LINKS]


def launch(case: Case) -> list[dict[str, Any]]:
    """Run the case on two new hosts; return its rows.

    Raises:
        RuntimeError: a host failed; the message holds its output.
    """
    with two_hosts(case.rate) as hosts, tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        # Where neighbouring ranks are on different hosts, torchrun is told of as many nodes as there are ranks.
        nodes = [hosts[rank % 2] for rank in range(case.world_size)] if case.in_turn else list(hosts)
        logs = [out / f"node{index}.log" for index in range(len(nodes))]
        started = [start(host, index, len(nodes), case, out, logs[index]) for index, host in enumerate(nodes)]
        for process, log in zip(started, logs, strict=True):
            if process.wait(LAUNCH_LIMIT):
                raise RuntimeError(f"{case}: exit status {process.returncode}\n{log.read_text()[-4000:]}")
        return list(json.loads((out / "rows.json").read_text()))


def start(host: Host, index: int, nodes: int, case: Case, out: Path, log: Path) -> "subprocess.Popen[Any]":
    """Start torchrun for one node on one of the hosts; all nodes meet on the first one."""
    shape = [f"--nnodes={nodes}", f"--node-rank={index}", f"--nproc-per-node={case.world_size // nodes}"]
    meet = ["--master-addr=node1", f"--master-port={PORT}"]
    script = [__file__, "--out", str(out), "--rank-of", json.dumps(vars(case))]
    command = [sys.executable, "-m", "torch.distributed.run", *shape, *meet, *script]
    return host.start(*command, stdout=log.open("w"), stderr=subprocess.STDOUT)


def be_a_rank(case: Case, out: Path) -> None:
    """Train every candidate on every stage of the case; rank 0 writes the rows."""
    deepspeed.init_distributed("gloo")
    deepspeed.utils.logger.setLevel("WARNING")
    rows = [row for stage in case.stages for row in measure(stage, case)]
    if comm.get_rank() == 0:
        (out / "rows.json").write_text(json.dumps(rows))
    comm.destroy_process_group()  # a rank that leaves it open sometimes aborts at its end


def sections(case: Case) -> dict[str, Section]:
    """The optimizer sections to compare by their bytes, or by their time on a slow link."""
    found = {ADAMW: adamw(), INCUMBENT: built_in("standard")}
    if case.rate:
        return found | sharded()
    return found | {GATHER: muon(), NORMUON: muon(name="normuon"), SHARD_LOCAL: muon({"mode": "shard_local"})}


def measure(stage: int, case: Case) -> list[dict[str, Any]]:
    """Train all candidates in turns on one stage; return a row for each."""
    corpus = load_corpus(str(Path(__file__)))
    candidates = [
        Candidate(name, engine_of(network(case.width, case.layers), stage, section)) for name, section in sections(case).items()
    ]
    warm_up = 2  # the first steps allocate, plan, and trace ZeRO-3's order of parameters
    for step in range(warm_up + case.steps):
        for candidate in candidates:
            train_step(candidate, *batch(corpus, step), counted=step >= warm_up)
    adamw_bytes = min(candidates[0].bytes)
    rows = []
    for candidate in candidates:
        row = {
            "ranks": case.world_size,
            "placed": "in turn" if case.in_turn else "in blocks",
            "link": LINKS[case.rate] if case.rate else None,
            "stage": stage,
            "optimizer": candidate.name,
            "megabytes": (min(candidate.bytes) - adamw_bytes) / 1e6,
            "milliseconds": 1e3 * mean(candidate.seconds),
        }
        rows.append(row | expected(candidate.name, stage, case))
        candidate.engine.destroy()
    return rows


def train_step(candidate: Candidate, tokens: torch.Tensor, targets: torch.Tensor, counted: bool) -> None:
    """Train one step on all ranks together. Its last barrier is in every candidate's bytes, also in AdamW's."""
    engine = candidate.engine
    comm.barrier()
    sleep(QUIET)
    before, start = traffic(), perf_counter()
    engine.backward(engine(tokens, targets))
    engine.step()
    comm.barrier()
    seconds = perf_counter() - start
    sleep(QUIET)
    passed = traffic() - before
    if counted:
        candidate.bytes.append(passed.received + passed.sent)
        candidate.seconds.append(seconds)


def expected(name: str, stage: int, case: Case) -> dict[str, float]:
    """Megabytes in and out of the first host by plan, and the floor; empty for candidates without a plan."""
    if name not in (GATHER, NORMUON):
        return {}
    here = case.first_host
    there = [rank for rank in range(case.world_size) if rank not in here]
    plan = plan_of(network(case.width, case.layers), stage, case.world_size)
    found = {}
    statistics = Kept(("row",), 2) if name == NORMUON else NO_STATISTICS
    for key, kept in (("plan_megabytes", statistics), ("floor_megabytes", NO_STATISTICS)):
        buckets = [bucket for rank in here for bucket in exchange_buckets(plan, rank, kept)]
        # Fragments go out and updates come back, and the other way round for the matrices that this rank owns.
        elements = sum(bucket.sends[rank] + bucket.receives[rank] for bucket in buckets for rank in there)
        found[key] = 2 * 2 * elements / 1e6
    if stage == 3:
        found["floor_megabytes"] = 2 * sum(matrix.numel for matrix in plan.layout.matrices) / 1e6
    return found


def report(rows: list[dict[str, Any]], out: Path) -> None:
    """Add the ratios, print the tables, write the numbers and the picture."""
    for row in rows:
        of_case = {other["optimizer"]: other for other in rows if _case(other) == _case(row)}
        incumbent, baseline = of_case[INCUMBENT], of_case[ADAMW]
        if floor := row.get("floor_megabytes"):
            row["over_floor"] = row["megabytes"] / floor
            if row["stage"] == 3:  # on the others the built-in Muon sends nothing more than AdamW
                row["less_than_incumbent"] = incumbent["megabytes"] / row["megabytes"]
        row["overhead_ms"] = row["milliseconds"] - baseline["milliseconds"]
        if row["optimizer"] != ADAMW:
            row["over_incumbent"] = row["overhead_ms"] / (incumbent["milliseconds"] - baseline["milliseconds"])
    free = [row for row in rows if row["link"] is None]
    capped = [row for row in rows if row["link"]]
    if free:
        show("Bytes of a step between two hosts, over AdamW's", BYTES_COLUMNS, free)
    show("Milliseconds of a step on a capped link", TIME_COLUMNS, capped)
    write("wire", "Two hosts: bytes and milliseconds of a step", rows, out)
    draw(free, capped, out)


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["ranks"], row["placed"], row["link"], row["stage"]


def draw(free: list[dict[str, Any]], capped: list[dict[str, Any]], out: Path) -> None:
    """Draw bytes on ZeRO-3 on the left, and milliseconds of a step on the right, one panel per link."""
    links = list(dict.fromkeys(row["link"] for row in capped))
    fig, axes = figure(5.5 * (len(links) + bool(free)), 5)
    axes.remove()
    panels: Iterator[Any] = iter(fig.subplots(1, len(links) + bool(free), squeeze=False)[0])
    if free:
        rows = [row for row in free if row["stage"] == 3 and row["optimizer"] != ADAMW]
        notes = [_bytes_note(row) for row in rows]
        names = [f"{row['optimizer']}\n{row['ranks']} ranks {row['placed'] * (row['ranks'] > 2)}" for row in rows]
        _bars(next(panels), names, [max(row["megabytes"], 0) for row in rows], notes, "MB a step over AdamW's, ZeRO-3")
    for link, panel in zip(links, panels, strict=True):
        rows = [row for row in capped if row["link"] == link]
        notes = [f"{row['milliseconds']:.0f} ({row['overhead_ms']:+.0f})" for row in rows]
        label = f"ms a step, {link}, 2 ranks (over AdamW)"
        _bars(panel, [row["optimizer"] for row in rows], [row["milliseconds"] for row in rows], notes, label)
    save("wire", fig, out)


def _bytes_note(row: dict[str, Any]) -> str:
    found = f"{max(row['megabytes'], 0):.1f}"
    if "over_floor" not in row:
        return found
    return f"{found}: {row['over_floor']:.2f} of floor, {row['less_than_incumbent']:.1f}x less"


def _bars(axes: Any, names: list[str], values: list[float], notes: list[str], label: str) -> None:
    bars = axes.barh(range(len(values)), values)
    axes.bar_label(bars, notes, padding=3, fontsize=8)
    axes.set_yticks(range(len(values)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.4 * max(values))
    axes.set_xlabel(label)


if __name__ == "__main__":
    main()
