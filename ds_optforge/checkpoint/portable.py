"""Save and load checkpoints that resume anywhere: with other ranks, on another ZeRO stage, with offload toggled."""

import json
import logging
import platform
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_optforge.checkpoint import files
from ds_optforge.checkpoint.chunks import Chunk, flat_chunk
from ds_optforge.checkpoint.files import Checkpoint
from ds_optforge.checkpoint.logical import (
    Loading,
    State,
    add_members,
    block_cuts,
    buffer_name,
    chunks_of,
    weight_name,
)
from ds_optforge.errors import CheckpointError
from ds_optforge.optimizer import OptForge, groups_of, refuse_while_averaged
from ds_optforge.rules.base import Rule, statistics_of
from ds_optforge.rules.registry import rule_settings
from ds_optforge.schedules import OptForgeSchedule
from ds_optforge.step.groups import GROUP
from ds_optforge.step.slices import Members, Slices
from ds_optforge.zero.engine import (
    counters,
    local_part,
    loss_scale,
    model_parallelism,
    refresh_weights,
    set_counters,
    set_loss_scale,
    stepped_tensors,
)
from ds_optforge.zero.shards import full_shape

logger = logging.getLogger("ds_optforge")

_SHOWN = 5  # problems of a kind that a message lists


@dataclass(frozen=True, slots=True, eq=False)
class _Stepped:
    """The tensors that one call of ``step()`` updates: those of a parameter group, or of a sub-group on ZeRO-3."""

    group: dict[str, Any]
    members: Members
    slices: Slices
    states: list[State]

    @property
    def name(self) -> str:
        return str(self.group[GROUP])

    @property
    def buffers(self) -> list[str]:
        return [buffer.name for buffer in self.members.rule.buffers]

    def chunks(self) -> Iterator[Chunk]:
        statistics = [(statistic.name, statistic.per) for statistic in statistics_of(self.members.rule)]
        return chunks_of(self.slices.placement, self.slices.tensors, self.states, self.buffers, statistics)


