"""Changes of a configuration that would make a planned step shorter, each with its predicted gain."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ds_optforge.config.sections import ShardingSettings
from ds_optforge.forecast.forecast import Forecast, forecast_routes
from ds_optforge.forecast.topology import Topology
from ds_optforge.routing.roles import Route

_ONE_SUB_GROUP = 10**15


def better_bucket(
    routes: Sequence[Route], sharding: ShardingSettings, topology: Topology, now: Forecast, largest: int = 2**31
) -> tuple[int, Forecast] | None:
    """Find a larger bucket_numel: the smallest power of two whose critical path is within 5% of the best that buckets reach.

    Returns:
        (bucket_numel, its forecast), or None where that would gain less than 5%.
    """
    numel = 1 << sharding.bucket_numel.bit_length()
    tried: list[tuple[int, Forecast]] = []
    while now.exchanges > 1 and numel <= largest and (not tried or tried[-1][1].exchanges > 1):
        tried.append((numel, forecast_routes(routes, sharding.model_copy(update={"bucket_numel": numel}), topology)))
        numel *= 2
    if not tried:
        return None
    reachable = min(found.critical_path for _, found in tried)
    if 20 * now.critical_path <= 21 * reachable:
        return None
    return next((numel, found) for numel, found in tried if 20 * found.critical_path <= 21 * reachable)


def advice(routes: Sequence[Route], sharding: ShardingSettings, now: Forecast, tflops: float) -> Iterator[str]:
    """Yield recommended changes.

    Args:
        routes, sharding: the routed parameters and the "sharding" section that were planned.
        now: their plan.
        tflops: TFLOP/s of the products.
    """
    rate = tflops * 1e9  # FLOPs in a millisecond
    ranks = len(now.ranks)
    if now.matrices < ranks and not now.teams:
        yield (
            f"{ranks} ranks, {now.matrices} matrices: at least {ranks - now.matrices} ranks orthogonalize nothing. "
            f"The largest matrix alone takes {now.largest / rate:,.2f} ms, an even share of all {now.mean_flops / rate:,.2f} "
            "ms: no choice of owners makes gather faster, but overrides with split or heads do where a large matrix is "
            "really several."
        )
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
