"""Judges a schedule by what it has written into the parameter groups, before a step uses it."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from ds_optforge.errors import ConfigError
from ds_optforge.step.groups import GROUP, Groups

logger = logging.getLogger("ds_optforge")

# Keys under which schedulers keep the rate of a group, now and (torch's SWALR) at the end of an annealing.
_RATES = ("lr", "swa_lr")
# Keys that torch's and DeepSpeed's cyclic schedulers write into every group, whether its rule reads them or not.
_MOMENTA = ("momentum", "betas")

_FALLING_RATE = (
    "{rule}: the learning rate is below an earlier one, but averaging replaces a falling schedule; allowed: a "
    'constant one, as of {{"type": "OptForgeSchedule", "params": {{"name": "none"}}}} (without a "scheduler" section the HF '
    "Trainer adds a falling one)"
)


class ScheduleCheck:
    """Checks of the rates, momenta and decays that schedulers and training loops write into the groups.

    ZeRO-1/2 shows an optimizer one group at a time. All of them are remembered here, so that the first call of a step sees
    every rate before any weight has changed.

    Args:
        groups: of the optimizer.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._dicts: dict[str, Mapping[str, Any]] = {}
        self._differed: bool | None = None  # whether rates differed in an earlier step; None before the first
        self._highest: dict[str, float] = {}  # by group, the highest rate so far
        self._warned: set[str] = set()  # rules

    def remember(self, dicts: Iterable[Mapping[str, Any]]) -> None:
        """Note the dicts of the optimizer's groups, which a load replaces by new ones."""
        self._dicts |= {group[GROUP]: group for group in dicts}

    def check(self, stepped: Iterable[Mapping[str, Any]], step: int) -> None:
        """Refuse a schedule that contradicts the configuration; warn of a merely harmful one.

        Args:
            stepped: the groups of this call.
            step: steps that these groups have taken so far.

        Raises:
            ConfigError: all groups have one rate although they are configured with different ones; a momentum that a group's
                rule does not read; a schedule of weight decay without its scheduler.
        """
        self._refuse_one_rate(step)
        for group in self._dicts.values():
            self._refuse_unread_momentum(group)
        for group in stepped:
            self._check_decay(group)
            self._warn_of_falling_rate(group)

    def _refuse_one_rate(self, step: int) -> None:
        """Refuse one rate in all groups, except as the common floor of a schedule whose rates differed before.

        A floor is no higher than any configured rate, as CosineAnnealingLR's ``eta_min``. A rate of 0, with which warm-ups
        begin, tells nothing.
        """
        configured = {name: self._groups[group].settings.lr for name, group in self._dicts.items()}
        if len(set(configured.values())) < 2:
            return
        rates = {key: {float(group.get(key, 0.0)) for group in self._dicts.values()} for key in _RATES}
        if self._differed is None:
            self._differed = step > 0  # a resumed run, which was judged when it began
        elif step > 0 and len(rates["lr"]) > 1:
            self._differed = True
        for key, found in rates.items():
            (rate, *others) = found
            if not others and rate > 0 and not (self._differed and rate <= min(configured.values())):
                raise ConfigError(_one_rate(key, rate, configured))

    def _refuse_unread_momentum(self, group: Mapping[str, Any]) -> None:
        members = self._groups[group]
        for key in _MOMENTA:
            if key in group and key not in members.rule.scheduled:
                raise ConfigError(
                    f"scheduler: something wrote '{key}' into the group '{group[GROUP]}', whose rule "
                    f"'{members.settings.rule}' does not read it; allowed: cycle_momentum=False (OneCycleLR, CyclicLR, "
                    "DeepSpeed's OneCycle), or a scheduler that writes only what each group has"
                )

    def _check_decay(self, group: Mapping[str, Any]) -> None:
        settings = self._groups[group].settings
        if settings.needs_schedule and "initial_weight_decay" not in group:
            raise ConfigError(
                f"weight_decay_schedule: got '{settings.needs_schedule}' without its scheduler; allowed: 'constant', or "
                '{"type": "OptForgeSchedule"} (build_scheduler) with total_num_steps'
            )

    def _warn_of_falling_rate(self, group: Mapping[str, Any]) -> None:
        settings, name, rate = self._groups[group].settings, group[GROUP], float(group["lr"])
        falls = rate < self._highest.get(name, 0.0)
        if settings.builds.replaces_schedule and falls and settings.rule not in self._warned:
            logger.warning(_FALLING_RATE.format(rule=settings.rule))
            self._warned.add(settings.rule)
        self._highest[name] = max(rate, self._highest.get(name, 0.0))


def _one_rate(key: str, rate: float, configured: Mapping[str, float]) -> str:
    groups = ", ".join(f"{name} {lr:g}" for name, lr in configured.items())
    rates = ", ".join(f"{lr:g}" for lr in configured.values())
    return (
        f"scheduler: the groups are configured with different rates ({groups}), but something set '{key}' of all of them to "
        f'{rate:g}; allowed: {{"type": "OptForgeSchedule"}} or another scheduler that keeps the ratios; a list with a rate '
        f"for each group, as max_lr=[{rates}] (likewise base_lr, swa_lr, and DeepSpeed's warmup_max_lr and cycle_max_lr); or "
        "one lr in the configuration"
    )