class _LiveEngine:
    """A live engine, as a checkpoint sees it. Making it is collective: all ranks do it together.

    Raises:
        CheckpointError: OptForge does not train the engine, or parallelism other than that of data cuts its parameters.
        RuntimeError: inside ``evaluation_weights``.
    """

    def __init__(self, engine: Any) -> None:
        self.engine, self.module, self.wrapper = engine, engine.module, engine.optimizer
        base = self.wrapper
        while base is not None and not isinstance(base, OptForge):
            base = getattr(base, "optimizer", None)
        if base is None:
            raise CheckpointError(f"got an engine with {type(self.wrapper).__name__}; allowed: one that OptForge trains")
        self.optimizer: OptForge = base
        self._refuse_model_parallel()
        refuse_while_averaged(base, "a checkpoint")
        self.stepped = [self._stepped(group, tensors) for group, tensors in stepped_tensors(self.wrapper, base.param_groups)]

    def _refuse_model_parallel(self) -> None:
        """Raise CheckpointError where ranks have different tensors under the same name."""
        if found := model_parallelism(self.engine):
            raise CheckpointError(f"got {found}; allowed: data parallelism alone (engine.save_checkpoint saves the others)")

    def _stepped(self, group: dict[str, Any], tensors: list[Tensor]) -> _Stepped:
        groups = groups_of(self.optimizer)
        slices = groups.slices_of(group, tensors)
        states: list[State] = [self.optimizer.state.get(tensor, {}) for tensor in tensors]
        return _Stepped(group, groups[group], slices, states)

    @property
    def untrained(self) -> dict[str, tuple[Tensor, int, int]]:
        """(values, start, elements of the whole) of the frozen parameters and persistent buffers that this rank holds."""
        trained = set(chain.from_iterable(stepped.slices.placement.layout.names for stepped in self.stepped))
        named = {n: local_part(p) for n, p in self.module.named_parameters() if n not in trained and full_shape(p).numel()}
        return named | {
            name: (buffer, 0, buffer.numel()) for name, buffer in _persistent_buffers(self.module) if buffer.numel()
        }

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The whole shape of each parameter and persistent buffer."""
        shapes = {name: list(full_shape(parameter)) for name, parameter in self.module.named_parameters()}
        return shapes | {name: list(buffer.shape) for name, buffer in _persistent_buffers(self.module)}

    def chunks(self) -> list[Chunk]:
        """All chunks of this rank: weights, state, frozen parameters, buffers and random states."""
        chunks = list(chain.from_iterable(stepped.chunks() for stepped in self.stepped))
        for name, (values, start, numel) in self.untrained.items():
            if values.numel():
                chunks.append(flat_chunk(weight_name(name), numel, start, values.reshape(-1)))
        for kind, state in _random_states().items():
            chunks.append(flat_chunk(f"random/{_rank()}/{kind}", state.numel(), 0, state))
        return chunks

    def manifest(self, client_state: Mapping[str, Any] | None) -> dict[str, Any]:
        """All data that are no tensors. Raises CheckpointError for values that JSON cannot hold."""
        scheduler = getattr(self.engine, "lr_scheduler", None)
        return {
            "shapes": self.shapes,
            "groups": self._groups(),
            "block_cuts": self._block_cuts(),
            "counters": counters(self.engine),
            "loss_scale": loss_scale(self.wrapper),
            "scheduler": _plain(scheduler.state_dict(), f"the state of {type(scheduler).__name__}") if scheduler else None,
            "client_state": _plain(dict(client_state or {}), "client_state"),
            "written_by": {
                "world_size": dist.get_world_size() if dist.is_initialized() else 1,
                "zero_stage": self.engine.zero_optimization_stage(),
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
        }

    def _groups(self) -> dict[str, Any]:
        groups: dict[str, Any] = {}
        for stepped in self.stepped:
            rule, members = stepped.members.settings.rule, stepped.slices.placement.layout.names
            add_members(groups, stepped.name, rule, stepped.group, stepped.states[0], members)
        plain: dict[str, Any] = _plain(groups, "the parameter groups")
        return plain

    def _block_cuts(self) -> dict[str, list[int]]:
        cuts: dict[str, list[int]] = {}
        for stepped in self.stepped:
            if stepped.members.settings.state_dtype == "8bit":
                placement = stepped.slices.placement
                cuts |= {name: block_cuts(placement, index) for index, name in enumerate(placement.layout.names)}
        return {name: found for name, found in cuts.items() if found}


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
    live = _LiveEngine(engine)
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
    live = _LiveEngine(engine)
    with _agreeing() as problems:
        checkpoint = Checkpoint(Path(folder))
        problems += checkpoint.damage(_rank(), dist.get_world_size() if dist.is_initialized() else 1)
        problems += [] if problems else _differences(live, checkpoint, strict)
        fresh = set() if problems else _fresh_groups(live, checkpoint)
    _refuse_different(checkpoint)
    _restore(live, checkpoint, fresh)
    client_state: dict[str, Any] = checkpoint.manifest["client_state"]
    return client_state


def _differences(live: _LiveEngine, checkpoint: Checkpoint, strict: bool) -> list[str]:
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
    own: dict[str, list[str]] = {}
    for stepped in live.stepped:
        own.setdefault(stepped.name, []).extend(stepped.slices.placement.layout.names)
    if found.keys() != own.keys():
        problems.append(f"parameter groups: got {sorted(found)}; allowed: this run's, {sorted(own)} (or strict=False)")
    else:
        problems += [
            f"parameter group '{name}': got the parameters {_few(set(found[name]) - set(members))} and not "
            f"{_few(set(members) - set(found[name]))}; allowed: those of this run (or strict=False)"
            for name, members in own.items()
            if found[name] != sorted(members)
        ]
    return [f"{checkpoint.folder}: {problem}" for problem in problems]


def _missing_rules(checkpoint: Checkpoint) -> Iterator[str]:
    for name, group in checkpoint.manifest["groups"].items():
        if rule_settings(group["rule"]) is None:
            yield (
                f"parameter group '{name}': was trained by the rule '{group['rule']}', which nothing here offers; allowed: "
                "install the package of that rule, or import it (or strict=False, which starts the group's state afresh)"
            )


def _other_scheduler(live: _LiveEngine, saved: Mapping[str, Any] | None) -> list[str]:
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


def _restore(live: _LiveEngine, checkpoint: Checkpoint, fresh: set[str]) -> None:
    """Change the engine to the checkpoint's state. Call it after all checks."""
    manifest, source_of = checkpoint.manifest, _source_of(checkpoint)
    loading = Loading(checkpoint, manifest["block_cuts"])
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
                loading.into(target, weight_name(name), start)
            checkpoint.read(loading.requests)
            loading.finish()
            random_states = _saved_random_states(checkpoint)
        refresh_weights(live.wrapper)
    _restore_engine(live, manifest, fresh)
    _set_random_states(random_states)


