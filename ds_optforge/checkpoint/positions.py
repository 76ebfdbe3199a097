"""The place on the schedule, in a checkpoint of the same parameter groups or of others."""

from collections.abc import Mapping
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from ds_optforge.schedules import OptForgeSchedule

POSITION = ("last_epoch", "_step_count", "last_batch_iteration")  # what is no group's own in a scheduler's state


def problem_of(scheduler: Any, saved: Mapping[str, Any] | None, same_groups: bool) -> str:
    """Return why ``scheduler`` cannot go on from a saved state; "" if it can, or if there is none of either.

    Args:
        scheduler: the engine's.
        saved: the state of the scheduler that was saved.
        same_groups: whether it moved groups of the same names.
    """
    if scheduler is None or saved is None:
        return ""
    if isinstance(scheduler, OptForgeSchedule):
        needed = {"last_epoch"}
    else:
        own = scheduler.state_dict().keys()
        needed = set(own) if same_groups else own & set(POSITION)
    kind = type(scheduler).__name__
    if not needed <= saved.keys():
        return f"scheduler: got a state of {sorted(saved)}; allowed: {sorted(needed)}, which {kind} reads"
    if not same_groups and not _computes_rates(scheduler):
        return (
            f"scheduler: got {kind}, which cannot compute the rates of other parameter groups from a position; allowed: "
            "OptForgeSchedule, LambdaLR, torch's schedulers in closed form"
        )
    return ""


def set_position(scheduler: Any, saved: Mapping[str, Any], same_groups: bool) -> None:
    """Go on from a saved state in which `problem_of` found no problem; arguments as there."""
    if same_groups or isinstance(scheduler, OptForgeSchedule):
        scheduler.load_state_dict(saved)
        return
    # The rest of the state is the rates of groups that are not here.
    scheduler.load_state_dict({**scheduler.state_dict(), **{key: saved[key] for key in POSITION if key in saved}})
    closed = getattr(scheduler, "_get_closed_form_lr", scheduler.get_lr)
    for group, rate in zip(scheduler.optimizer.param_groups, closed(), strict=True):
        group["lr"] = rate
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def _computes_rates(scheduler: Any) -> bool:
    """Whether the rates follow from the position, and not from those of the step before."""
    return isinstance(scheduler, OptForgeSchedule | LambdaLR) or hasattr(scheduler, "_get_closed_form_lr")
