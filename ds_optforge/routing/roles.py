"""Decides which rule each parameter gets, from its tags, its shape and the configuration."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.config.sections import Role
from ds_optforge.errors import ConfigError
from ds_optforge.routing.geometry import is_vector, matrices_in
from ds_optforge.routing.lora import left_to_adamw, refuse_without_adapters
from ds_optforge.routing.matching import ParameterNames
from ds_optforge.routing.steppable import refuse_unsteppable
from ds_optforge.routing.tags import parameter_name, tag, tags_of
from ds_optforge.rules.registry import rule_settings
from ds_optforge.rules.settings import RuleSettings
from ds_optforge.zero.layout import LayoutError
from ds_optforge.zero.shards import full_shape, shard_of

logger = logging.getLogger("ds_optforge")

# Smaller parameters keep float32 when the state is 8-bit, as in bitsandbytes, since there is little to save.
_SMALLEST_8BIT = 4096

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
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    role: Role
    settings: RuleSettings
    matrices: tuple[tuple[int, int, int], ...]
    transposed: bool
    group: str


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
    role, certain = _role(parameter, config, matched, use_muon)
    if use_muon is not None:
        own.setdefault("name", _rule_for_flag(config, use_muon))
    found = matrices_in(parameter, name, config, matched)
    fused = any(config.common.overrides[i].split or config.common.overrides[i].heads for i in matched)
    longest = config.common.max_aspect_ratio
    thin = any(max(rows, cols) > longest * min(rows, cols) or min(rows, cols) == 1 for _, rows, cols in found)
    if tags.adapter:
        thin = bool(left_to_adamw(tags.adapter, config.common.lora)) or any(1 in matrix[1:] for matrix in found)
    try:
        settings = config.settings(role, matched, thin and not (certain or fused), own, place.rpartition(".")[0])
    except ConfigError as error:
        raise ConfigError(str(error) if name == place else f"{name}: {error}") from None
    if settings.needs_matrix():
        _refuse_as_matrix(parameter, name, settings.rule)
    group = ".".join([role, settings.rule, *(f"override{i}" for i in matched)])
    if settings.state_dtype == "8bit" and (role == "scalar" or shape.numel() < _SMALLEST_8BIT):
        settings = settings.model_copy(update={"state_dtype": "float32"})
        group += ".float32"
    matrices = tuple(found) if settings.needs_matrix() else ()
    _refuse_shards(parameter, name, matrices, tags.transposed)
    return Route(name, tuple(shape), shape.numel(), role, settings, matrices, tags.transposed, group)


def _refuse_shards(parameter: Tensor, name: str, matrices: Sequence[tuple[int, int, int]], transposed: bool) -> None:
    """Raise ConfigError for matrices that tensor parallelism has cut so that they cannot be put together."""
    shard = shard_of(parameter) if matrices else None
    if shard is not None:
        try:
            shard.local(matrices, transposed, name)
        except LayoutError as error:
            raise ConfigError(str(error)) from None


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


def _role(parameter: Tensor, config: OptimizerConfig, matched: Sequence[int], use_muon: bool | None) -> tuple[Role, bool]:
    """Return the role, and whether the user asked for it by name (the aspect ratio then does not matter)."""
    asked = [role for i in matched if (role := config.common.overrides[i].role) is not None]
    if asked:
        return asked[-1], True
    if use_muon:
        return "matrix", True
    placed = tags_of(parameter).role
    if placed is not None:
        return placed, False
    return ("scalar" if is_vector(parameter) else "matrix"), False


def routing_table(routes: Iterable[Route]) -> str:
    """Return a text with a line per route, the same on every rank with the same model and configuration."""
    return "\n".join(
        f"{r.name} {'x'.join(map(str, r.shape))} {r.role} {r.settings.rule} {len(r.matrices)} {r.settings!r}" for r in routes
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
    refuse_without_adapters(names.all, config.common.lora, "optimizer.params.lora")
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
    if not main.needs_matrix():
        return
    if not any(settings.needs_matrix() for settings, _ in groups):
        logger.warning("no parameter is a matrix for '%s': every one is trained by adamw", main.rule)
        return
    beside = [settings for settings, _ in groups if not settings.needs_matrix()]
    if not main.matches_adamw and "lr" not in config.common.adamw and any(settings.lr == main.lr for settings in beside):
        logger.warning(
            "adamw.lr is not set: AdamW runs at '%s's lr = %g, which is usually too high; set adamw.lr, or "
            "orthogonalization.scale = 'match_rms_adamw' to share one learning rate",
            main.rule,
            main.lr,
        )


def _title(rule: str) -> str:
    settings = rule_settings(rule)
    return settings.title if settings else rule
