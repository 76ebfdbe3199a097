"""The output of ``ds-optforge plan`` as text."""

import json
from collections import Counter
from collections.abc import Iterator
from statistics import fmean

from rich.console import Console
from rich.table import Column, Table

from ds_optforge.config.sections import THIN_ROWS
from ds_optforge.forecast.advice import advice
from ds_optforge.forecast.forecast import Forecast, RankFigures
from ds_optforge.forecast.hardware import LAUNCH_SECONDS
from ds_optforge.forecast.plan import ADAMW, INCUMBENT, Candidate, Plan, StagePlan
from ds_optforge.forecast.published import PUBLISHED

_ALL_RANKS = 16  # more are summed up
_BUSIEST = 5
_COLUMNS = ("matrices", "GFLOP", "sent a step, MB", "state, MB", "workspace, MB")


def report(plan: Plan, width: int = 110) -> str:
    """Format a plan: what it costs over AdamW, the recommendation, memory by kind, figures per rank, what was assumed.

    Args:
        plan: for one stage or several; figures per rank are those of the only stage.
        width: columns of the text.
    """
    console = Console(width=width, soft_wrap=False)
    with console.capture() as capture:
        for line in _lines(plan):
            console.print(line, highlight=False)
    text = capture.get()
    if plan.stages[0].predicted.matrices:
        text += f"\nTo paste:\n\n{json.dumps(plan.configuration(), indent=2)}\n"  # not wrapped
    return text


def _lines(plan: Plan) -> Iterator[str | Table]:
    first = plan.stages[0].predicted
    stages = ", ".join(f"ZeRO-{found.stage}" for found in plan.stages)
    yield f"{plan.title}, {stages} on {first.topology.world_size} rank(s): {_sizes(plan, first)}"
    yield _assumed(plan)
    if not first.matrices:
        return
    yield _overview(plan)
    for found in plan.stages:
        yield _recommendation(plan, found)
        if found.predicted.teams:
            yield _teams(found.predicted)
        yield _host(found)
    yield from _fit(plan)
    for found in plan.stages:
        yield _memory_table(found, several=len(plan.stages) > 1)
    if len(plan.stages) == 1:
        yield from _details(plan, plan.stages[0])
    yield "Published, to compare with:"
    for published in PUBLISHED:
        yield f"- {published.figure} ({published.source})"


def _sizes(plan: Plan, predicted: Forecast) -> str:
    numel = sum(route.numel for route in plan.routes)
    if not predicted.matrices:
        return f"{numel:,} parameters, none of them a matrix for a matrix rule: every rank updates its own slice"
    in_matrices = sum(route.numel for route in plan.routes if route.matrices)
    return f"{predicted.matrices:,} matrices with {in_matrices:,} of {numel:,} parameters"


def _assumed(plan: Plan) -> str:
    speeds, work = plan.hardware, plan.workload
    return (
        f"Assumed: {speeds.title}; {work.tokens:,} tokens a step in sequences of {plan.sequence_length:,}, "
        f"{work.flops_per_token / 1e9:,.1f} GFLOP each forward and backward at {speeds.model_tflops:,.0f} TFLOP/s; products of "
        f"the orthogonalization (NS) at {speeds.tflops:,.0f} TFLOP/s, {speeds.link_gbps:,.0f} Gbit/s a rank, memory at "
        f"{speeds.memory_tbps:.2f} TB/s. Not counted: activations, ZeRO's and NCCL's own buffers."
    )


def _overview(plan: Plan) -> Table:
    several = len(plan.stages) > 1
    table = Table(
        Column("optimizer", no_wrap=True),
        *("over AdamW", "step, ms", "NS, ms", "traffic, ms", "elementwise, ms", "GB", ""),
        caption="slowest rank, mean over steps; GB a rank over AdamW; NS and traffic of the sharding modes overlap",
    )
    for found in plan.stages:
        for each in found.candidates:
            seconds = each.seconds
            times = (seconds.iteration, seconds.orthogonalization, seconds.traffic, seconds.elementwise)
            table.add_row(
                f"ZeRO-{found.stage}, {each.name}" if several else each.name,
                *([""] if each.name == ADAMW else [f"{100 * found.over_adamw(each):+.1f}%"]),
                *(f"{1e3 * time:,.1f}" for time in times),
                *([""] if each.name == ADAMW else [f"{found.bytes_over_adamw(each) / 1e9:+.1f}"]),
                "best" if each is found.chosen else "",
            )
    return table


def _recommendation(plan: Plan, found: StagePlan) -> str:
    chosen = found.chosen
    costs = f"{100 * found.over_adamw(chosen):+.1f}% of your step over AdamW, {found.bytes_over_adamw(chosen) / 1e9:+.1f} GB"
    others = [each for each in found.candidates if each.settings is not None]
    if len(others) == 1:
        why = "no matrix is cut: every mode does the same" if not found.predicted.shard_rows else "the rule allows no other"
    elif chosen is others[0]:
        saved = 1 - min(each.seconds.iteration for each in others) / chosen.seconds.iteration
        why = f"exact, and no other mode saves {plan.saving:.0%} of the step (the fastest saves {max(saved, 0):.1%})"
    else:
        saved = 1 - chosen.seconds.iteration / others[0].seconds.iteration
        why = f"saves {saved:.1%} of gather's step, and no less exact mode another {plan.saving:.0%}"
    tokens = found.tokens_at(plan.saving, plan.workload)
    beyond = f" Below {tokens:,} tokens a step it costs more than {plan.saving:.0%}." if tokens else ""
    return f"Recommended on ZeRO-{found.stage}: {chosen.name}, {costs}; {why}.{beyond}"


