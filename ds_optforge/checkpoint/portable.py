"""Save and load checkpoints that resume anywhere: with other ranks, on another ZeRO stage, with offload toggled."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_optforge.checkpoint import files
from ds_optforge.checkpoint.files import Checkpoint
from ds_optforge.checkpoint.incumbents import FOREIGN
from ds_optforge.checkpoint.live import LiveEngine, Stepped, rank
from ds_optforge.checkpoint.logical import Loading, State, absmax_of, logical_group, misfits
from ds_optforge.checkpoint.positions import problem_of, set_position
from ds_optforge.checkpoint.random_states import saved_random_states, set_random_states
from ds_optforge.checkpoint.resumption import Lacking, Resumption, averages_of, resumption_of
from ds_optforge.errors import CheckpointError
from ds_optforge.optimizer import OptForge, remember_steps
from ds_optforge.rules.around import UPDATE_AVERAGE
from ds_optforge.rules.registry import rule_settings
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
            state is not complete in it starts afresh, with this run's settings. Not needed for what ``ds-optforge convert``
            made of another optimizer's checkpoint, whose parameters are compared in place of its groups.

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
    with _agreeing() as problems:  # of files that some rank has found to be sound
        problems += misfits(checkpoint)
        problems += [] if problems else [*_differences(live, checkpoint, strict), *_for_other_matrices(live, checkpoint)]
        resumptions = [] if problems else _resumptions(live, checkpoint)
        problems += _lost_lookaheads(live, checkpoint, resumptions)
        problems += _lacking(checkpoint, resumptions) if strict else ()
    _refuse_different(checkpoint)
    fresh = live.on_any_stage({name for name, resumption in resumptions if isinstance(resumption, str)})
    _report(checkpoint, resumptions)
    _restore(live, checkpoint, resumptions, fresh)
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
    scheduler, manifest = getattr(live.engine, "lr_scheduler", None), checkpoint.manifest
    if problem := problem_of(scheduler, manifest["scheduler"], _same_groups(live, manifest)):
        problems.append(problem)
    if strict:
        problems += _missing_rules(checkpoint)
    if problems or not strict:
        return [f"{checkpoint.folder}: {problem}" for problem in problems]
    found = {name: sorted(group["members"]) for name, group in _saved_groups(checkpoint.manifest).items()}
    own = {name: sorted(group["members"]) for name, group in live.groups.items()}
    if FOREIGN in checkpoint.manifest:  # whose groups are none of ours
        problems += _other_trained(*(set(chain.from_iterable(groups.values())) for groups in (found, own)))
    elif found.keys() != own.keys():
        problems.append(f"parameter groups: got {sorted(found)}; allowed: this run's, {sorted(own)} (or strict=False)")
    else:
        problems += [
            f"parameter group '{name}': got the parameters {_few(set(found[name]) - set(members))} and not "
            f"{_few(set(members) - set(found[name]))}; allowed: those of this run (or strict=False)"
            for name, members in own.items()
            if found[name] != members
        ]
    return [f"{checkpoint.folder}: {problem}" for problem in problems]


def _other_trained(found: set[str], own: set[str]) -> Iterator[str]:
    """Yield a line for what only one of the two runs trains."""
    if found != own:
        yield (
            f"trained parameters: got {_few(found - own)}, which this run does not train, and not {_few(own - found)}; "
            "allowed: those of this run (or strict=False)"
        )


def _for_other_matrices(live: LiveEngine, checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a line where state cannot be cut as this run's, and for each factor of another matrix than this run's."""
    yield from _blocks_for_shards(live, checkpoint)
    for stepped in live.stepped:
        for name, numel in stepped.factor_sizes(live.shards).items():
            if name in checkpoint.tensors and (found := checkpoint.tensors[name][0]) != numel:
                yield (
                    f"{checkpoint.folder}: '{name}' holds {found} elements; allowed: {numel}, of this run's matrix: the same "
                    "split and heads"
                )


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


def _same_groups(live: LiveEngine, manifest: Mapping[str, Any]) -> bool:
    return bool(_saved_groups(manifest).keys() == live.groups.keys())


