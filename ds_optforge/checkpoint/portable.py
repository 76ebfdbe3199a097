"""Save and load checkpoints that resume anywhere: with other ranks, on another ZeRO stage, with offload toggled."""

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_optforge.checkpoint import files
from ds_optforge.checkpoint.files import Checkpoint
from ds_optforge.checkpoint.live import LiveEngine, Stepped, rank
from ds_optforge.checkpoint.logical import (
    Loading,
    State,
    absmax_of,
    buffer_name,
)
from ds_optforge.checkpoint.random_states import saved_random_states, set_random_states
from ds_optforge.errors import CheckpointError
from ds_optforge.optimizer import OptForge
from ds_optforge.rules.base import Rule, statistics_of
from ds_optforge.rules.registry import rule_settings
from ds_optforge.schedules import OptForgeSchedule
from ds_optforge.step.groups import GROUP
from ds_optforge.zero.engine import (
    refresh_weights,
    set_counters,
    set_loss_scale,
)

logger = logging.getLogger("ds_optforge")

_SHOWN = 5  # problems of a kind that a message lists


def save_checkpoint(
    engine: Any, folder: str | Path, client_state: Mapping[str, Any] | None = None, wait: bool = True
) -> Future[None] | None:
    """Write a portable checkpoint: weights, optimizer state, schedule, loss scale, counters and random states.

    All ranks call it together, between steps. The folder appears when everything in it is on the disk.

    Args:
        engine: what ``deepspeed.initialize`` or ``Accelerator.prepare`` returned.
        folder: the folder to make, on a file system that all hosts share; it must not exist.
        client_state: plain data that `load_checkpoint` returns again.
        wait: False returns as soon as everything has been copied to host memory. Training continues while a thread writes; the
            returned future ends when the checkpoint is complete, and ``result()`` must be called before the process ends.

    Returns:
        None, or the future where ``wait`` is False.

    Raises:
        CheckpointError: on all ranks: the checkpoint was not written, and nothing is left of it.
        RuntimeError: inside ``evaluation_weights``.
    """
    live = LiveEngine(engine)
    path = Path(folder)
    with _agreeing():
        chunks, manifest = live.chunks(), live.manifest(client_state)
    if wait:
        files.write(path, chunks, manifest)
        return None
    return files.write_in_background(path, chunks, manifest)


def load_checkpoint(engine: Any, folder: str | Path, strict: bool = True) -> dict[str, Any]:
    """Resume from a portable checkpoint, whatever ranks, ZeRO stage, offload or state format wrote it.

    All ranks call it together. Nothing is changed before every file has been verified.

    Args:
        engine: an engine with the same model, trained by OptForge.
        folder: the folder that `save_checkpoint` or ``ds-optforge convert`` wrote.
        strict: False also takes a checkpoint of other parameter groups (another optimizer, other overrides): a group whose
            state is not complete in it starts afresh, with this run's settings.

    Returns:
        The ``client_state`` that was saved.

    Raises:
        CheckpointError: on all ranks: the checkpoint is damaged, or of another model or (``strict``) of other groups; then
            nothing has changed. Or memory or the disk failed while it was read; then the engine must not be used.
        RuntimeError: inside ``evaluation_weights``.
    """
    live = LiveEngine(engine)
    with _agreeing() as problems:
        checkpoint = Checkpoint(Path(folder))
        problems += checkpoint.damage(rank(), dist.get_world_size() if dist.is_initialized() else 1)
        problems += [] if problems else [*_differences(live, checkpoint, strict), *_blocks_for_shards(live, checkpoint)]
        fresh = set() if problems else _fresh_groups(live, checkpoint)
    _refuse_different(checkpoint)
    _restore(live, checkpoint, live.on_any_stage(fresh))
    client_state: dict[str, Any] = checkpoint.manifest["client_state"]
    return client_state


