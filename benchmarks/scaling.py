"""Predict balance and traffic of a step on 8 to 4,096 ranks, planned from shapes alone.

    python benchmarks/scaling.py [--models llama3-8b ...] [--ranks 8 32 ...] [--out DIR]

It plans Muon with its default configuration for every model of the catalog on ZeRO-2 and ZeRO-3; ZeRO-3 with one sub-group
(zero_optimization.sub_group_size beyond a rank's slice) and, where that makes several, with DeepSpeed's default of 1e9.
Prints a table; writes scaling.json and scaling.png.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report
from tqdm import tqdm

from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.forecast.catalog import MODEL_SHAPES
from ds_optforge.forecast.forecast import forecast_routes
from ds_optforge.forecast.skeletons import load
from ds_optforge.forecast.topology import SUB_GROUP_SIZE, Topology
from ds_optforge.routing.roles import routes_of

RANKS = (8, 32, 64, 256, 1024, 4096)
ONE_SUB_GROUP = 10**15
COLUMNS = (
    report.Column("model", "model"),
    report.Column("ranks", "ranks"),
    report.Column("stage", "stage"),
    report.Column("sub_groups", "sub-groups"),
    report.Column("matrices_per_rank", "matrices a rank", ".1f"),
    report.Column("flops_max_over_mean", "FLOPs max/mean", ".3f"),
    report.Column("path_over_ideal", "critical path / ideal", ".3f"),
    report.Column("largest_over_mean", "largest matrix / mean", ".3f"),
    report.Column("sent_mb", "sent a step, MB a rank", ",.1f"),
    report.Column("workspace_mb", "workspace, MB a rank", ",.0f"),
    report.Column("planning_seconds", "planning, s", ".2f"),
)


def main() -> None:
    """Plan every model on every number of ranks, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODEL_SHAPES, default=list(MODEL_SHAPES))
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--out", type=Path, default=report.DEFAULT_OUT)
    args = parser.parse_args()
    title = "Balance and traffic of planned steps (Muon, default configuration)"
    rows = [row for model in tqdm(args.models) for row in measure(model, args.ranks)]
    report.show(title, COLUMNS, rows)
    print(report.write("scaling", title, rows, args.out))
    print(draw(rows, args.out))


def measure(model: str, ranks: list[int]) -> Iterator[dict[str, Any]]:
    """Plan one model; yield a row per number of ranks, stage and size of sub-groups."""
    config = OptimizerConfig({"name": "muon"})
    routes = routes_of(load(model), config)
    for world_size in ranks:
        for stage, sub_group_size in ((2, ONE_SUB_GROUP), (3, ONE_SUB_GROUP), (3, SUB_GROUP_SIZE)):
            start = time.perf_counter()
            found = forecast_routes(routes, config.common.sharding, Topology(world_size, stage, 1, sub_group_size))
            seconds = time.perf_counter() - start
            if sub_group_size == SUB_GROUP_SIZE and found.sub_groups == found.groups:
                continue
            yield {
                "model": model,
                "ranks": world_size,
                "stage": stage,
                "sub_groups": found.sub_groups,
                "matrices_per_rank": found.matrices / world_size,
                "flops_max_over_mean": found.balance,
                "path_over_ideal": found.path_over_ideal,
                "largest_over_mean": found.largest / found.mean_flops,
                "exchanges": found.exchanges,
                "sent_mb": max(rank.sent_bytes for rank in found.ranks) / 1e6,
                "workspace_mb": max(rank.workspace_bytes for rank in found.ranks) / 1e6,
                "planning_seconds": seconds,
            }


def draw(rows: list[dict[str, Any]], out: Path) -> Path:
    """Draw critical path over ideal against matrices a rank, a line per model, ZeRO-3 in one sub-group. Return the path."""
    fig, axes = report.figure()
    for model in dict.fromkeys(row["model"] for row in rows):
        points = [row for row in rows if (row["model"], row["stage"], row["sub_groups"]) == (model, 3, 1)]
        axes.plot(*zip(*((p["matrices_per_rank"], p["path_over_ideal"]) for p in points), strict=True), marker="o", label=model)
    axes.set(
        xscale="log", yscale="log", xlabel="matrices a rank", ylabel="critical path / ideal", title="ZeRO-3, one sub-group"
    )
    axes.axhline(1.15, color="grey", linestyle=":")
    axes.legend(fontsize="small")
    return report.save("scaling", fig, out)


if __name__ == "__main__":
    main()
