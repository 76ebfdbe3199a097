"""Learning-rate curves of the step, and OptForgeSchedule, which moves every group along one curve from its own rate."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ds_optforge.config import ScheduleConfig, schedule_config


def learning_rate_factor(step: int, config: ScheduleConfig) -> float:
    """The factor of the initial learning rate in optimizer step ``step`` (counted from 0).

    The warm-up rises linearly over W steps, its first step being 1/W and its last 1; linear and cosine then fall, and reach
    ``final_lr_fraction`` exactly in the last step, total_num_steps - 1.
    """
    warmup = config.warmup
    if step < warmup:
        return (step + 1) / warmup
    if config.name in ("none", "constant"):
        return 1.0
    assert config.total_num_steps is not None  # validated: these curves need it
    # The peak is the last step of the warm-up, or step 0 without one.
    peak = max(warmup - 1, 0)
    progress = min((step - peak) / max(config.total_num_steps - 1 - peak, 1), 1.0)
    remaining = 1.0 - progress if config.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.final_lr_fraction + (1.0 - config.final_lr_fraction) * remaining


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
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Any]:
        """Each group's learning rate in the coming step. (From the groups, which DeepSpeed may drop or replace.)"""
        factor = learning_rate_factor(self.last_epoch, self.config)
        return [group["initial_lr"] * factor for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers only: where the run is on the curve."""
        return {"last_epoch": self.last_epoch, "config": self.config.model_dump()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the saved step, along the curve that this run was configured with."""
        self.last_epoch = state_dict["last_epoch"]
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
