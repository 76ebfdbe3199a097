"""Decides which rule each parameter gets, from its tags, its shape and the configuration."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.config.sections import CommonSettings, Role
from ds_optforge.errors import ConfigError
from ds_optforge.routing.geometry import Geometry, geometry_of, is_vector, uncut
from ds_optforge.routing.kinds import Kind
from ds_optforge.routing.lora import refuse_without_adapters, takes
from ds_optforge.routing.matching import ParameterNames
from ds_optforge.routing.steppable import refuse_unsteppable
from ds_optforge.routing.tags import parameter_name, tag, tags_of
from ds_optforge.rules.base import MatrixRule
from ds_optforge.rules.registry import rule_settings
from ds_optforge.rules.settings import RuleSettings
from ds_optforge.zero.layout import LayoutError
from ds_optforge.zero.partition import Joined, part_shape
from ds_optforge.zero.shards import full_shape, shard_of

logger = logging.getLogger("ds_optforge")

# Smaller parameters keep float32 when the state is 8-bit, as in bitsandbytes, since there is little to save.
_SMALLEST_8BIT = 4096

# Beyond it a matrix of unknown purpose is taken for a table rather than for a map.
_LONGEST = 10.0

_NO_OTHERS = ParameterNames(())


@dataclass(frozen=True, slots=True)
class Route:
    """The rule and settings of one parameter, and the matrices in it.

    Attributes:
        name: qualified name of the parameter.
        shape: of the whole parameter, under ZeRO-3 too.
        numel: elements of the whole parameter.
        role: matrix, embedding, unembedding or scalar.
        settings: of the parameter's rule.
        matrices: (start in the flattened parameter, rows, cols) of each matrix; empty for an elementwise rule.
        transposed: whether the weight is stored (in, out).
        group: identifier of the parameter group: a function of the configuration alone.
        why: the reason for the role and the rule, for people.
        fused: what the parameter joins and could be cut into, though it is not; empty if there is nothing.
        joins: the matrices that each of ``matrices`` joins though they are no ranges of it; None if it is one itself.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    role: Role
    settings: RuleSettings
    matrices: tuple[tuple[int, int, int], ...]
    transposed: bool
    group: str
    why: str = ""
    fused: str = ""
    joins: Joined | None = None

    @property
    def stepped(self) -> Iterator[tuple[int, int]]:
        """(rows, cols) of each matrix that is orthogonalized, in order."""
        for _, rows, cols in self.matrices:
            shape = part_shape(rows, cols, self.transposed, self.joins)
            yield from [shape] * (self.joins.parts if self.joins else 1)

    def scales(self, rule: MatrixRule) -> Iterator[float]:
        """Yield the factor of each matrix's orthogonal update, where ``rule`` is that of the settings."""
        for rows, cols in self.stepped:
            yield rule.rms(rows, cols, self.transposed) * math.sqrt(max(rows, cols))