def _host(found: StagePlan) -> str:
    """Say what the host does in a step, and whether that takes longer than what it hides behind."""
    kernels, milliseconds = found.launches.kernels, 1e3 * found.host_seconds
    gather = next(each.seconds.optimizer for each in found.candidates if each.settings is not None)
    text = (
        f"gather on ZeRO-{found.stage} launches {kernels:,} kernels a step (rank {found.launches.rank}, which orthogonalizes "
        f"most): {milliseconds:,.1f} ms of the host at {1e6 * LAUNCH_SECONDS:g} us each, beside {1e3 * gather:,.1f} ms of the "
        "device"
    )
    if found.launches.uncounted:
        text += f"; without {', '.join(found.launches.uncounted)}, of which no count is known"
    if found.host_seconds > gather:
        text += ". The host bounds the step: a larger sharding.bucket_numel, or CUDA 13, makes it launch fewer"
    return text + "."


def _teams(predicted: Forecast) -> str:
    sizes = sorted(predicted.teams)
    each = f"{sizes[0]} ranks" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} ranks"
    sent = max(rank.gathered_bytes for rank in predicted.ranks) / 1e6
    return (
        f"Teams on ZeRO-{predicted.topology.stage}: with gather, {each} each orthogonalize {predicted.teams.total():,} of the "
        f"{predicted.matrices:,} matrices together; for that a rank sends up to {sent:,.1f} MB."
    )


def _fit(plan: Plan) -> Iterator[str]:
    """Say which stage the configuration is for, where that is a question."""
    limit = f"{plan.hardware.memory_gb:g} GB"
    if plan.fitting is None:
        least = min(found.chosen.memory.total for found in plan.stages) / 1e9
        stage = plan.stages[-1].stage
        none = "No stage fits" if len(plan.stages) > 1 else f"ZeRO-{stage} does not fit"
        helps = "a higher stage, more ranks or offload" if stage < 3 else "more ranks or offload"
        yield f"{none} the device: {least:,.1f} GB a rank without activations; it has {limit}. Needed: {helps}."
    elif len(plan.stages) > 1:
        yield f"The lowest stage that fits {limit} without activations: ZeRO-{plan.fitting.stage}."


def _memory_table(found: StagePlan, several: bool) -> Table:
    by_name = {each.name: each for each in found.candidates}
    shown: list[Candidate] = [by_name[ADAMW], by_name[INCUMBENT], found.chosen]
    table = Table("GB a rank" + (f", ZeRO-{found.stage}" if several else ""), *(each.name for each in shown))
    for kind in shown[0].memory.gigabytes:
        table.add_row(kind, *(f"{each.memory.gigabytes[kind]:,.2f}" for each in shown))
    return table


def _details(plan: Plan, found: StagePlan) -> Iterator[str | Table]:
    predicted = found.predicted
    yield _rank_table(predicted)
    yield (
        f"FLOPs max/mean {predicted.balance:.3f}; critical path over ideal {predicted.path_over_ideal:.3f} "
        f"({predicted.exchanges} exchange(s), bucket_numel {plan.sharding.bucket_numel})"
    )
    if predicted.shard_rows:
        yield _shards(predicted.shard_rows)
    yield from advice(plan.routes, plan.sharding, predicted, plan.hardware.tflops)


def _rank_table(predicted: Forecast) -> Table:
    table = Table("rank", *_COLUMNS)
    rows = [_row(rank) for rank in predicted.ranks]
    if len(rows) <= _ALL_RANKS:
        named = [(str(rank), row) for rank, row in enumerate(rows)]
    else:
        summaries = (("min", min), ("mean", fmean), ("max", max))
        named = [(name, [float(of(values)) for values in zip(*rows, strict=True)]) for name, of in summaries]
        busiest = sorted(range(len(rows)), key=lambda rank: (-predicted.ranks[rank].flops, -predicted.ranks[rank].sent_bytes))
        named += [(f"{rank} (busiest)", rows[rank]) for rank in busiest[:_BUSIEST]]
    for name, (matrices, *numbers) in named:
        table.add_row(name, f"{matrices:.4g}", *(f"{number:,.1f}" for number in numbers))
    return table


def _row(rank: RankFigures) -> list[float]:
    return [rank.matrices, rank.flops / 1e9, rank.sent_bytes / 1e6, rank.state_bytes / 1e6, rank.workspace_bytes / 1e6]


def _shards(rows: Counter[int]) -> str:
    total = rows.total()
    few = sum(count for number, count in rows.items() if number < THIN_ROWS)
    middle = sorted(rows.elements())[total // 2]
    return (
        f"rows per shard (shard_local): {min(rows)} to {max(rows)}, median {middle}; {few / total:.0%} of {total:,} "
        f"shards have fewer than {THIN_ROWS}" + (", where shard_local is row normalisation rather than Muon" if few else "")
    )
