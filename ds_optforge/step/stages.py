"""The parameter groups on which the stages of a pipeline agree: the same ones, in the same order, on every stage."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ds_optforge.errors import ConfigError
from ds_optforge.routing.matching import ParameterNames
from ds_optforge.routing.roles import Route
from ds_optforge.routing.tags import tags_of
from ds_optforge.rules.settings import RuleSettings
from ds_optforge.zero.pipeline import Stage, from_all_stages, in_pipeline, replicated

Routed = tuple[Tensor, Route, str, dict[str, Any]]  # parameter, route, identifier of our group, the frameworks' keys of it


@dataclass(frozen=True, slots=True)
class GroupEntry:
    """A parameter group, as one stage tells the others of it.

    Attributes:
        identifier: of the group.
        keys: the frameworks' keys of its dict.
        settings: of its rule.
        numel: elements of its parameters, each counted on one stage only.
    """

    identifier: str
    keys: dict[str, Any]
    settings: RuleSettings
    numel: int


def stage_among(placed: Iterable[tuple[str, Tensor]]) -> Stage | None:
    """Return the stage of the pipeline whose parameters these are; None without a pipeline.

    Args:
        placed: (place in the given groups, parameter) of each.

    Raises:
        ConfigError: parameters of a PipelineModule that was not registered, so that stages cannot tell each other anything.
    """
    found = None
    for place, parameter in placed:
        tags = tags_of(parameter)
        found = found or tags.stage
        if tags.name is None and in_pipeline(parameter):
            raise ConfigError(
                f"{place}: is a parameter of a PipelineModule that is not registered; call ds_optforge.register(model) before "
                "the optimizer is made"
            )
    return found


def route_all(
    stage: Stage | None, routed: Callable[[], Iterable[Routed]], names: ParameterNames
) -> tuple[list[Routed], list[GroupEntry], ParameterNames]:
    """Route this stage's parameters, and list the groups of all stages. Collective over the ranks of a pipeline.

    Args:
        stage: this rank's; None without a pipeline.
        routed: routes the parameters.
        names: of this stage's parameters.

    Returns:
        (the routed parameters, the groups in the order in which the stages have them, the names of all stages).

    Raises:
        ConfigError: what ``routed`` raised, on all stages; a stage without parameters; groups that differ between stages.
    """
    if stage is None:
        own = list(routed())
        return own, list(_entries(own)), names
    own, failure = [], ""
    try:
        own = list(routed())
        _refuse_tied_matrices(stage, own)
    except Exception as error:  # whatever it is, the other stages must not wait for this one
        failure = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
    shared = from_all_stages(stage, failure or (list(_entries(own)), names.all))
    for index, found in enumerate(shared):
        if isinstance(found, str):
            raise ConfigError(f"stage {index} of the pipeline: {found}")
    entries = [found[0] for found in shared]
    union = _union(entries)
    _refuse_missing(entries, len(union), len(stage.placeholders))
    return own, union, ParameterNames(name for found in shared for name in found[1])


def _refuse_missing(entries: Sequence[Sequence[GroupEntry]], groups: int, placeholders: int) -> None:
    """Refuse a stage without any parameter, or with fewer groups than its placeholders can make up for."""
    for index, own in enumerate(entries):
        if not own:
            raise ConfigError(f"stage {index} of the pipeline: got no trainable parameter; allowed: at least one")
        if groups - len(own) > placeholders:
            raise ConfigError(
                f"stage {index} of the pipeline: has no parameters for {groups - len(own)} of the {groups} parameter groups of "
                f"all stages; allowed: {placeholders} (fewer overrides make fewer groups)"
            )


def take_placeholders(stage: Stage | None, count: int) -> Sequence[Tensor]:
    """Return ``count`` placeholders, ready to be given to an optimizer; the others stay frozen."""
    available = stage.placeholders if stage else ()
    for index, placeholder in enumerate(available):
        placeholder.requires_grad_(index < count)
    return available[:count]


def _entries(routed: Sequence[Routed]) -> Iterator[GroupEntry]:
    found: dict[str, GroupEntry] = {}
    for parameter, decided, identifier, keys in routed:
        entry = found.get(identifier) or GroupEntry(identifier, keys, decided.settings, 0)
        numel = 0 if replicated(parameter) else decided.numel
        found[identifier] = replace(entry, keys=keys, numel=entry.numel + numel)
    yield from found.values()


def _union(shared: Sequence[Sequence[GroupEntry]]) -> list[GroupEntry]:
    union: dict[str, GroupEntry] = {}
    first_stage: dict[str, int] = {}
    for index, entries in enumerate(shared):
        for entry in entries:
            known = union.setdefault(entry.identifier, replace(entry, numel=0))
            first = first_stage.setdefault(entry.identifier, index)
            if (known.settings, known.keys) != (entry.settings, entry.keys):
                raise ConfigError(
                    f"param_groups: '{entry.identifier}' has {known.settings!r} {known.keys} on stage {first} of the pipeline "
                    f"and {entry.settings!r} {entry.keys} on stage {index}; allowed: the same settings on all stages"
                )
            union[entry.identifier] = replace(known, numel=known.numel + entry.numel)
    return list(union.values())


def _refuse_tied_matrices(stage: Stage, routed: Sequence[Routed]) -> None:
    """Refuse a matrix rule for a weight that several stages hold: they batch it with other matrices, so the copies drift."""
    tied = {id(parameter) for parameter in stage.tied}
    for parameter, decided, _, _ in routed:
        if id(parameter) in tied and decided.settings.needs_matrix():
            raise ConfigError(
                f"{decided.name}: got rule '{decided.settings.rule}' for a weight that several stages of the pipeline hold "
                "(TiedLayerSpec), whose copies would drift apart; allowed: an elementwise rule, as of "
                f'"overrides": [{{"match": "{decided.name}", "role": "embedding"}}]'
            )