def _saved_groups(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {logical_group(name): group for name, group in manifest["groups"].items()}


def _few(names: set[str]) -> str:
    return "[" + ", ".join(sorted(names)[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "") + "]"


def _restore(
    live: LiveEngine, checkpoint: Checkpoint, resumptions: Sequence[tuple[str, Resumption | str]], fresh: set[str]
) -> None:
    """Change the engine to the checkpoint's state. Call it after all checks."""
    manifest = checkpoint.manifest
    loading = Loading(checkpoint, manifest["block_cuts"], live.shards)
    with torch.no_grad():
        with _agreeing():
            for stepped in live.stepped:
                loading.into_weights(stepped.slices)
                for tensor in stepped.slices.tensors:
                    live.optimizer.state.pop(tensor, None)
            for stepped, (_, resumption) in zip(live.stepped, resumptions, strict=True):
                if stepped.name not in fresh and not isinstance(resumption, str):
                    _allocate(live.optimizer, stepped, resumption, loading)
            remember_steps(live.optimizer)
            for name, (target, start, _) in live.untrained.items():
                loading.into(target, name, start)
            checkpoint.read(loading.requests)
            loading.finish()
            random_states = saved_random_states(checkpoint, rank())
        refresh_weights(live.wrapper)
    _restore_engine(live, manifest, fresh)
    set_random_states(random_states)


def _resumptions(live: LiveEngine, checkpoint: Checkpoint) -> list[tuple[str, Resumption | str]]:
    """(group, what it takes of the saved state or why it starts afresh) of each call of ``step()``."""
    source_of = {name: group for group in checkpoint.manifest["groups"].values() for name in group["members"]}
    return [
        (
            stepped.name,
            resumption_of(
                stepped.slices.placement.layout.names,
                stepped.members.rule,
                source_of,
                checkpoint.tensors,
                stepped.members.around.buffers,
                list(stepped.factor_sizes(live.shards)),
            ),
        )
        for stepped in live.stepped
    ]


def _lost_lookaheads(
    live: LiveEngine, checkpoint: Checkpoint, resumptions: Sequence[tuple[str, Resumption | str]]
) -> Iterator[str]:
    """Yield a line for a group whose saved weights are ahead of the trained ones by state that this run would not take."""
    ahead = {
        name: group["step"]
        for group in checkpoint.manifest["groups"].values()
        for name in group["members"]
        if group["scalars"].get("lookahead")
    }
    for stepped, (name, found) in zip(live.stepped, resumptions, strict=False):
        names = [parameter for parameter in stepped.slices.placement.layout.names if parameter in ahead]
        taken = UPDATE_AVERAGE in stepped.members.around.buffers
        if names and not (taken and isinstance(found, Resumption) and UPDATE_AVERAGE.name not in found.anew):
            yield (
                f"{checkpoint.folder}: parameter group '{name}': the weights are ahead of the trained ones by ema_nesterov's "
                f"'{UPDATE_AVERAGE.name}', which this run would not take; allowed: \"ema_nesterov\" and the rule of the run "
                "that saved it; to go on without, end the look-ahead first (stop)"
            )


def _lacking(checkpoint: Checkpoint, resumptions: Sequence[tuple[str, Resumption | str]]) -> Iterator[str]:
    """Yield a line for each of the checkpoint's own groups that it has otherwise: the rule chose rows in one run alone."""
    for name, found in dict(resumptions).items():
        if isinstance(found, Lacking) and FOREIGN not in checkpoint.manifest:
            yield (
                f"{checkpoint.folder}: parameter group '{name}': {found}; allowed: this run's (was sharding.rows set in one of "
                "the two runs alone?), or strict=False, which starts the group's state afresh"
            )


def _report(checkpoint: Checkpoint, resumptions: Sequence[tuple[str, Resumption | str]]) -> None:
    """Log, once for each group, what does not go on as it was saved."""
    by_group = dict(sorted(resumptions, key=lambda item: isinstance(item[1], str)))  # a reason of any sub-group counts
    for name, found in by_group.items():
        if isinstance(found, str):
            logger.info("%s: the state of '%s' starts afresh: %s", checkpoint.folder, name, found)
        elif found.note:
            logger.info("%s: '%s' goes on from step %d with %s", checkpoint.folder, name, found.step, found.note)


def _allocate(optimizer: OptForge, stepped: Stepped, resumption: Resumption, loading: Loading) -> None:
    states: list[State] = [optimizer.state[tensor] for tensor in stepped.slices.tensors]
    stepped.slices.allocate(stepped.members, states)
    for state in states:
        state["step"].fill_(resumption.step)
        state.update(resumption.scalars)
    saved = partial(resumption.key, averages=averages_of(stepped.members.rule))
    loading.into_state(stepped.slices, states, stepped.members, saved)


def _restore_engine(live: LiveEngine, manifest: Mapping[str, Any], fresh: set[str]) -> None:
    groups = _saved_groups(manifest)
    for group in live.optimizer.param_groups:
        name = logical_group(group[GROUP])
        saved = groups.get(name)
        if saved is not None and name not in fresh:
            values = saved["hyperparameters"].items()
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in values})
    set_counters(live.engine, manifest["counters"])
    set_loss_scale(live.wrapper, manifest["loss_scale"])
    scheduler = getattr(live.engine, "lr_scheduler", None)
    if scheduler is not None and manifest["scheduler"] is not None:
        set_position(scheduler, manifest["scheduler"], _same_groups(live, manifest))


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
