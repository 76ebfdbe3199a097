"""Reads a DeepSpeed configuration, and refuses what OptForge cannot train with."""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_optforge.config.deepspeed_reading import problems_of_reading
from ds_optforge.config.deepspeed_values import autos_of, problems_of_auto, problems_of_batch, problems_of_precision, without
from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.config.refused import problems_of, setting
from ds_optforge.config.schedule import schedule_config
from ds_optforge.config.sections import ROLES
from ds_optforge.errors import ConfigError
from ds_optforge.reading import json_value, text

logger = logging.getLogger("ds_optforge")

# The sections' types, which are the names of the classes.
OPTIMIZER, SCHEDULER = "OptForge", "OptForgeSchedule"
_CONTINUED = ("Adam", "AdamW", "Lion", "Muon")  # by what `ds-optforge init` writes

# Of schedulers that write rates of their own into the groups: the keys of these rates, with their defaults. A list has a rate
# for each group, a number (other than 0) is written into all of them; None keeps the groups' own rates.
_WRITTEN_RATES: dict[str, dict[str, float | None]] = {
    "WarmupLR": {"warmup_min_lr": 0.0, "warmup_max_lr": None},
    "WarmupDecayLR": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.001},
    "OneCycle": {"cycle_min_lr": None, "cycle_max_lr": None},
    "LRRangeTest": {"lr_range_test_min_lr": 0.001},
    "OneCycleLR": {"max_lr": None},
    "CyclicLR": {"base_lr": None, "max_lr": None},
}


def load_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return a DeepSpeed configuration as a dict.

    Args:
        config: the configuration, or the path of its JSON file.

    Raises:
        ConfigError: a file that cannot be read, or does not hold a JSON object.
    """
    if isinstance(config, Mapping):
        return dict(config)
    try:
        loaded = json_value(text(Path(config)))
    except OSError as error:
        raise ConfigError(f"{config}: {error.strerror}; allowed: a DeepSpeed configuration file") from None
    except ValueError as error:
        raise ConfigError(f"{config}: not JSON ({error}); allowed: a DeepSpeed configuration file") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{config}: got a {type(loaded).__name__}; allowed: a JSON object")
    return loaded


def optimizer_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the "params" of the optimizer section; ``config`` may also be those params alone.

    Raises:
        ConfigError: a section that is no object, or of another type than OptForge.
    """
    return _params(config, "optimizer", OPTIMIZER) if "optimizer" in config else config


