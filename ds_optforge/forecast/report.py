"""The output of ``ds-optforge plan``: figures per rank, the sharding modes, and changes that would make a step shorter."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean

from rich.console import Console
from rich.table import Table

from ds_optforge.config.sections import THIN_ROWS, ShardingSettings
from ds_optforge.forecast.forecast import (
    AFFORDABLE,
    Forecast,
    Hardware,
    RankFigures,
    best_mode,
    better_bucket,
    forecast_routes,
    modes,
    zero_seconds,
)
from ds_optforge.routing.roles import Route

_ALL_RANKS = 16  # more are summed up
_BUSIEST = 5
_ONE_SUB_GROUP = 10**15
_COLUMNS = ("matrices", "GFLOP", "sent a step, MB", "state, MB", "workspace, MB")


def report(
    title: str, routes: Sequence[Route], sharding: ShardingSettings, predicted: Forecast, hardware: Hardware, width: int = 110
) -> str:
    """Format one forecast.

    Args:
        title: name of the model.
        routes, sharding: the routed parameters and the "sharding" section that the forecast was made from.
        predicted, hardware: the forecast, and the speeds that turn it into seconds.
        width: columns of the text.
    """
    console = Console(width=width)
    with console.capture() as capture:
        ranks = predicted.topology.world_size
        console.print(f"{title}, ZeRO-{predicted.topology.stage} on {ranks} rank(s): {_sizes(routes, predicted)}")
        if predicted.matrices:
            console.print(_rank_table(predicted))
            console.print(
                f"FLOPs max/mean {predicted.balance:.3f}; critical path over ideal {predicted.path_over_ideal:.3f} "
                f"({predicted.exchanges} exchange(s), bucket_numel {sharding.bucket_numel})"
            )
            console.print(_mode_table(predicted, hardware))
            for line in [_shards(predicted.shard_rows), *_advice(routes, sharding, predicted, hardware)]:
                console.print(line)
    return capture.get()


def _sizes(routes: Sequence[Route], predicted: Forecast) -> str:
    numel = sum(route.numel for route in routes)
    if not predicted.matrices:
        return f"{numel:,} parameters, none of them a matrix for a matrix rule: every rank updates its own slice"
    in_matrices = sum(route.numel for route in routes if route.matrices)
    return f"{predicted.matrices:,} matrices with {in_matrices:,} of {numel:,} parameters"


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


def _mode_table(predicted: Forecast, hardware: Hardware) -> Table:
    table = Table(
        "sharding mode",
        "orthogonalization, ms",
        "traffic, ms",
        "longer of both, ms",
        "",
        caption=f"slowest rank, mean over steps, {hardware.tflops:g} TFLOP/s, {hardware.link_gbps:g} Gbit/s. Best: the most "
        f"exact that takes at most {AFFORDABLE:.0%} of the {1e3 * zero_seconds(predicted, hardware):,.1f} ms of ZeRO's traffic",
    )
    best = best_mode(predicted, hardware)
    for mode in modes(predicted, hardware):
        numbers = (mode.orthogonalization, mode.traffic, mode.seconds)
        table.add_row(mode.name, *(f"{1e3 * number:,.2f}" for number in numbers), "best" if mode == best else "")
    return table


def _shards(rows: Counter[int]) -> str:
    if not rows:
        return "no matrix is cut: every mode does the same"
    total = rows.total()
    few = sum(count for number, count in rows.items() if number < THIN_ROWS)
    middle = sorted(rows.elements())[total // 2]
    return (
        f"rows per shard (shard_local): {min(rows)} to {max(rows)}, median {middle}; {few / total:.0%} of {total:,} "
        f"shards have fewer than {THIN_ROWS}" + (", where shard_local is row normalisation rather than Muon" if few else "")
    )


def _advice(routes: Sequence[Route], sharding: ShardingSettings, now: Forecast, hardware: Hardware) -> Iterator[str]:
    """Yield recommended changes, each with its predicted gain."""
    chosen = best_mode(now, hardware)
    rate = hardware.tflops * 1e9  # FLOPs in a millisecond
    ranks = len(now.ranks)
    if now.matrices < ranks:
        yield (
            f"{ranks} ranks, {now.matrices} matrices: at least {ranks - now.matrices} ranks orthogonalize nothing. "
            f"The largest matrix alone takes {now.largest / rate:,.2f} ms, an even share of all {now.mean_flops / rate:,.2f} "
            f"ms: no choice of owners makes gather faster. Recommended: {chosen.name} ({1e3 * chosen.seconds:,.2f} ms); and "
            "overrides with split or heads where a large matrix is really several."
        )
    elif chosen.name != "gather":
        yield f"Recommended: {chosen.name}, {1e3 * chosen.seconds:,.2f} ms a step."
    bucket = better_bucket(routes, sharding, now.topology, now)
    if bucket:
        numel, then = bucket
        yield (
            f"sharding.bucket_numel {numel}: critical path over ideal {now.path_over_ideal:.3f} -> {then.path_over_ideal:.3f}, "
            f"workspace {_workspace(now)} -> {_workspace(then)} MB"
        )
    if now.topology.stage == 3 and now.sub_groups > now.groups:
        then = forecast_routes(routes, sharding, replace(now.topology, sub_group_size=_ONE_SUB_GROUP))
        yield (
            f"zero_optimization.sub_group_size {now.topology.sub_group_size} makes {now.sub_groups} sub-groups, and ranks "
            f"wait for each other after each; in one: critical path over ideal {then.path_over_ideal:.3f}"
        )


def _workspace(predicted: Forecast) -> str:
    return f"{max(rank.workspace_bytes for rank in predicted.ranks) / 1e6:,.0f}"
