"""The checks by name, and how one of them is run."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.distributed as dist

from ds_optforge.testing import one_process, state, training
from ds_optforge.testing.engines import forget_runs
from ds_optforge.testing.params import usual

Check = Callable[[str, Mapping[str, Any]], Iterator[str]]
# Each yields a sentence for every failure, with the ZeRO stage and the numbers. Those of the first group need no engine.
IN_ONE_PROCESS: tuple[Check, ...] = (
    one_process.gradients_unchanged,
    one_process.zero_gradient,
    one_process.nonfinite_gradient,
    one_process.state_bytes,
    one_process.state_dict,
)
ON_ENGINES: tuple[Check, ...] = (
    training.parity,
    training.small_buckets,
    training.frozen_and_unused,
    training.bfloat16,
    training.telemetry,
    training.averages,
    state.state_formats_track_float32,
    state.engine_checkpoint,
    state.portable_checkpoint,
)
CHECKS: Mapping[str, Check] = {check.__name__: check for check in (*IN_ONE_PROCESS, *ON_ENGINES)}


class CheckFailure(AssertionError):
    """What a check has found, on every rank."""


def run_check(check: str, rule: str, params: Mapping[str, Any] | None = None) -> None:
    """Run one of `CHECKS` in the ranks of a process group that DeepSpeed has been initialized with. All call it together.

    Args:
        check: its name.
        rule: the name of a registered rule.
        params: settings of the rule, on top of those that make its numbers comparable.

    Raises:
        CheckFailure: on every rank, what any of them found.
    """
    try:
        found = list(CHECKS[check](rule, usual(rule, params)))
        of_ranks: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(of_ranks, found)
    except BaseException:
        forget_runs()
        raise
    lines = [f"{rule}, {check}, {line}{_of(ranks, len(of_ranks))}" for line, ranks in _by_line(of_ranks).items()]
    if lines:
        raise CheckFailure("\n".join(lines))


def _by_line(of_ranks: list[list[str]]) -> dict[str, list[int]]:
    """Who says what."""
    found: dict[str, list[int]] = {}
    for rank, lines in enumerate(of_ranks):
        for line in lines:
            found.setdefault(line, []).append(rank)
    return found


def _of(ranks: list[int], world: int) -> str:
    return "" if len(ranks) == world else f" (rank {', '.join(map(str, ranks))} of {world})"