def _differences(live: LiveEngine, checkpoint: Checkpoint, strict: bool) -> list[str]:
    """Compare model, scheduler and (``strict``) parameter groups with the checkpoint's; return a line per difference."""
    saved, shapes = checkpoint.manifest["shapes"], live.shapes
    problems = [f"model: '{name}' is missing in the checkpoint" for name in shapes if name not in saved]
    problems += [f"model: the checkpoint holds '{name}', which this model lacks" for name in saved if name not in shapes]
    problems += [
        f"model: '{name}' has shape {saved[name]} in the checkpoint; allowed: {shape}"
        for name, shape in shapes.items()
        if name in saved and saved[name] != shape
    ]
    problems += _other_scheduler(live, checkpoint.manifest["scheduler"])
    if strict:
        problems += _missing_rules(checkpoint)
    if problems or not strict:
        return [f"{checkpoint.folder}: {problem}" for problem in problems]
    found = {name: sorted(group["members"]) for name, group in checkpoint.manifest["groups"].items()}
    own = {name: sorted(group["members"]) for name, group in live.groups.items()}
    if found.keys() != own.keys():
        problems.append(f"parameter groups: got {sorted(found)}; allowed: this run's, {sorted(own)} (or strict=False)")
    else:
        problems += [
            f"parameter group '{name}': got the parameters {_few(set(found[name]) - set(members))} and not "
            f"{_few(set(members) - set(found[name]))}; allowed: those of this run (or strict=False)"
            for name, members in own.items()
            if found[name] != members
        ]
    return [f"{checkpoint.folder}: {problem}" for problem in problems]


def _blocks_for_shards(live: LiveEngine, checkpoint: Checkpoint) -> Iterator[str]:
    blocks = [name for name in checkpoint.tensors if name.endswith(absmax_of(""))]
    if live.shards.of and blocks:
        yield (
            f"{checkpoint.folder}: '{blocks[0]}' is 8-bit state, whose blocks tensor parallelism would cut; allowed: a "
            "checkpoint with state_dtype float32 or bfloat16"
        )


def _missing_rules(checkpoint: Checkpoint) -> Iterator[str]:
    for name, group in checkpoint.manifest["groups"].items():
        if rule_settings(group["rule"]) is None:
            yield (
                f"parameter group '{name}': was trained by the rule '{group['rule']}', which nothing here offers; allowed: "
                "install the package of that rule, or import it (or strict=False, which starts the group's state afresh)"
            )


def _other_scheduler(live: LiveEngine, saved: Mapping[str, Any] | None) -> list[str]:
    scheduler = getattr(live.engine, "lr_scheduler", None)
    if scheduler is None or saved is None:
        return []
    needed = {"last_epoch"} if isinstance(scheduler, OptForgeSchedule) else set(scheduler.state_dict())
    if needed <= saved.keys():
        return []
    return [f"scheduler: got a state of {sorted(saved)}; allowed: {sorted(needed)}, which {type(scheduler).__name__} reads"]


