"""The parameter groups of an OptForge: the parameters and the rule of each, and the places of its tensors."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.config.refused import BUILT_LATER, ULYSSES
from ds_optforge.config.sections import ShardingSettings
from ds_optforge.errors import ConfigError
from ds_optforge.routing.lora import refuse_without_adapters
from ds_optforge.routing.matching import ParameterNames
from ds_optforge.routing.roles import Route, log_routing, route, routing_table
from ds_optforge.routing.tags import replaced, tag_new, tags_of
from ds_optforge.rules.base import ElementwiseRule, MatrixRule, settles
from ds_optforge.rules.settings import RuleSettings
from ds_optforge.step.bind import bind_slices
from ds_optforge.step.slices import Members, Slices
from ds_optforge.step.stages import GroupEntry, Routed, route_all, stage_among, take_placeholders
from ds_optforge.zero.layout import LayoutError, expert_group_name
from ds_optforge.zero.placement import Placement
from ds_optforge.zero.shards import full_shape, ranks_of_mesh_sequence

GROUP = "optforge_group"  # key of a parameter group's dict that holds its identifier
KEYS_OF_FRAMEWORKS = ("params", "moe", "name")


class Groups:
    """The groups to which parameters are routed; a group's tensors are bound when they are first asked for.

    Args:
        params: the model's parameters, or groups of them.
        config: of the optimizer.

    The stages of a pipeline have the same groups in the same order; a placeholder stands in a group of which a stage has no
    parameters. Making the groups is collective over the ranks of a pipeline.

    Attributes:
        dicts: the groups that torch's optimizer is to get as its ``param_groups``.
        stage: the stage of the pipeline that this rank trains; None without a pipeline.

    Raises:
        ConfigError: parameters that were not registered, settings that do not fit them, or nothing to train; on all stages
            of a pipeline.
    """

    def __init__(self, params: Iterable[Any], config: OptimizerConfig) -> None:
        self._config = config
        self._frozen: list[tuple[Tensor, str]] = []  # with names
        given = _as_groups(params)
        placed = [item for index, group in enumerate(given) for item in _placed(index, group)]
        tag_new(parameter for _, parameter in placed)
        self.stage = stage_among(placed)
        tagged = [(tags_of(parameter), place) for place, parameter in placed]
        self._names = ParameterNames(tags.name or place for tags, place in tagged if not tags.placeholder)
        routed, entries, names = route_all(self.stage, lambda: self._all_routed(given, placed), self._names)
        names.refuse_unmatched(config.common.overrides)
        refuse_without_adapters(names.all, config.common.lora)
        log_routing([(entry.settings, entry.numel) for entry in entries], config)
        # The text on which ranks must agree.
        self._routing = f"{routing_table(item[1] for item in routed)}\n{config.common.telemetry!r} {config.around!r}"
        self._routing += f"\n{config.common.qk_clip!r}" if config.common.qk_clip else ""
        self._members: dict[str, Members] = {}
        self._bound: dict[Tensor, Slices] = {}
        self._members_of: dict[Tensor, Members] = {}
        self._loaded_owners: dict[tuple[str, ...], Placement] = {}  # by the names of the parameters of one call
        self.dicts = self._build(routed, entries)

    def _all_routed(self, given: Sequence[dict[str, Any]], placed: Sequence[tuple[str, Tensor]]) -> Iterator[Routed]:
        _refuse_repeated(placed)
        _refuse_one_name(self._names.all)
        for index, group in enumerate(given):
            yield from self._routed(index, group)

    def _routed(self, index: int, group: dict[str, Any]) -> Iterator[Routed]:
        """Yield (parameter, route, identifier of our group, the frameworks' keys of the group) for one given group."""
        own = {key: value for key, value in group.items() if key not in KEYS_OF_FRAMEWORKS}
        kept: dict[str, Any] = {key: group[key] for key in ("moe", "name") if key in group}
        prefix = f"group{index}." if own else ""
        for place, parameter in _placed(index, group):
            if tags_of(parameter).placeholder:
                continue
            if not parameter.requires_grad:
                self._frozen.append((parameter, tags_of(parameter).name or place))
            if not (parameter.requires_grad and full_shape(parameter).numel()):
                continue
            decided = route(parameter, self._config, own, place, self._names)
            experts = expert_group_name(parameter)
            keys = {**kept, "moe": True, "name": experts} if experts else kept
            yield parameter, decided, prefix + decided.group + (f".{experts}" if experts else ""), keys

    def _build(self, routed: Sequence[Routed], entries: Sequence[GroupEntry]) -> list[dict[str, Any]]:
        if not routed:
            raise ConfigError("params: got no trainable floating-point parameter; allowed: at least one")
        members: dict[str, list[tuple[Tensor, Route]]] = {entry.identifier: [] for entry in entries}
        for parameter, decided, identifier, _ in routed:
            members[identifier].append((parameter, decided))
        placeholders = iter(take_placeholders(self.stage, sum(not group for group in members.values())))
        groups = []
        for entry in entries:
            group, settings = members[entry.identifier], entry.settings
            parameters, routes = (tuple(column) for column in zip(*group, strict=True)) if group else ((), ())
            rule = built(settings, self._config.common.sharding)
            self._members[entry.identifier] = Members(parameters, routes, settings, rule, self._config.around)
            stepped = list(parameters) or [next(placeholders)]
            groups.append({"params": stepped, GROUP: entry.identifier, **entry.keys, **settings.scheduled()})
        return groups

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: everything but the slices, which are bound anew."""
        return {**self.__dict__, "_bound": {}}

    def __getitem__(self, group: Mapping[str, Any]) -> Members:
        """Return the members of one of ``param_groups``: none where other stages of a pipeline have them all."""
        return self._members[group[GROUP]]

    @property
    def members(self) -> Mapping[str, Members]:
        """All members, by the identifier of their group."""
        return self._members

    def on_devices(self, group: Mapping[str, Any]) -> list[tuple[Members, Sequence[Tensor]]]:
        """Return (members, tensors) of ``group`` for each device, since a model in plain PyTorch may lie on several.

        Under ZeRO, where the tensors are slices of one device, that is the whole group.
        """
        members, tensors = self[group], group["params"]
        devices = dict.fromkeys(tensor.device for tensor in tensors)
        if len(devices) == 1:
            return [(members, tensors)]
        found: list[tuple[Members, Sequence[Tensor]]] = []
        for device in devices:
            indices = [index for index, tensor in enumerate(tensors) if tensor.device == device]
            parameters, routes = tuple(members.parameters[i] for i in indices), tuple(members.routes[i] for i in indices)
            part = Members(parameters, routes, members.settings, members.rule, members.around)
            found.append((part, [tensors[index] for index in indices]))
        return found

    def slices_of(
        self, group: Mapping[str, Any], tensors: Sequence[Tensor] | None = None, members: Members | None = None
    ) -> Slices:
        """Return the group's tensors, bound to their places. The first call for these tensors is collective.

        Args:
            group: one of ``param_groups``.
            tensors: to be taken in place of ``group["params"]``, which ZeRO-3 empties between steps.
            members: of these tensors, where they are not the whole group: see `on_devices`.

        Raises:
            LayoutError: see `bind_slices`.
            ConfigError: parameters that DeepSpeed replaced after the optimizer was built, or a mesh for sequences.
        """
        tensors = group["params"] if tensors is None else tensors
        bound = self._bound.get(tensors[0])
        if bound is None or len(bound.tensors) != len(tensors):
            bound = self._bind(members or self[group], tensors)
            self._bound[tensors[0]] = bound
            self.remember(group, tensors)
        if self._loaded_owners:
            self._refuse_other_owners(bound)
        return bound

    def expect_owners(self, described: Iterable[Mapping[str, Any]]) -> None:
        """Note which ranks kept which factors in loaded state: before a step takes it, this run's must be the same.

        Args:
            described: "optforge" of a state dict.
        """
        places = [Placement.from_plain(found["placement"]) for found in described if "owners" in found["placement"]]
        self._loaded_owners = {place.layout.names: place for place in places}

    def _refuse_other_owners(self, bound: Slices) -> None:
        """Raise ConfigError where loaded factors are of other matrices than those that this rank owns."""
        own, layout = bound.placement, bound.placement.layout
        loaded = self._loaded_owners.pop(layout.names, None)
        if loaded is None:
            return
        if loaded.layout.matrices != layout.matrices:
            raise ConfigError(
                f"{layout.names[0]} and others with it: the checkpoint holds factors of other matrices than this run's; "
                "allowed: the same split and heads"
            )
        if loaded.owners != own.owners:
            index = next(i for i, (old, new) in enumerate(zip(loaded.owners, own.owners, strict=True)) if old != new)
            raise ConfigError(
                f"{layout.describe(index)}: rank {loaded.owners[index]} owned it in the checkpoint, and rank "
                f"{own.owners[index]} does in this run; allowed: the same sharding.bucket_numel and settings of its rule, or "
                "ds-optforge convert and ds_optforge.load_checkpoint, which moves the owners' state"
            )

    def _bind(self, members: Members, tensors: Sequence[Tensor]) -> Slices:
        if (ranks := ranks_of_mesh_sequence()) > 1:
            raise ConfigError(f"sequence_parallel_size: got {ranks} by data_parallel_size or mesh_param; allowed: {ULYSSES}")
        try:
            return bind_slices(members, tensors, self._config.common.sharding, self._routing)
        except LayoutError as error:
            names = replaced(parameter for group in self._members.values() for parameter in group.parameters)
            if not names:
                raise
            raise ConfigError(
                f"{names[0]}: is not in the model any more; {len(names)} parameters were replaced after the optimizer was "
                f"built, as AutoEP does, and AutoTP under zero.Init; allowed: {BUILT_LATER}"
            ) from error

    def remember(self, group: Mapping[str, Any], tensors: Iterable[Tensor]) -> None:
        """Note that ``tensors`` belong to ``group``, for `members_of`: ZeRO-3 empties the groups between steps."""
        self._members_of |= dict.fromkeys(tensors, self[group])

    def members_of(self, tensor: Tensor) -> Members:
        """Return the members whose rule steps ``tensor``, which was bound or loaded before."""
        return self._members_of[tensor]

    def refuse_unfrozen(self, stepped: Sequence[Mapping[str, Any]]) -> None:
        """Refuse a step while a parameter is trainable that was frozen when the optimizer was built.

        Args:
            stepped: groups of this call. Only the calls for the first group look, since a step has a call for each slice.

        Raises:
            ConfigError: such a parameter; nothing would ever train it.
        """
        if not any(group[GROUP] == next(iter(self._members)) for group in stepped):
            return
        name = next((name for parameter, name in self._frozen if parameter.requires_grad), None)
        if name is not None:
            raise ConfigError(
                f"{name}: was frozen when the optimizer was built and is trainable now, but would get no update; allowed: "
                "build the optimizer (under DeepSpeed the engine) while it is trainable, and freeze it afterwards for as long "
                "as it is to rest; or build a new one after unfreezing"
            )

    @property
    def bound(self) -> Iterable[Slices]:
        """The slices that have been bound so far."""
        return self._bound.values()

    def members_with(self, name: str) -> tuple[str, Members]:
        """Return (identifier, members) of the group that holds the parameter of that qualified ``name``."""
        return next(item for item in self._members.items() if any(route.name == name for route in item[1].routes))

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all ``tensors`` are the model's own parameters, not slices or clones of them; False for none."""
        own = {id(parameter) for members in self._members.values() for parameter in members.parameters}
        return bool(tensors) and all(id(tensor) in own for tensor in tensors)


def _refuse_repeated(placed: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ConfigError for a parameter that is given twice, with the words of torch's optimizers."""
    seen: dict[int, str] = {}
    for place, parameter in placed:
        if id(parameter) in seen:
            raise ConfigError(
                f"some parameters appear in more than one parameter group: {tags_of(parameter).name or 'one'} is "
                f"{seen[id(parameter)]} and {place}; allowed: each once"
            )
        seen[id(parameter)] = place


def _refuse_one_name(names: Iterable[str]) -> None:
    """Raise ConfigError where two parameters have one name, which state and checkpoints could not tell apart."""
    name, count = next(iter(Counter(names).most_common(1)), ("", 1))
    if count > 1:
        raise ConfigError(
            f"{name}: {count} parameters were registered under this name, in several models or before a layer was moved; "
            "allowed: one call with all that is trained, as ds_optforge.register(torch.nn.ModuleDict({'actor': actor, "
            "'critic': critic}))"
        )


def _placed(index: int, group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield (place in the given groups, parameter) for each parameter of the group of that number."""
    for position, parameter in enumerate(group["params"]):
        yield f"param_groups[{index}].params[{position}]", parameter


def _as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Turn parameters, named parameters, or groups of parameters into groups."""
    items = list(params)
    if items and all(isinstance(item, Mapping) for item in items):
        return [
            {**item, "params": [item["params"]] if isinstance(item["params"], Tensor) else list(item["params"])}
            for item in items
        ]
    if items and all(isinstance(item, tuple) for item in items):  # model.named_parameters()
        items = [parameter for _, parameter in items]
    return [{"params": items}]


def built(settings: RuleSettings, sharding: ShardingSettings) -> ElementwiseRule | MatrixRule:
    """Build the rule of ``settings``, which steps all rows or a share of them.

    Raises:
        TypeError: `build` returned something else than the class that ``builds`` declares.
    """
    by_rows = sharding.share < 1 and settings.needs_matrix()
    rule = settings.build_rows(sharding.share) if by_rows else settings.build()
    if not isinstance(rule, settings.builds):
        raise TypeError(f"{type(settings).__qualname__}.build: got {rule!r}; allowed: a {settings.builds.__qualname__}")
    if isinstance(rule, MatrixRule) and rule.choice:
        by = rule.choice.by
        if settles(rule) or not any(item.name == by and item.per == "row" and not item.of_update for item in rule.sums):
            raise TypeError(
                f"{type(rule).__qualname__}.choice: got by='{by}'; allowed: a sum of the gradient per row, no settle"
            )
    return rule
