"""Training without DeepSpeed: a torch optimizer and scheduler from the same configuration."""

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ds_optforge.config.deepspeed import load_config, optimizer_section, scheduler_section
from ds_optforge.errors import ConfigError
from ds_optforge.integrations.deepspeed import register_with_deepspeed
from ds_optforge.optimizer import OptForge
from ds_optforge.routing.tags import tag
from ds_optforge.schedules import OptForgeSchedule

Config = str | Path | Mapping[str, Any]


def build_optimizer(model: nn.Module, config: Config) -> OptForge:
    """Build a `torch.optim.Optimizer` for ``model``, for plain PyTorch or as ``optimizer=`` of deepspeed.initialize.

    Args:
        model: the model whose trainable parameters are optimized.
        config: a DeepSpeed configuration (dict or path), or the "params" of its optimizer section alone.

    Raises:
        ConfigError: the configuration is invalid or does not fit the model, or ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model: got a {type(model).__name__}; allowed: a torch.nn.Module, because names and places in it decide each "
            "parameter's rule"
        )
    section = optimizer_section(load_config(config))
    tag(model)
    _register_where_deepspeed_is()
    return OptForge(model.parameters(), **section)


def build_scheduler(optimizer: OptForge, config: Config, total_steps: int | None = None) -> OptForgeSchedule:
    """Build the learning-rate schedule of a configuration.

    Args:
        optimizer: the optimizer whose learning rates follow the schedule.
        config: a DeepSpeed configuration (dict or path), or the "params" of its scheduler section alone.
        total_steps: optimizer steps of the run, where the configuration has no ``total_num_steps``, or "auto".

    Raises:
        ConfigError: the configuration is invalid, or nothing says the length that its curve needs.
    """
    section = dict(scheduler_section(load_config(config)))
    if total_steps is not None and section.get("total_num_steps", "auto") == "auto":
        section["total_num_steps"] = total_steps
    return OptForgeSchedule(optimizer, **section)


def MuonWithAuxAdam(param_groups: Iterable[Mapping[str, Any]]) -> OptForge:
    """Build an OptForge from KellerJordan/Muon's parameter groups, each with ``use_muon`` and hyperparameters of its own.

    The defaults are that library's: lr 0.02, momentum 0.95, Nesterov for Muon; lr 3e-4, betas (0.9, 0.95), eps 1e-10 for
    Adam; no decay. (This is a function because DeepSpeed takes any *class* with "muon" in its name for its own optimizer.)

    Raises:
        ConfigError: a group lacks the flag, or has a setting that its rule does not read, or is a parameter.
    """
    groups = []
    for index, group in enumerate(param_groups):
        if not isinstance(group, Mapping):
            raise ConfigError(
                f"param_groups[{index}]: got a {type(group).__name__}; allowed: a dict with 'params' and 'use_muon' "
                "(build_optimizer(model, config) decides by itself which parameters are matrices)"
            )
        if not isinstance(group.get("use_muon"), bool):
            found = group.get("use_muon", "nothing")
            raise ConfigError(f"param_groups[{index}].use_muon: got {found!r}; allowed: True (Muon) or False (AdamW)")
        groups.append(dict(group))
    _register_where_deepspeed_is()
    return OptForge(groups, name="muon", adamw={"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10})


def _register_where_deepspeed_is() -> None:
    """Register with DeepSpeed where it is imported or a launcher started the process; elsewhere importing it costs seconds."""
    if "deepspeed" in sys.modules or "LOCAL_RANK" in os.environ:
        register_with_deepspeed()
