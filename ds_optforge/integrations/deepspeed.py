"""The doors into DeepSpeed: `register` makes the JSON names known, `initialize` is register + deepspeed.initialize."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_optforge import roles
from ds_optforge.config import ROLES, OptimizerConfig, schedule_config
from ds_optforge.optimizer import OptForge, enter_averages, leave_averages, send_telemetry
from ds_optforge.schedules import OptForgeSchedule
from ds_optforge.step.groups import GROUP
from ds_optforge.validation import ConfigError
from ds_optforge.zero.layout import refresh_weights

logger = logging.getLogger("ds_optforge")

# DeepSpeed's own schedulers: they write the same learning rate into every group.
_FLATTENING_SCHEDULERS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest")


def publish_names() -> None:
    """Let "type": "OptForge" and "OptForgeSchedule" be found: DeepSpeed looks unknown types up in these torch modules."""
    torch.optim.OptForge = OptForge  # type: ignore[attr-defined]
    torch.optim.lr_scheduler.OptForgeSchedule = OptForgeSchedule  # type: ignore[attr-defined]


def make_known() -> None:
    """Enter OptForge and OptForgeSchedule into DeepSpeed's lists of optimizers and schedulers that it trusts."""
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.zero import utils as zero_utils

    publish_names()
    if OptForge not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
        zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(OptForge)
    if OptForgeSchedule.__name__ not in lr_schedules.VALID_LR_SCHEDULES:
        lr_schedules.VALID_LR_SCHEDULES.append(OptForgeSchedule.__name__)


def register(model: nn.Module) -> None:
    """Make ``model`` trainable with "type": "OptForge" under DeepSpeed, Accelerate and the HF Trainer.

    Tags each parameter with its name and its place in the module tree, which are gone once ZeRO has flattened it, and
    enters OptForge into DeepSpeed's lists of known optimizers and schedulers. Call it once, before the engine is built.
    """
    make_known()
    roles.tag(model)


def initialize(
    *, model: nn.Module, config: str | Path | Mapping[str, Any], optimizer: Any = None, **arguments: Any
) -> tuple[Any, ...]:
    """``deepspeed.initialize`` with ``model`` registered and ``config`` checked first.

    Args:
        model: to be trained.
        config: a DeepSpeed configuration, as a dict or a path to its JSON file.
        optimizer: an OptForge (`build_optimizer`, `MuonWithAuxAdam`) or a function of the parameters that makes one, where
            ``config`` has no "optimizer" section.
        arguments: everything else that deepspeed.initialize takes.

    Returns:
        deepspeed.initialize's (engine, optimizer, dataloader, scheduler).

    Raises:
        ConfigError: before any engine exists.
    """
    import deepspeed

    loaded = load_config(config)
    if optimizer is None:
        check(loaded)
    else:
        loaded = _beside_object(loaded, optimizer)
    if "scheduler" in loaded and arguments.get("lr_scheduler") is not None:
        raise ConfigError(f"scheduler: {_BOTH.format(what='scheduler', argument='lr_scheduler')}")
    register(model)
    result: tuple[Any, ...] = deepspeed.initialize(model=model, config=loaded, optimizer=optimizer, **arguments)
    send_telemetry(_base_optimizer(result[0])[1], result[0].monitor)
    return result


_BOTH = (
    'got a "{what}" section in the configuration and the argument {argument}; allowed: one of them (remove the section to '
    "train with the object, or the argument to train with the section)"
)


