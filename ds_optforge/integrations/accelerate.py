"""Training through Accelerate: an Accelerator that is guaranteed to use DeepSpeed, and the objects that its `prepare` takes.

```python
accelerator = make_accelerator("ds_configs/muon_zero2.json")
optimizer, scheduler = optimizer_and_scheduler(accelerator, model)
model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
```
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from ds_optforge.config.deepspeed import check, check_beside_optimizer, load_config
from ds_optforge.config.deepspeed_values import without_fillable
from ds_optforge.errors import ConfigError
from ds_optforge.integrations.deepspeed import register
from ds_optforge.integrations.plain import build_optimizer, build_scheduler
from ds_optforge.schedules import OptForgeSchedule
from ds_optforge.zero.versions import require_supported_deepspeed

try:
    import transformers  # noqa: F401 - through which Accelerate hands a configuration to DeepSpeed
    from accelerate import Accelerator, DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs  # type: ignore[import-untyped]
    from accelerate.utils import DummyOptim, DummyScheduler, parse_flag_from_env  # type: ignore[import-untyped]
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} is not installed; allowed: pip install 'ds-optforge[hf]'", name=error.name
    ) from error

_LAUNCH = "allowed: a start by deepspeed, torchrun or accelerate launch, the last with distributed_type: DEEPSPEED in its file"
_ACCUMULATION = "gradient_accumulation_steps"


def make_accelerator(config: str | Path | Mapping[str, Any], **arguments: Any) -> Accelerator:
    """Make an Accelerator that trains by ``config``, on every rank of the launcher.

    Args:
        config: a DeepSpeed configuration, as a dict or a path to its JSON file. ``gradient_clipping`` is set there alone:
            Accelerate's ``clip_grad_norm_`` then only returns the norm.
        arguments: arguments of Accelerator. ``gradient_accumulation_steps`` may be given here or in ``config``.

    Raises:
        ConfigError: the configuration is invalid, or a setting would make Accelerate train with DDP in place of DeepSpeed, or
            count one process in place of all.
        ImportError: DeepSpeed's version is not supported.
    """
    require_supported_deepspeed()
    loaded = load_config(config)
    if "optimizer" in loaded:
        check(loaded, filled=False)
    else:
        check_beside_optimizer(loaded, {}, filled=False)
    _refuse_fallback(arguments)
    loaded[_ACCUMULATION] = arguments[_ACCUMULATION] = _accumulation(loaded, arguments)
    plugin = DeepSpeedPlugin(hf_ds_config=loaded)
    accelerator = Accelerator(**{**arguments, "deepspeed_plugin": plugin, "kwargs_handlers": _handlers(arguments)})
    _refuse_other_state(accelerator)
    return accelerator


def optimizer_and_scheduler(
    accelerator: Accelerator, model: nn.Module, total_steps: int | None = None, real: bool = False
) -> tuple[Any, Any]:
    """Make the optimizer and scheduler for ``accelerator.prepare``, from the configuration that the accelerator was made with.

    Args:
        accelerator: from `make_accelerator`.
        model: to be trained; it is registered here.
        total_steps: optimizer steps of the run, where the schedule's ``total_num_steps`` is "auto" or missing.
        real: True returns an OptForge and an OptForgeSchedule and removes their sections from the accelerator's configuration.
            False returns Accelerate's DummyOptim and DummyScheduler, for which DeepSpeed builds both from the sections.

    Returns:
        (optimizer, scheduler); the scheduler is None where the configuration has no "scheduler" section.

    Raises:
        ConfigError: nothing fills an "auto", or `check` refuses the configuration, or another Accelerator was made first.
    """
    _refuse_other_state(accelerator)
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    _fill_length(config, total_steps)
    check(without_fillable(config))
    if not real:
        register(model)
        optimizer = DummyOptim(list(model.parameters()))
        return optimizer, DummyScheduler(optimizer) if "scheduler" in config else None
    built = build_optimizer(model, config)
    scheduler = build_scheduler(built, config) if "scheduler" in config else None
    del config["optimizer"]
    config.pop("scheduler", None)
    config["zero_force_ds_cpu_optimizer"] = False  # else Accelerate puts DeepSpeed's Adam in its place for CPU offload
    return built, scheduler


def _fill_length(config: dict[str, Any], total_steps: int | None) -> None:
    """Fill in the configuration itself: Accelerate would divide DummyScheduler's total_num_steps by the number of processes."""
    scheduler = config.get("scheduler", {})
    if total_steps is not None and scheduler.get("type") == OptForgeSchedule.__name__:
        params = scheduler.setdefault("params", {})
        if params.get("total_num_steps", "auto") == "auto":
            params["total_num_steps"] = total_steps


def _refuse_fallback(arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError, with the setting to change, where Accelerate would train without DeepSpeed."""
    problems = []
    if arguments.get("cpu"):
        problems.append(
            "cpu: got True, with which Accelerate trains by DDP; allowed: no such argument (DeepSpeed runs on a CPU too)"
        )
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        problems.append(
            f"ACCELERATE_USE_CPU: got '{os.environ['ACCELERATE_USE_CPU']}', with which Accelerate trains by DDP; allowed: "
            "'false' (use_cpu: false in the file of accelerate launch, and no --cpu)"
        )
    for name in ("deepspeed_plugin", "deepspeed_plugins", "fsdp_plugin", "megatron_lm_plugin"):
        if arguments.get(name) is not None:
            problems.append(f"{name}: got an argument; allowed: none, because config makes the plugin")
    missing = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in os.environ]
    if missing:
        problems.append(f"{', '.join(missing)}: not set in the environment; {_LAUNCH}")
    if problems:
        raise ConfigError("\n".join(problems))


def _accumulation(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> int:
    """The one number that both must have: Accelerate counts micro-batches by its argument, DeepSpeed by its configuration."""
    argument = arguments.get(_ACCUMULATION)
    written = config.get(_ACCUMULATION, "auto")
    if written == "auto":
        return argument or 1
    if argument not in (None, written):
        raise ConfigError(f"{_ACCUMULATION}: got {argument}, and {written} in the configuration; allowed: one of the two")
    return int(written)


def _handlers(arguments: Mapping[str, Any]) -> list[Any]:
    """The caller's handlers; on a CPU with the backend, without which Accelerate counts one process and does not split data."""
    from deepspeed.accelerator import get_accelerator

    handlers = list(arguments.get("kwargs_handlers") or [])
    if get_accelerator().device_name() != "cpu":
        return handlers
    if not any(isinstance(handler, InitProcessGroupKwargs) for handler in handlers):
        handlers.append(InitProcessGroupKwargs())
    return [
        replace(handler, backend="gloo")
        if isinstance(handler, InitProcessGroupKwargs) and handler.backend == "nccl"  # its default
        else handler
        for handler in handlers
    ]


def _refuse_other_state(accelerator: Accelerator) -> None:
    """Raise ConfigError where Accelerate's one state per process was made earlier, with other settings."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise ConfigError(
            f"accelerator: got distributed_type {accelerator.distributed_type.value}; allowed: DEEPSPEED (make_accelerator, "
            "before anything else in the process asks for an Accelerator or PartialState)"
        )
    if accelerator.num_processes != dist.get_world_size():
        raise ConfigError(
            f"accelerator: counts {accelerator.num_processes} process(es) of {dist.get_world_size()}; allowed: all "
            "(make_accelerator, before anything else in the process asks for an Accelerator or PartialState)"
        )
