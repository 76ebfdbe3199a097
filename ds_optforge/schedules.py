"""Learning-rate curves of the step, and OptForgeSchedule, which moves every group along one curve from its own rate."""

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ds_optforge.config.schedule import ScheduleConfig, schedule_config
from ds_optforge.optimizer import OptForge, groups_of
from ds_optforge.validation import ConfigError


def learning_rate_factor(step: int, config: ScheduleConfig) -> float:
    """The factor of the initial learning rate in optimizer step ``step`` (counted from 0).

    The warm-up rises linearly over W steps, its first step being 1 / W and its last 1. Every falling curve reaches
    ``final_lr_fraction`` exactly in the last step, total_num_steps - 1; a cool-down over C steps starts from the value that
    the curve has in the step before it.
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    if not config.cools_down or config.total_num_steps is None:
        return _curve(step, config)
    before = config.total_num_steps - 1 - config.cooldown
    if step <= before:
        return _curve(step, config)
    progress = min((step - before) / config.cooldown, 1.0)
    start = _curve(before, config) if before >= 0 else 1.0
    return config.final_lr_fraction + (start - config.final_lr_fraction) * _REMAINING[config.cooldown_shape](progress)


_REMAINING: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
}


def _curve(step: int, config: ScheduleConfig) -> float:
    """The main curve, after the warm-up and without a cool-down."""
    if config.name in ("none", "constant", "wsd"):
        return 1.0
    progress = _progress(step, config)
    if config.name == "rex":
        return max(config.final_lr_fraction, math.pow(1.0 - progress, config.exponent))
    return config.final_lr_fraction + (1.0 - config.final_lr_fraction) * _REMAINING[config.name](progress)


def _progress(step: int, config: ScheduleConfig) -> float:
    """0 in the last step of the warm-up (or step 0 without one), 1 in the last step of the run."""
    assert config.total_num_steps is not None  # validated: whoever asks has it
    peak = max(config.warmup - 1, 0)
    return min(max(step - peak, 0) / max(config.total_num_steps - 1 - peak, 1), 1.0)


def weight_decay_factor(step: int, schedule: str, total_num_steps: int) -> float:
    """The factor of the initial weight decay in step ``step``: linear is 1 - progress, progress being step / total."""
    return _REMAINING[schedule](min(step / total_num_steps, 1.0))


class OptForgeSchedule(LRScheduler):
    """Multiplies each group's initial learning rate by `learning_rate_factor`.

    Args:
        optimizer: OptForge, or DeepSpeed's wrapper around it (DeepSpeed hands a scheduler its ZeRO optimizer).
        last_epoch: as in torch: -1 starts afresh.
        config: the "params" of the scheduler section (see `ds_optforge.config.ScheduleConfig`).

    Raises:
        ConfigError: a bad section.
    """

    def __init__(self, optimizer: Any, last_epoch: int = -1, **config: Any) -> None:
        self.config = schedule_config(config)
        while not isinstance(optimizer, Optimizer) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if isinstance(optimizer, OptForge):
            self._check(optimizer)
        super().__init__(optimizer, last_epoch)

    def _check(self, optimizer: OptForge) -> None:
        for group in optimizer.param_groups:
            settings = groups_of(optimizer)[group].settings
            if settings.builds.replaces_schedule and self.config.decays:
                raise ConfigError(
                    f"scheduler.params.name: got a falling '{self.config.name}' curve on {settings.rule}, whose averaging "
                    "replaces the schedule; allowed: 'none' or 'constant'"
                )
            schedule = settings.needs_schedule
            if schedule and self.config.total_num_steps is None:
                raise ConfigError(f"scheduler.params.total_num_steps: missing; weight_decay_schedule '{schedule}' needs it")
            if schedule:
                group.setdefault("initial_weight_decay", group["weight_decay"])

    def get_lr(self) -> list[float | Any]:
        """Each group's learning rate in the coming step. (From the groups, which DeepSpeed may drop or replace.)"""
        factor = learning_rate_factor(self.last_epoch, self.config)
        return [group["initial_lr"] * factor for group in self.optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        """Move on to the next optimizer step: learning rates, and weight decay where it has a schedule."""
        super().step(epoch)
        self._schedule_weight_decay()

    def _schedule_weight_decay(self) -> None:
        for group in self.optimizer.param_groups:
            if "initial_weight_decay" in group and isinstance(self.optimizer, OptForge):
                assert self.config.total_num_steps is not None  # checked when the schedule was made
                schedule = groups_of(self.optimizer)[group].settings.needs_schedule
                if not schedule:  # the checkpoint's run had one, this one has not
                    group["weight_decay"] = group.pop("initial_weight_decay")
                    continue
                factor = weight_decay_factor(self.last_epoch, schedule, self.config.total_num_steps)
                group["weight_decay"] = group["initial_weight_decay"] * factor

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers only: where the run is on the curve."""
        return {"last_epoch": self.last_epoch, "config": self.config.model_dump()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the saved step, along the curve that this run was configured with."""
        self.last_epoch = state_dict["last_epoch"]
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
        self._schedule_weight_decay()
