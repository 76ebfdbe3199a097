"""What a step costs with DeepSpeed's own Muon, as its source does it (0.19.8, runtime/zero/).

- ZeRO-1 and 2 (stage_1_and_2.py, get_flat_partition): each rank orthogonalizes every parameter of which it holds an element,
  whole, and keeps two momentum buffers for them in the gradients' dtype (one is a copy that a discarded step leaves alone).
- ZeRO-3 (stage3.py, _muon_update_sub_group): reduce_scatter has to be off, so gradients are all-reduced; then gradients and
  momenta are all-gathered by chunks of reduce_bucket_size, one parameter a rank is orthogonalized in rounds, and updates and
  momenta are all-gathered again: four times all matrices. In a round of unequal shapes, or of fewer parameters than ranks,
  every rank sends and receives as much as if all had the largest. Nothing of it overlaps.

Its parameters are in the order of their shapes, the largest first: of a model that was not made under zero.Init, where shapes
are not to be seen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ds_optforge.forecast.topology import Topology, stepped_together
from ds_optforge.orthogonalize import flops
from ds_optforge.routing.roles import Route
from ds_optforge.zero.partition import cuts_of_group

REDUCE_BUCKET_SIZE = 500_000_000  # DeepSpeed's default of zero_optimization.reduce_bucket_size
_STEPS = 5
_MOMENTUM = 4  # bytes: float32


@dataclass(slots=True)
class Incumbent:
    """The cost of a step on the slowest rank.

    Attributes:
        flops: of the orthogonalizations that it waits for, its own or others'.
        sent_bytes: beyond what AdamW sends.
        state_bytes: momenta, and both moments of the parameters that Adam steps.
        workspace_bytes: of the gathered gradients and momenta.
    """

    flops: int = 0
    sent_bytes: int = 0
    state_bytes: int = 0
    workspace_bytes: int = 0


def incumbent(
    routes: Sequence[Route], topology: Topology, model_bytes: int, reduce_bucket_size: int = REDUCE_BUCKET_SIZE
) -> Incumbent:
    """Predict a step with the default ``ns_method``, gram, for the parameters that have matrices in ``routes``.

    Args:
        routes: of all parameters, in order.
        topology: experts are taken to lie as everything else.
        model_bytes: of an element of gradients, and of what travels: 2 in bfloat16.
        reduce_bucket_size: of zero_optimization.
    """
    muon = sorted((route for route in routes if route.matrices), key=lambda route: route.shape, reverse=True)
    others = sum(route.numel for route in routes if not route.matrices)
    whole = Topology(topology.world_size, topology.stage, 1, topology.sub_group_size)
    if topology.stage == 3:
        found = _in_rounds(muon, whole, model_bytes, reduce_bucket_size)
    else:
        found = _in_slices(muon, whole, model_bytes)
    found.state_bytes += 8 * others // topology.world_size
    if topology.stage == 3:  # an all-reduce sends twice what a scatter sends
        found.sent_bytes += model_bytes * _beyond_own(sum(route.numel for route in routes), topology.world_size)
    return found


def _cost(route: Route) -> int:
    """Of a square matrix, the standard form; of any other the Gram form, with as many products as our own."""
    return sum(flops(rows, cols, _STEPS, "standard" if rows == cols else "gram") for _, rows, cols in route.matrices)


def _beyond_own(numel: int, world_size: int) -> int:
    return numel * (world_size - 1) // world_size


def _in_slices(muon: Sequence[Route], topology: Topology, model_bytes: int) -> Incumbent:
    world = topology.world_size
    loads, held = [0] * world, [0] * world
    for group, _ in stepped_together(muon, topology):
        cuts, _ = cuts_of_group([route.numel for route in group], world)
        for route, cut in zip(group, cuts, strict=True):
            for rank in range(cut.base // cut.size, (cut.base + route.numel - 1) // cut.size + 1):
                loads[rank] += _cost(route)
                held[rank] += route.numel
    return Incumbent(max(loads), 0, 2 * model_bytes * max(held), 0)


def _in_rounds(muon: Sequence[Route], topology: Topology, model_bytes: int, reduce_bucket_size: int) -> Incumbent:
    world, found = topology.world_size, Incumbent()
    for sub_group, _ in stepped_together(muon, topology):
        for chunk in _chunks(sub_group, reduce_bucket_size):
            parts = sum(-(-route.numel // world) for route in chunk)  # what a rank holds of it
            sent, padded = 2 * (world - 1) * parts, 0
            for first in range(0, len(chunk), world):
                parameters = chunk[first : first + world]
                largest = max(route.numel for route in parameters)
                found.flops += max(map(_cost, parameters))
                sent += 2 * (world - 1) * largest  # also by ranks that have none
                if len(parameters) < world or len({route.shape for route in parameters}) > 1:
                    padded = max(padded, largest)
            # Whole gradients and momenta, and either what is being gathered or the padded updates and momenta of a round.
            whole = world * parts
            held = 2 * whole + max(whole + parts, 2 * (world + 1) * padded)
            found.workspace_bytes = max(found.workspace_bytes, model_bytes * held)
            found.sent_bytes += model_bytes * sent
            found.state_bytes += _MOMENTUM * parts
    return found


def _chunks(group: Sequence[Route], most: int) -> Iterator[list[Route]]:
    """Cut a sub-group as stage3.py does: a larger parameter is a chunk of its own."""
    chunk: list[Route] = []
    for route in group:
        if chunk and sum(each.numel for each in chunk) + route.numel > most:
            yield chunk
            chunk = []
        chunk.append(route)
    if chunk:
        yield chunk
