"""Learning-rate curves, and OptForgeSchedule, which moves every group along one curve from its own initial rate."""

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ds_optforge.config.schedule import ScheduleConfig, schedule_config
from ds_optforge.errors import ConfigError
from ds_optforge.optimizer import OTHER_OPTIMIZERS_CHECKPOINT, OptForge, groups_of


def learning_rate_factor(step: int, config: ScheduleConfig) -> float:
    """Return the factor of the initial learning rate in optimizer step ``step``.

    The warm-up rises linearly over W steps; its first factor is 1 / W and its last 1. Every falling curve reaches
    ``final_lr_fraction`` exactly in the last step, total_num_steps - 1. A cool-down over C steps starts from the value that
    the curve has in the step before it. Constant with a cool-down is WSD (Hu et al. 2024, arXiv 2404.06395); the cool-down
    "1-sqrt" is from Hägele et al. 2024, arXiv 2405.18392.

    Args:
        step: counted from 0.
        config: of the curve.
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
    """Return the factor of the main curve, after the warm-up and without a cool-down."""
    if config.name in ("none", "constant", "wsd"):
        return 1.0
    progress = _progress(step, config)
    if config.name == "rex":
        return max(config.final_lr_fraction, math.pow(1.0 - progress, config.exponent))
    return config.final_lr_fraction + (1.0 - config.final_lr_fraction) * _REMAINING[config.name](progress)


def _progress(step: int, config: ScheduleConfig) -> float:
    """Return the progress: 0 in the last step of the warm-up (or step 0 without one), 1 in the last step of training."""
    assert config.total_num_steps is not None  # validated: every falling curve has it
    peak = max(config.warmup - 1, 0)
    return min(max(step - peak, 0) / max(config.total_num_steps - 1 - peak, 1), 1.0)


def weight_decay_factor(step: int, schedule: str, total_num_steps: int) -> float:
    """Return the factor of the initial weight decay in optimizer step ``step``, with progress p = step / total_num_steps.

    Args:
        step: counted from 0.
        schedule: "linear", 1 - p, or "cosine", (1 + cos(pi p)) / 2.
        total_num_steps: optimizer steps of the whole training.
    """
    return _REMAINING[schedule](min(step / total_num_steps, 1.0))


class OptForgeSchedule(LRScheduler):
    """Scheduler that multiplies each group's initial learning rate by `learning_rate_factor`.

    It moves weight decay too, in groups of an OptForge that are configured with a ``weight_decay_schedule``.

    Args:
        optimizer: OptForge, or DeepSpeed's wrapper around it (DeepSpeed hands a scheduler its ZeRO optimizer).
        last_epoch: number of the last step as in torch; -1 starts at step 0.
        config: the "params" of the scheduler section (see `ds_optforge.config.schedule.ScheduleConfig`).

    Raises:
        ConfigError: a bad section, or one that contradicts the optimizer's configuration.
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
        """Return each group's learning rate in the coming step, computed from ``initial_lr`` in the group's dict."""
        factor = learning_rate_factor(self.last_epoch, self.config)
        return [group["initial_lr"] * factor for group in self.optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        """Advance learning rates, and weight decays with a schedule, to the next optimizer step; ``epoch`` as in torch."""
        super().step(epoch)
        self._schedule_weight_decay()

    def _schedule_weight_decay(self) -> None:
        for group in self.optimizer.param_groups:
            if "initial_weight_decay" in group and isinstance(self.optimizer, OptForge):
                assert self.config.total_num_steps is not None  # checked when the schedule was made
                schedule = groups_of(self.optimizer)[group].settings.needs_schedule
                if not schedule:  # the run that wrote the checkpoint had a schedule, this one has none
                    group["weight_decay"] = group.pop("initial_weight_decay")
                    continue
                factor = weight_decay_factor(self.last_epoch, schedule, self.config.total_num_steps)
                group["weight_decay"] = group["initial_weight_decay"] * factor

    def state_dict(self) -> dict[str, Any]:
        """Return plain data only: the step on the curve, and the configuration."""
        return {"last_epoch": self.last_epoch, "config": self.config.model_dump()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume at the step saved in ``state_dict``, along the curve with which this schedule was configured.

        Raises:
            ConfigError: the state of a scheduler that counts otherwise, as DeepSpeed's own do.
        """
        if "last_epoch" not in state_dict:
            raise ConfigError(
                f"scheduler: the checkpoint holds {sorted(state_dict)}, the state of another scheduler; allowed: 'last_epoch', "
                f"of OptForgeSchedule. {OTHER_OPTIMIZERS_CHECKPOINT}"
            )
        self.last_epoch = state_dict["last_epoch"]
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
        self._schedule_weight_decay()