def _fresh_groups(live: _LiveEngine, checkpoint: Checkpoint) -> set[str]:
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


def _allocate(optimizer: OptForge, stepped: _Stepped, source: Mapping[str, Any], loading: Loading) -> None:
    states: list[State] = [optimizer.state[tensor] for tensor in stepped.slices.tensors]
    stepped.slices.allocate(stepped.members.rule, states)
    for state in states:
        state["step"].fill_(source["step"])
        state.update(source["scalars"])
    loading.into_state(stepped.slices, states, stepped.members.rule)


def _restore_engine(live: _LiveEngine, manifest: Mapping[str, Any], fresh: set[str]) -> None:
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


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _plain(value: Any, what: str) -> Any:
    """Return plain data as JSON gives it back. Raises CheckpointError for values that it would change or refuse."""
    allowed = "allowed: numbers, strings, lists, and dicts with strings as keys"
    if odd := list(_odd_keys(value)):
        raise CheckpointError(f"{what} cannot be saved: got the key {odd[0]!r}; {allowed}")
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what} cannot be saved: {error}; {allowed}") from None


def _odd_keys(value: Any) -> Iterator[Any]:
    """Keys that JSON would turn into strings."""
    if isinstance(value, Mapping):
        yield from (key for key in value if not isinstance(key, str))
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from _odd_keys(inner)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _random_states() -> dict[str, Tensor]:
    """The states of this rank's random generators, as uint8 tensors."""
    version, keys, gauss = random.getstate()
    kind, words, *rest = cast("tuple[Any, ...]", numpy.random.get_state(legacy=True))
    states = {
        "torch": torch.get_rng_state(),
        "python": _bytes([version, keys, gauss]),
        "numpy": _bytes([kind, words.tolist(), *rest]),
    }
    if torch.accelerator.is_available():
        states["accelerator"] = torch.get_device_module().get_rng_state()
    return states


def _bytes(value: Sequence[Any]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _saved_random_states(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The saved random states of this rank; none for a rank that the checkpoint lacks, which keeps its own."""
    names = {kind: f"random/{_rank()}/{kind}" for kind in _random_states()}
    return {kind: checkpoint.whole(name) for kind, name in names.items() if name in checkpoint.tensors}


def _set_random_states(found: Mapping[str, Tensor]) -> None:
    if "torch" in found:
        torch.set_rng_state(found["torch"])
    if "python" in found:
        version, keys, gauss = json.loads(found["python"].numpy().tobytes())
        random.setstate((version, tuple(keys), gauss))
    if "numpy" in found:
        kind, words, *rest = json.loads(found["numpy"].numpy().tobytes())
        numpy.random.set_state((kind, numpy.array(words, dtype=numpy.uint32), *rest))
    if "accelerator" in found:
        torch.get_device_module().set_rng_state(found["accelerator"])


@contextmanager
def _agreeing() -> Iterator[list[str]]:
    """Raise CheckpointError on all ranks if, on any of them, an error was raised or the yielded list got a problem."""
    problems: list[str] = []
    try:
        yield problems
    except CheckpointError as error:
        problems.append(str(error))
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        problems.append(f"rank {_rank()}: {type(error).__name__}: {error}")
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