def _beside_object(config: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """The checked configuration for a real optimizer, beside which DeepSpeed would ignore an optimizer section."""
    if "optimizer" in config:
        raise ConfigError(f"optimizer: {_BOTH.format(what='optimizer', argument='optimizer')}")
    if isinstance(optimizer, torch.optim.Optimizer) and not isinstance(optimizer, OptForge):
        raise ConfigError(
            f"optimizer: got an object of {type(optimizer).__name__}; allowed: an OptForge (build_optimizer, MuonWithAuxAdam)"
        )
    groups = optimizer.param_groups if isinstance(optimizer, OptForge) else []
    check_beside_optimizer(config, {group[GROUP]: group["lr"] for group in groups})
    # DeepSpeed refuses every optimizer object but its own Adam and Lion on the CPU, unless told so.
    return {"zero_force_ds_cpu_optimizer": False, **config}


def _base_optimizer(engine: Any) -> tuple[Any, OptForge]:
    """(what holds it, the OptForge) under an engine's or a framework's wrappers."""
    wrapper = optimizer = engine
    while not isinstance(optimizer, OptForge):
        wrapper, optimizer = optimizer, optimizer.optimizer
    return wrapper, optimizer


@contextmanager
def evaluation_weights(engine: Any) -> Iterator[None]:
    """Evaluate and export with the weights that are meant for it.

    Inside, the model's weights are Schedule-Free's average on every stage; afterwards they are the training weights again,
    bit for bit. Other rules leave the weights alone. All ranks enter and leave together. `step()` and saving a training
    checkpoint inside raise RuntimeError.

    Args:
        engine: what deepspeed.initialize or Accelerator.prepare returned; or an optimizer: the HF Trainer's
            ``trainer.optimizer``, or an OptForge in plain PyTorch.
    """
    wrapper, optimizer = _base_optimizer(engine)
    if not optimizer.averages_weights:
        yield
        return
    # DeepSpeed fills the groups to save a checkpoint, and leaves them so when the optimizer refuses.
    stepped = [list(group["params"]) for group in optimizer.param_groups]
    enter_averages(optimizer)
    try:
        with torch.no_grad():
            refresh_weights(wrapper)
        yield
    finally:
        for group, tensors in zip(optimizer.param_groups, stepped, strict=True):
            group["params"] = tensors
        leave_averages(optimizer)
        with torch.no_grad():
            refresh_weights(wrapper)


def load_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed configuration as a dict. Raises ConfigError for a file that is missing or is no JSON object."""
    if isinstance(config, Mapping):
        return dict(config)
    try:
        loaded = json.loads(Path(config).read_text())
    except OSError as error:
        raise ConfigError(f"{config}: {error.strerror}; allowed: a DeepSpeed configuration file") from None
    except ValueError as error:
        raise ConfigError(f"{config}: not JSON ({error}); allowed: a DeepSpeed configuration file") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{config}: got a {type(loaded).__name__}; allowed: a JSON object")
    return loaded


def optimizer_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The "params" of the optimizer section; ``config`` may also be those params alone. Raises ConfigError."""
    return _params(config, "optimizer", OptForge.__name__) if "optimizer" in config else config


def scheduler_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The "params" of the scheduler section; ``config`` may also be those params alone. Raises ConfigError."""
    if "scheduler" in config:
        return _params(config, "scheduler", OptForgeSchedule.__name__)
    if "optimizer" in config or "train_batch_size" in config:
        raise ConfigError('scheduler: missing; allowed: {"type": "OptForgeSchedule", "params": {...}}')
    return config


def check(config: Mapping[str, Any], filled: bool = True) -> None:
    """Validate what OptForge reads of a DeepSpeed configuration, as far as that is possible without a model.

    Args:
        config: the whole configuration.
        filled: False for a file: the "auto" values that frameworks and train.py fill are accepted.

    Raises:
        ConfigError: bad "params", a DeepSpeed scheduler that would flatten different learning rates to one, a ZeRO
            feature that hides the optimizer's slices.
    """
    if "optimizer" not in config:
        raise ConfigError('optimizer: missing; allowed: {"type": "OptForge", "params": {"name": ...}}')
    params = _params(config, "optimizer", OptForge.__name__)
    optimizer = OptimizerConfig(params if filled else _without_auto(params, ("lr", "betas", "eps", "weight_decay")))
    check_beside_optimizer(config, _rates(optimizer), filled)


def check_beside_optimizer(config: Mapping[str, Any], rates: Mapping[str, float], filled: bool = True) -> None:
    """As `check`, but for the optimizer section. ``rates``: the learning rates that will be asked for, by group or role."""
    if "scheduler" in config:
        kind = _section(config, "scheduler").get("type")
        if kind == OptForgeSchedule.__name__:
            section = _params(config, "scheduler", OptForgeSchedule.__name__)
            if not filled:
                length = {"total_num_steps": sys.maxsize} if section.get("total_num_steps") == "auto" else {}
                section = {**_without_auto(section, ("total_num_steps", "warmup_num_steps")), **length}
            schedule_config(section)
        elif kind is None:
            raise ConfigError("scheduler.type: got None; allowed: 'OptForgeSchedule', or a scheduler that keeps ratios")
        elif kind in _FLATTENING_SCHEDULERS:
            _refuse_flattening(kind, rates)
    _refuse_zero_features(config)


def _without_auto(section: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if not (key in keys and value == "auto")}


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config[key]
    if not isinstance(section, Mapping):
        raise ConfigError(f'{key}: got {section!r}; allowed: an object {{"type": ..., "params": ...}}')
    return section


def _params(config: Mapping[str, Any], key: str, kind: str) -> Mapping[str, Any]:
    section = _section(config, key)
    if section.get("type") != kind:
        raise ConfigError(f"{key}.type: got {section.get('type')!r}; allowed: '{kind}'")
    params = section.get("params", {})
    if not isinstance(params, Mapping):
        raise ConfigError(f"{key}.params: got {params!r}; allowed: an object")
    return params


def _rates(optimizer: OptimizerConfig) -> dict[str, float]:
    """Every learning rate that the section asks for, by what asks for it."""
    rates: dict[str, float] = {role: optimizer.settings(role).lr for role in ROLES}
    rates["matrix beyond max_aspect_ratio"] = optimizer.settings("matrix", too_thin=True).lr
    for index, override in enumerate(optimizer.common.overrides):
        if "lr" in override.settings:
            rates[f"overrides[{index}]"] = override.settings["lr"]
    return rates


def _refuse_flattening(kind: str, rates: Mapping[str, float]) -> None:
    if len(set(rates.values())) > 1:
        found = ", ".join(f"{role} {rate:g}" for role, rate in rates.items())
        raise ConfigError(
            f"scheduler.type: got '{kind}', which writes one learning rate into every group, while the optimizer asks for "
            f"different ones ({found}); allowed: 'OptForgeSchedule', or another scheduler that keeps ratios"
        )


def _refuse_zero_features(config: Mapping[str, Any]) -> None:
    zero = _object(config, "zero_optimization", "zero_optimization")
    offload = _object(zero, "offload_optimizer", "zero_optimization.offload_optimizer")
    checkpoint = _object(config, "checkpoint", "checkpoint")
    here = "zero_optimization.offload_optimizer"
    problems = []
    if offload.get("device") == "nvme":
        problems.append(f"{here}.device: got 'nvme'; allowed: 'cpu' or 'none'")
    ratio = offload.get("ratio", 1.0)
    if not isinstance(ratio, int | float) or ratio < 1.0:
        problems.append(f"{here}.ratio: got {ratio!r}; allowed: 1.0 (DeepSpeed would step the rest itself)")
    if offload.get("super_offload"):
        problems.append(f"{here}.super_offload: got true; allowed: false")
    if zero.get("zenflow"):
        problems.append("zero_optimization.zenflow: got a section; allowed: none (it replaces the optimizer's step)")
    if zero.get("elastic_checkpoint"):
        problems.append("zero_optimization.elastic_checkpoint: got true; allowed: false")
    if checkpoint.get("load_universal"):
        problems.append("checkpoint.load_universal: got true; allowed: false (DeepSpeed's loader knows only Adam's state)")
    if problems:
        raise ConfigError("\n".join(problems))
    if _object(config, "bf16", "bf16").get("check_grad_overflow") is False or zero.get("compute_grad_norm") is False:
        logger.warning(
            "bf16.check_grad_overflow or zero_optimization.compute_grad_norm is false: DeepSpeed then steps with gradients "
            "that are not finite, and they reach weights and state"
        )


def _object(owner: Mapping[str, Any], key: str, path: str) -> Mapping[str, Any]:
    """A section that may be missing."""
    section = owner.get(key)
    if section is not None and not isinstance(section, Mapping):
        raise ConfigError(f"{path}: got {section!r}; allowed: an object")
    return section or {}
