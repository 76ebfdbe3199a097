"""Small collectives over the ranks of a group: sums, flags, and agreement on the plan."""

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optforge.zero.layout import Binding, LayoutError
from ds_optforge.zero.plan import ExchangePlan


def sum_over_ranks(values: Tensor, binding: Binding) -> None:
    """Add up ``values``, of any shape, in place over the binding's process group. Collective."""
    if binding.process_group is not None and binding.world_size > 1:
        dist.all_reduce(values, group=binding.process_group)


def max_over_all_ranks(values: Tensor) -> None:
    """Take the maxima of ``values``, of any shape, in place over all ranks. Collective where there is a process group."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)


def on_first_rank() -> bool:
    """Return whether this is the first rank of all, or there are no others."""
    return not dist.is_initialized() or dist.get_rank() == 0


def any_rank(found: bool, binding: Binding) -> bool:
    """Return whether any rank of the binding's process group has ``found`` something. Collective."""
    if binding.process_group is None or binding.world_size == 1:
        return found
    flag = torch.tensor(float(found), device=binding.device)
    dist.all_reduce(flag, group=binding.process_group)
    return bool(flag.item())


def require_agreement(plan: ExchangePlan, routing: str, binding: Binding) -> None:
    """Raise on every rank unless all made the same plan from the same configuration, and none has a problem. Collective.

    It costs one small all-reduce; tables travel only to name a difference.

    Args:
        plan: this rank's.
        routing: a text with a line per parameter of the whole optimizer: which rule it gets, with which settings.
        binding: tells the process group, and this rank's problem.

    Raises:
        LayoutError: a problem of any rank, or a difference; it names the first line of the routing, or the first matrix,
            that differs between ranks.
    """
    group = binding.process_group
    if group is None or binding.world_size == 1:
        if binding.problem:
            raise LayoutError(binding.problem)
        return
    digest = int(hashlib.sha256((plan.fingerprint + routing + binding.problem).encode()).hexdigest()[:15], 16)
    extremes = torch.tensor([digest, -digest], dtype=torch.long, device=binding.device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MIN, group=group)
    lowest, highest = extremes[0].item(), -extremes[1].item()
    if lowest != highest:
        raise LayoutError(_first_difference(plan, routing, binding))


def _first_difference(plan: ExchangePlan, routing: str, binding: Binding) -> str:
    table = [binding.problem or "nothing wrong", *routing.splitlines()]
    for matrix, owner in enumerate(plan.owners):
        table.append(f"{plan.layout.describe(matrix)}, orthogonalized by rank {owner}")
    table += [f"{plan.layout.describe(team.matrix)}, orthogonalized by ranks {team.ranks}" for team in plan.teams]
    table.append(f"exchanges {plan.exchanges}, bucket_numel {plan.bucket_numel}")
    tables: list[list[str]] = [[] for _ in range(binding.world_size)]
    dist.all_gather_object(tables, table, group=binding.process_group)
    for line in range(max(map(len, tables))):
        lines = [other[line] if line < len(other) else "nothing" for other in tables]
        for rank, text in enumerate(lines):
            if text != lines[0]:
                return f"ranks disagree on the plan: rank 0 has '{lines[0]}', rank {rank} has '{text}'"
    return "ranks disagree on the layout of the group's parameters"
