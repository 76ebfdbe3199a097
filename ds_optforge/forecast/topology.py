"""The ranks of a run, and which parameters each call of ``step()`` updates on them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from ds_optforge.errors import ConfigError
from ds_optforge.routing.roles import Route

SUB_GROUP_SIZE = 1_000_000_000  # DeepSpeed's default of zero_optimization.sub_group_size


@dataclass(frozen=True, slots=True)
class Topology:
    """The ranks of a run, and how ZeRO uses them.

    Attributes:
        world_size: number of ranks that ZeRO cuts the parameters over.
        stage: ZeRO stage: 1, 2 or 3.
        expert_parallel: number of ranks that each bank of experts is split over, before ZeRO cuts the shares over the others.
        sub_group_size: elements per rank that ZeRO-3 steps at a time.
        device: type of the ranks' devices, on which the sizes of buckets and batches depend.

    Raises:
        ConfigError: no run can have these numbers.
    """

    world_size: int
    stage: int
    expert_parallel: int = 1
    sub_group_size: int = SUB_GROUP_SIZE
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.world_size < 1:
            raise ConfigError(f"world size: got {self.world_size}; allowed: at least 1")
        if self.stage not in (1, 2, 3):
            raise ConfigError(f"stage: got {self.stage}; allowed: 1, 2, 3 (on stage 0 every rank computes every matrix)")
        if self.expert_parallel < 1 or self.world_size % self.expert_parallel:
            raise ConfigError(f"expert parallel: got {self.expert_parallel}; allowed: a divisor of {self.world_size} ranks")
        if self.expert_parallel > 1 and self.stage == 3:
            raise ConfigError(f"expert parallel: got {self.expert_parallel} on stage 3; allowed: 1 (DeepSpeed has no more)")


def stepped_together(routes: Sequence[Route], topology: Topology) -> Iterator[tuple[list[Route], bool]]:
    """Yield what each call of ``step()`` updates: (parameters of a group, or of a sub-group on ZeRO-3; True for experts)."""
    members: dict[tuple[str, bool], list[Route]] = {}
    for route in routes:
        experts = topology.expert_parallel > 1 and _is_bank(route)
        members.setdefault((route.group, experts), []).append(_share(route, topology.expert_parallel) if experts else route)
    for (_, experts), group in members.items():
        if topology.stage < 3:
            yield group, experts
            continue
        ends = accumulate(-(-route.numel // topology.world_size) for route in group)
        sub_group: list[Route] = []
        done = 0
        for route, end in zip(group, ends, strict=True):
            sub_group.append(route)
            if end - done >= topology.sub_group_size:
                yield sub_group, experts
                sub_group, done = [], end
        if sub_group:
            yield sub_group, experts


def _is_bank(route: Route) -> bool:
    return "experts" in route.name.split(".") and len(route.shape) == 3


def _share(route: Route, ranks: int) -> Route:
    """One rank's share of a bank of experts. Raises ConfigError where the number of experts is no multiple of ``ranks``."""
    if route.shape[0] % ranks:
        raise ConfigError(f"expert parallel: got {ranks}; allowed: a divisor of the {route.shape[0]} experts of {route.name}")
    shape = (route.shape[0] // ranks, *route.shape[1:])
    matrices = route.matrices[: len(route.matrices) // ranks]
    return replace(route, shape=shape, numel=route.numel // ranks, matrices=matrices)