def _few(names: set[str]) -> str:
    return "[" + ", ".join(sorted(names)[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "") + "]"


def _source_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The saved group of each parameter."""
    return {name: group for group in checkpoint.manifest["groups"].values() for name in group["members"]}


def _restore(live: LiveEngine, checkpoint: Checkpoint, fresh: set[str]) -> None:
    """Change the engine to the checkpoint's state. Call it after all checks."""
    manifest, source_of = checkpoint.manifest, _source_of(checkpoint)
    loading = Loading(checkpoint, manifest["block_cuts"], live.shards)
    with torch.no_grad():
        with _agreeing():
            for stepped in live.stepped:
                loading.into_weights(stepped.slices)
                for tensor in stepped.slices.tensors:
                    live.optimizer.state.pop(tensor, None)
            for stepped in live.stepped:
                if stepped.name not in fresh:
                    _allocate(live.optimizer, stepped, source_of[stepped.slices.placement.layout.names[0]], loading)
            for name, (target, start, _) in live.untrained.items():
                loading.into(target, name, start)
            checkpoint.read(loading.requests)
            loading.finish()
            random_states = saved_random_states(checkpoint, rank())
        refresh_weights(live.wrapper)
    _restore_engine(live, manifest, fresh)
    set_random_states(random_states)


def _fresh_groups(live: LiveEngine, checkpoint: Checkpoint) -> set[str]:
    """The groups whose state is not all in the checkpoint (none if it was saved before their first step)."""
    source_of = _source_of(checkpoint)
    reasons: dict[str, str] = {}
    for stepped in live.stepped:
        names = stepped.slices.placement.layout.names
        sources = [source_of.get(name) for name in names]
        steps = {source["step"] if source else 0 for source in sources}
        keys = [*stepped.buffers, *(statistic.name for statistic in statistics_of(stepped.members.rule))]
        missing = [buffer_name(n, k) for n in names for k in keys if buffer_name(n, k) not in checkpoint.tensors]
        others = {source["rule"] for source in sources if source and not _related(source["rule"], stepped.members.rule)}
        if others:  # its buffers may have the names of this rule's, and mean something else
            reasons[stepped.name] = f"it was trained by '{min(others)}', whose state is not of this rule's kind"
        elif steps == {0}:
            reasons[stepped.name] = "no step of it had been taken"
        elif len(steps) > 1:
            reasons[stepped.name] = f"its parameters had taken {sorted(steps)} steps"
        elif missing:
            reasons[stepped.name] = f"{len(missing)} buffers are not in the checkpoint, as '{missing[0]}'"
    for name, reason in reasons.items():
        logger.info("%s: the state of '%s' starts afresh: %s", checkpoint.folder, name, reason)
    return set(reasons)


def _related(saved: str, rule: Rule) -> bool:
    """Whether the rule of that name is this one, or one derives from the other, so that their buffers mean the same."""
    settings = rule_settings(saved)
    return settings is not None and (issubclass(settings.builds, type(rule)) or isinstance(rule, settings.builds))


def _allocate(optimizer: OptForge, stepped: Stepped, source: Mapping[str, Any], loading: Loading) -> None:
    states: list[State] = [optimizer.state[tensor] for tensor in stepped.slices.tensors]
    stepped.slices.allocate(stepped.members.rule, states)
    for state in states:
        state["step"].fill_(source["step"])
        state.update(source["scalars"])
    loading.into_state(stepped.slices, states, stepped.members.rule)


def _restore_engine(live: LiveEngine, manifest: Mapping[str, Any], fresh: set[str]) -> None:
    for group in live.optimizer.param_groups:
        saved = manifest["groups"].get(group[GROUP])
        if saved is not None and group[GROUP] not in fresh:
            values = saved["hyperparameters"].items()
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in values})
    set_counters(live.engine, manifest["counters"])
    set_loss_scale(live.wrapper, manifest["loss_scale"])
    scheduler = getattr(live.engine, "lr_scheduler", None)
    if scheduler is not None and manifest["scheduler"] is not None:
        scheduler.load_state_dict(manifest["scheduler"])


@contextmanager
def _agreeing() -> Iterator[list[str]]:
    """Raise CheckpointError on all ranks if, on any of them, an error was raised or the yielded list got a problem."""
    problems: list[str] = []
    try:
        yield problems
    except CheckpointError as error:
        problems.append(str(error))
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        problems.append(f"rank {rank()}: {type(error).__name__}: {error}")
    unique = list(dict.fromkeys(chain.from_iterable(_from_all_ranks(problems))))
    if unique:
        more = f"\n... and {len(unique) - _SHOWN} more" if len(unique) > _SHOWN else ""
        raise CheckpointError("\n".join(unique[:_SHOWN]) + more)


def _refuse_different(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where ranks opened different checkpoints, as in a folder that not all hosts see alike."""
    if len(set(_from_all_ranks(checkpoint.identity))) > 1:
        raise CheckpointError(f"{checkpoint.folder}: ranks found different checkpoints; allowed: a folder that all hosts share")


def _from_all_ranks(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    with files.own_group() as group:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, value, group=group)
    return found
