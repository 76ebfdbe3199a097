"""The bytes that a run sends for its optimizer, by its plan."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from ds_optforge.config.deepspeed import optimizer_section
from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.forecast.forecast import forecast_routes
from ds_optforge.forecast.topology import SUB_GROUP_SIZE, Topology
from ds_optforge.optimizer import OptForge, groups_of


def planned_bytes(optimizer: OptForge, config: Mapping[str, Any], world_size: int, device: str) -> float:
    """Return the bytes that the rank which sends most sends to others for the optimizer in a step.

    What ZeRO itself sends, gradients and weights, is the same for every optimizer and not counted. Where matrices are gathered
    every few steps it is the mean over these.

    Args:
        optimizer: of a run whose ranks are data-parallel alone.
        config: the run's DeepSpeed configuration.
        world_size: number of ranks.
        device: type of the ranks' devices.
    """
    zero, wanted = config.get("zero_optimization", {}), OptimizerConfig(optimizer_section(config))
    sharding = wanted.common.sharding
    if not zero.get("stage") or not sharding.travels:
        return 0.0  # every rank has whole matrices, or steps its own fragments of them
    routes = list(chain.from_iterable(members.routes for members in groups_of(optimizer).members.values()))
    sub_group_size = int(zero.get("sub_group_size", SUB_GROUP_SIZE))
    topology = Topology(world_size, zero["stage"], sub_group_size=sub_group_size, device=device)
    predicted = forecast_routes(routes, sharding, topology, wanted.around)
    return max(rank.sent_bytes for rank in predicted.ranks) / (sharding.gather_every or 1)