def route(
    parameter: Tensor,
    config: OptimizerConfig,
    own: Mapping[str, Any] | None = None,
    place: str = "",
    names: ParameterNames = _NO_OTHERS,
) -> Route:
    """Decide one parameter's rule.

    Args:
        parameter: of the model, tagged.
        config: of the optimizer.
        own: the settings of the parameter group that the user put it into, KellerJordan's ``use_muon`` included.
        place: the parameter's place in the given groups ("param_groups[0].params[3]"), which is its name if it has no tag
            and ``use_muon`` makes one unnecessary.
        names: of all parameters of the model, which show the prefix of a wrapper.

    Raises:
        ConfigError: an unregistered parameter, settings that its rule does not read, a matrix rule for a vector.
    """
    own = dict(own or {})
    use_muon = own.pop("use_muon", None)
    tags = tags_of(parameter)
    refuse_unsteppable(parameter, tags.name or place or "a parameter")
    name = tags.name or place if use_muon is not None else parameter_name(parameter)
    shape = full_shape(parameter)
    matched = names.matched(name, config.common.overrides)
    role, named = _role(parameter, config, matched, use_muon)
    if use_muon is not None:
        own.setdefault("name", _rule_for_flag(config, use_muon))
    kind, found = tags.kind, geometry_of(parameter, name, config, matched)
    left = "" if named or found.cut else _left_to_adamw(kind, found, config.common)
    try:
        settings = config.settings(role, matched, bool(left), own, place.rpartition(".")[0])
    except ConfigError as error:
        raise ConfigError(str(error) if name == place else f"{name}: {error}") from None
    matrices = found.matrices if settings.needs_matrix() else ()
    if matrices:
        _refuse_as_matrix(parameter, name, settings.rule)
        _refuse_shards(parameter, name, found)
        _refuse_joined(found, name, settings, config)
    joins = found.joins if matrices else None
    group = ".".join([role, settings.rule, *(f"override{i}" for i in matched)])
    if settings.state_dtype == "8bit" and (role == "scalar" or shape.numel() < _SMALLEST_8BIT):
        settings = settings.model_copy(update={"state_dtype": "float32"})
        group += ".float32"
    why, fused = named or _why(kind, role, left), uncut(kind.fused, found) if matrices else ""
    return Route(name, tuple(shape), shape.numel(), role, settings, matrices, found.transposed, group, why, fused, joins)


def _why(kind: Kind, role: Role, left: str) -> str:
    if role == "matrix":
        return left or kind.why
    return "vector" if role == "scalar" and kind.role is None else kind.why


def _left_to_adamw(kind: Kind, found: Geometry, common: CommonSettings) -> str:
    """Return why a matrix rule leaves a matrix to adamw; empty if it does not."""
    if kind.elementwise:
        return kind.why
    if kind.factor and not takes(kind.factor, common.lora):
        return f"{kind.why}, lora: {common.lora}"
    if any(min(rows, cols) == 1 for _, rows, cols in found.matrices):
        return f"{kind.why} with one input or output"
    longest = None if kind.factor else common.max_aspect_ratio
    limit = _LONGEST if longest is None else longest
    if (longest is not None or not kind.hidden) and any(
        max(rows, cols) > limit * min(rows, cols) for _, rows, cols in found.matrices
    ):
        return f"more than {limit:g} times as long as wide"
    return ""


def _refuse_shards(parameter: Tensor, name: str, found: Geometry) -> None:
    """Raise ConfigError for matrices that tensor parallelism has cut so that they cannot be put together."""
    shard = shard_of(parameter)
    if shard is not None:
        if found.joins:
            raise ConfigError(
                f"{name}: split finds matrices that are no ranges of rows, under tensor parallelism; allowed: no split"
            )
        try:
            shard.local(found.matrices, found.transposed, name)
        except LayoutError as error:
            raise ConfigError(str(error)) from None


def _refuse_joined(found: Geometry, name: str, settings: RuleSettings, config: OptimizerConfig) -> None:
    """Raise ConfigError for matrices that are no ranges of their weight where a rule or a mode needs ranges."""
    if found.joins is None:
        return
    rule = settings.builds
    assert issubclass(rule, MatrixRule)
    if rule.sums or any(statistic.per == "matrix" for statistic in rule.statistics):
        problem = f"rule '{settings.rule}', which keeps numbers of whole matrices"
    elif config.common.sharding.mode != "gather":
        problem = f"sharding.mode '{config.common.sharding.mode}'"
    else:
        return
    raise ConfigError(
        f"{name}: split finds {found.joins.parts} matrices that are no ranges of it: got {problem}; allowed: no split of this "
        "weight, or another rule, or mode 'gather'"
    )


