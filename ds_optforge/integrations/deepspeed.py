"""Training through DeepSpeed: `register` makes the names in JSON known, `initialize` is register + deepspeed.initialize."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_optforge.config.deepspeed import check, check_beside_optimizer, load_config
from ds_optforge.config.refused import BUILT_LATER, ULYSSES, setting
from ds_optforge.errors import ConfigError
from ds_optforge.optimizer import OptForge, enter_averages, leave_averages, reach_model, send_telemetry
from ds_optforge.routing.tags import tag
from ds_optforge.schedules import OptForgeSchedule
from ds_optforge.step.groups import GROUP
from ds_optforge.zero.engine import make_trusted, refresh_weights, refuse_unwritable_weights
from ds_optforge.zero.layout import refuse_unfinished_gathers
from ds_optforge.zero.pipeline import is_pipeline
from ds_optforge.zero.versions import require_supported_deepspeed

logger = logging.getLogger("ds_optforge")


def publish_names() -> None:
    """Make "type": "OptForge" and "OptForgeSchedule" known: DeepSpeed looks for unknown types in these torch modules."""
    torch.optim.OptForge = OptForge  # type: ignore[attr-defined]
    torch.optim.lr_scheduler.OptForgeSchedule = OptForgeSchedule  # type: ignore[attr-defined]


def register_with_deepspeed() -> None:
    """Publish the names, and enter both classes into DeepSpeed's lists of optimizers and schedulers that it trusts."""
    publish_names()
    make_trusted(OptForge, OptForgeSchedule)


def register(model: nn.Module) -> None:
    """Make ``model`` trainable with "type": "OptForge" under DeepSpeed, Accelerate and the HF Trainer.

    It tags each parameter with its name and its place in the module tree, which are gone once ZeRO has flattened it, and
    enters OptForge into DeepSpeed's lists of known optimizers and schedulers. Call it once, before the engine is built. What is
    added to ``model`` or replaced in it later (by PEFT, AutoEP or AutoTP) is tagged when the optimizer is built.

    Raises:
        ImportError: DeepSpeed's version is not supported.
    """
    register_with_deepspeed()
    tag(model)


def initialize(
    *, model: nn.Module, config: str | Path | Mapping[str, Any], optimizer: Any = None, **arguments: Any
) -> tuple[Any, ...]:
    """Check ``config``, register ``model`` and call ``deepspeed.initialize``.

    Args:
        model: the model to train.
        config: a DeepSpeed configuration, as a dict or a path to its JSON file.
        optimizer: an OptForge (`build_optimizer`, `MuonWithAuxAdam`) or a function of the parameters that makes one, where
            ``config`` has no "optimizer" section.
        arguments: other arguments of deepspeed.initialize.

    Returns:
        (engine, optimizer, dataloader, scheduler), as deepspeed.initialize returns them.

    Raises:
        ConfigError: the configuration is invalid or contradicts the arguments; no engine has been built then.
        ImportError: DeepSpeed's version is not supported.
        LayoutError: an engine whose first step DeepSpeed itself cannot end, or that would train on what has not arrived: see
            `refuse_unwritable_weights` and `refuse_unfinished_gathers`.
    """
    require_supported_deepspeed()
    import deepspeed

    loaded = load_config(config)
    if optimizer is None:
        check(loaded)
    else:
        loaded = beside_object(loaded, optimizer)
    _refuse_beside_pipeline(model, loaded)
    if "scheduler" in loaded and arguments.get("lr_scheduler") is not None:
        raise ConfigError(f"scheduler: {_BOTH.format(what='scheduler', argument='lr_scheduler')}")
    if arguments.get("mesh_param") is not None:
        raise ConfigError(f"mesh_param: got {arguments['mesh_param']!r}; allowed: {ULYSSES}")
    register(model)
    result: tuple[Any, ...] = deepspeed.initialize(model=model, config=loaded, optimizer=optimizer, **arguments)
    refuse_unwritable_weights(result[0])
    refuse_unfinished_gathers(result[0].optimizer)
    send_telemetry(base_optimizer(result[0])[1], result[0].monitor)
    return result