def scheduler_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the "params" of the scheduler section; ``config`` may also be those params alone.

    Raises:
        ConfigError: a section that is missing, no object, or of another type than OptForgeSchedule.
    """
    if "scheduler" in config:
        return _params(config, "scheduler", SCHEDULER)
    if "optimizer" in config or "train_batch_size" in config:
        raise ConfigError('scheduler: missing; allowed: {"type": "OptForgeSchedule", "params": {...}}')
    return config


def check(config: Mapping[str, Any], filled: bool = True) -> None:
    """Validate what OptForge reads of a DeepSpeed configuration, as far as that is possible without a model.

    Args:
        config: the whole configuration.
        filled: whether frameworks have filled their values; False, for a file, accepts the "auto" that they will fill.

    Raises:
        ConfigError: bad "params", a DeepSpeed scheduler that would flatten different learning rates to one, a
            feature of DeepSpeed with which training would not be exact.
    """
    if "optimizer" not in config:
        raise ConfigError('optimizer: missing; allowed: {"type": "OptForge", "params": {"name": ...}}')
    params = _params(config, "optimizer", OPTIMIZER)
    optimizer = OptimizerConfig(params if filled else _without_auto(params, ("lr", "betas", "eps", "weight_decay")))
    check_beside_optimizer(config, _rates(optimizer), filled)


def check_beside_optimizer(config: Mapping[str, Any], rates: Mapping[str, float], filled: bool = True) -> None:
    """Validate like `check`, without the optimizer section.

    Args:
        config: the whole configuration.
        rates: the learning rates that the optimizer will ask for, by group or role.
        filled: as in `check`.

    Raises:
        ConfigError: as in `check`.
    """
    if "scheduler" in config:
        kind = _section(config, "scheduler").get("type")
        if kind == SCHEDULER:
            section = _params(config, "scheduler", SCHEDULER)
            if not filled:
                length = {"total_num_steps": sys.maxsize} if section.get("total_num_steps") == "auto" else {}
                section = {**_without_auto(section, ("total_num_steps", "warmup_num_steps")), **length}
            schedule_config(section)
        elif not isinstance(kind, str):
            raise ConfigError(f"scheduler.type: got {kind!r}; allowed: 'OptForgeSchedule', or a scheduler that keeps ratios")
        elif kind in _WRITTEN_RATES:
            _refuse_one_rate(kind, _params(config, "scheduler", kind), rates)
    _refuse_features(config)
    _refuse_misread(config, filled)


def _without_auto(section: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if not (key in keys and value == "auto")}


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config[key]
    if not isinstance(section, Mapping):
        raise ConfigError(f'{key}: got {section!r}; allowed: an object {{"type": ..., "params": ...}}')
    return section


def _params(config: Mapping[str, Any], key: str, kind: str) -> Mapping[str, Any]:
    section = _section(config, key)
    found = section.get("type")
    if found != kind:
        way = (
            "; `ds-optforge init --from FILE` writes one that continues it"
            if key == "optimizer" and found in _CONTINUED
            else ""
        )
        raise ConfigError(f"{key}.type: got {found!r}; allowed: '{kind}'{way}")
    params = section.get("params", {})
    if not isinstance(params, Mapping):
        raise ConfigError(f"{key}.params: got {params!r}; allowed: an object")
    return params


def _rates(optimizer: OptimizerConfig) -> dict[str, float]:
    """Return every learning rate in the section, by the role or override that asks for it."""
    rates: dict[str, float] = {role: optimizer.settings(role).lr for role in ROLES}
    rates["matrix that is left to adamw"] = optimizer.settings("matrix", left=True).lr
    for index, override in enumerate(optimizer.common.overrides):
        if "lr" in override.settings:
            rates[f"overrides[{index}]"] = override.settings["lr"]
    return rates


def _refuse_one_rate(kind: str, params: Mapping[str, Any], rates: Mapping[str, float]) -> None:
    """Raise ConfigError for a scheduler that would write one rate into groups that are configured with different ones."""
    if len(set(rates.values())) < 2:
        return
    found = ", ".join(f"{role} {rate:g}" for role, rate in rates.items())
    for key, default in _WRITTEN_RATES[kind].items():
        value = params.get(key, default)
        if value == "auto":  # of the HF Trainer, which fills 0 and its learning rate
            value = 0.0 if key == "warmup_min_lr" else value
        if value is None or value == 0 or isinstance(value, list | tuple):
            continue
        raise ConfigError(
            f"scheduler.params.{key}: got {value!r}, which '{kind}' writes into every group, while the optimizer asks for "
            f"different rates ({found}); allowed: a list with a rate for each parameter group, in their order, or "
            "the type 'OptForgeSchedule' or 'WarmupCosineLR', which keep the ratios"
        )


def _refuse_misread(config: Mapping[str, Any], filled: bool) -> None:
    """Raise ConfigError for values that contradict each other, and for what DeepSpeed refuses or would ignore."""
    problems = [*problems_of_auto(config, filled), *problems_of_batch(config), *problems_of_precision(config)]
    if not problems:
        problems = list(problems_of_reading(without(config, frozenset(autos_of(config)))))
    if problems:
        raise ConfigError("\n".join(problems))


def _refuse_features(config: Mapping[str, Any]) -> None:
    problems = list(problems_of(config))
    if problems:
        raise ConfigError("\n".join(problems))
    unchecked = ("bf16.check_grad_overflow", "zero_optimization.compute_grad_norm")
    if any(setting(config, path) is False for path in unchecked):
        logger.warning(
            "bf16.check_grad_overflow or zero_optimization.compute_grad_norm is false: DeepSpeed then steps with gradients "
            "that are not finite, and they reach weights and state"
        )