def _refuse_as_matrix(parameter: Tensor, name: str, rule: str) -> None:
    """Raise ConfigError for a parameter that a matrix rule cannot step, or not in its precision."""
    shape = tuple(full_shape(parameter))
    if is_vector(parameter):
        raise ConfigError(f"{name}: got rule '{rule}' for shape {shape}; allowed: at least two dimensions larger than 1")
    if parameter.dtype == torch.float64:
        raise ConfigError(
            f"{name}: got dtype float64 for rule '{rule}', which orthogonalizes in float32 at most; allowed: float32, "
            "bfloat16, float16, or an elementwise rule"
        )


def _rule_for_flag(config: OptimizerConfig, use_muon: bool) -> str:
    if not use_muon:
        return "adamw"
    return config.main.rule if config.main.needs_matrix() else "muon"


def _role(parameter: Tensor, config: OptimizerConfig, matched: Sequence[int], use_muon: bool | None) -> tuple[Role, str]:
    """Return the role, and who asked for it by name (the aspect ratio then does not matter); empty if nobody did."""
    asked = [(role, f"overrides[{i}]") for i in matched if (role := config.common.overrides[i].role) is not None]
    if asked:
        return asked[-1]
    if use_muon:
        return "matrix", "use_muon"
    kind = tags_of(parameter).kind
    if kind.role is not None:
        return kind.role, ""
    return ("scalar" if is_vector(parameter) else "matrix"), ""


def routing_table(routes: Iterable[Route]) -> str:
    """Return a text with a line per route, the same on every rank with the same model and configuration."""
    return "\n".join(
        f"{r.name} {'x'.join(map(str, r.shape))} {r.role} {r.settings.rule} {len(r.matrices)} {r.joins or ''} {r.settings!r}"
        for r in routes
    )


def routes_of(model: nn.Module, config: OptimizerConfig) -> list[Route]:
    """Tag ``model``, which may be on the meta device, and return the route of each trainable parameter.

    Raises:
        ConfigError: see `route`.
    """
    tag(model)
    parameters = [parameter for parameter in model.parameters() if not tags_of(parameter).placeholder]
    names = ParameterNames(map(parameter_name, parameters))
    names.refuse_unmatched(config.common.overrides)
    refuse_without_adapters(names.all, config.common.lora)
    return [route(parameter, config, names=names) for parameter in parameters if parameter.requires_grad]


def log_routing(groups: Sequence[tuple[RuleSettings, int]], config: OptimizerConfig) -> None:
    """Log the number of parameters (elements) of each rule, and warn of a configuration that is probably not meant.

    Args:
        groups: settings and number of elements of each parameter group.
        config: of the optimizer.
    """
    counts: dict[str, int] = {}
    for settings, numel in groups:
        counts[settings.rule] = counts.get(settings.rule, 0) + numel
    main = config.main
    if main.needs_matrix():
        counts = {main.rule: 0, "adamw": 0} | counts
    logger.info(", ".join(f"{_title(rule)}: {numel:,} params" for rule, numel in counts.items()))
    for warning in warnings_of(groups, config):
        logger.warning(warning)


def warnings_of(groups: Sequence[tuple[RuleSettings, int]], config: OptimizerConfig) -> list[str]:
    """Return what is probably not meant in a configuration; arguments as of `log_routing`."""
    main = config.main
    if not main.needs_matrix():
        return []
    if not any(settings.needs_matrix() for settings, _ in groups):
        return [f"no parameter is a matrix for '{main.rule}': every one is trained by adamw"]
    beside = [settings for settings, _ in groups if not settings.needs_matrix()]
    if not main.matches_adamw and "lr" not in config.common.adamw and any(settings.lr == main.lr for settings in beside):
        return [
            f"adamw.lr is not set: AdamW runs at '{main.rule}'s lr = {main.lr:g}, which is usually too high; set adamw.lr, or "
            "orthogonalization.scale = 'match_rms_adamw' to share one learning rate"
        ]
    return []


def _title(rule: str) -> str:
    settings = rule_settings(rule)
    return settings.title if settings else rule