_BOTH = (
    'got a "{what}" section in the configuration and the argument {argument}; allowed: one of them (remove the section to '
    "train with the object, or the argument to train with the section)"
)


def beside_object(config: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """The configuration, checked for use with an optimizer object, beside which DeepSpeed ignores an "optimizer" section."""
    if "optimizer" in config:
        raise ConfigError(f"optimizer: {_BOTH.format(what='optimizer', argument='optimizer')}")
    if isinstance(optimizer, torch.optim.Optimizer) and not isinstance(optimizer, OptForge):
        raise ConfigError(
            f"optimizer: got an object of {type(optimizer).__name__}; allowed: an OptForge (build_optimizer, MuonWithAuxAdam)"
        )
    if isinstance(optimizer, OptForge) and setting(config, "expert_parallel.enabled"):
        raise ConfigError(
            "expert_parallel.enabled: got true with an optimizer object, which holds the parameters that DeepSpeed is going to "
            f"replace; allowed: {BUILT_LATER}"
        )
    groups = optimizer.param_groups if isinstance(optimizer, OptForge) else []
    check_beside_optimizer(config, {group[GROUP]: group["lr"] for group in groups})
    # DeepSpeed refuses every optimizer object but its own Adam and Lion on the CPU, unless told so.
    return {"zero_force_ds_cpu_optimizer": False, **config}


def _refuse_beside_pipeline(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Refuse before the engine is built what DeepSpeed refuses in the middle of it, or hangs in."""
    if not is_pipeline(model):
        return
    stage = setting(config, "zero_optimization.stage") or 0
    if stage not in (0, 1):
        raise ConfigError(f"zero_optimization.stage: got {stage} with a PipelineModule; allowed: 0, 1 (DeepSpeed has no other)")
    tensor_ranks = setting(config, "tensor_parallel.autotp_size") or 0
    if tensor_ranks > 1:
        raise ConfigError(
            f"tensor_parallel.autotp_size: got {tensor_ranks} with a PipelineModule; allowed: 0 or 1 (DeepSpeed builds no such "
            "engine), or layers that cut their weights themselves, with topology=PipeModelDataParallelTopology(...)"
        )


def base_optimizer(engine: Any) -> tuple[Any, OptForge]:
    """(the wrapper around it, the OptForge) under an engine's or a framework's wrappers.

    Raises:
        ConfigError: another optimizer is there.
    """
    wrapper = optimizer = engine
    while not isinstance(optimizer, OptForge):
        if not hasattr(optimizer, "optimizer"):
            raise ConfigError(f"optimizer: got a {type(optimizer).__name__}; allowed: an OptForge, or an engine that steps one")
        wrapper, optimizer = optimizer, optimizer.optimizer
    return wrapper, optimizer


def reach_weights(engine: Any) -> OptForge:
    """Let ``eval()`` and ``train()`` of the OptForge under ``engine`` reach the model's weights; return that OptForge.

    Args:
        engine: an engine, or a framework's wrapper of its optimizer.
    """
    wrapper, optimizer = base_optimizer(engine)
    reach_model(optimizer, partial(torch.no_grad()(refresh_weights), wrapper))
    return optimizer


@contextmanager
def evaluation_weights(engine: Any) -> Iterator[None]:
    """Put the weights for evaluation and export into the model, and take them out again at the end of the ``with`` block.

    Inside, the model's weights are the averages of ``"average"``, or Schedule-Free's, or those without the look-ahead of
    ``"ema_nesterov"``, on every stage; afterwards they are the training weights again, bit for bit. Others are left alone.
    Entering and leaving are collective.

    Args:
        engine: the engine that deepspeed.initialize or Accelerator.prepare returned; or an optimizer: the HF Trainer's
            ``trainer.optimizer``, or an OptForge in plain PyTorch.

    Raises:
        RuntimeError: inside the block, by `step()` and by saving a training checkpoint.
    """
    wrapper, optimizer = base_optimizer(engine)
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
