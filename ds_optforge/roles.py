"""Which rule each parameter gets, and how it is cut into matrices.

`tag` writes what only the module tree knows onto the parameters, before DeepSpeed flattens them; `route` decides from the
tags, the shapes and the configuration.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ds_optforge.config import OptimizerConfig, Role
from ds_optforge.rules.registry import rule_settings
from ds_optforge.rules.settings import RuleSettings
from ds_optforge.validation import ConfigError
from ds_optforge.zero.layout import full_shape

logger = logging.getLogger("ds_optforge")

_NAME, _ROLE, _MATRIX, _TRANSPOSED = "optforge_name", "optforge_role", "optforge_matrix", "optforge_transposed"
# Smaller parameters keep float32 where the state is 8-bit, as in bitsandbytes: there is nothing to save.
_SMALLEST_8BIT = 4096
_HEAD_NAMES = {"lm_head", "head", "unembed", "unembedding", "embed_out", "output", "output_layer"}


@dataclass(frozen=True, slots=True)
class Route:
    """What happens to one parameter.

    Attributes:
        name, shape, numel: of the parameter (the whole of it, under ZeRO-3 too).
        role: matrix, embedding, unembedding or scalar.
        settings: its rule's.
        matrices: (start, rows, cols) of each matrix in the flattened parameter; empty for an elementwise rule.
        transposed: the weight is stored (in, out).
        group: identifies the parameter group: a function of the configuration alone.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    role: Role
    settings: RuleSettings
    matrices: tuple[tuple[int, int, int], ...]
    transposed: bool
    group: str


def tag(model: nn.Module) -> None:
    """Write each parameter's qualified name and its place in the module tree onto it."""
    heads = {id(parameter) for parameter in _head_weights(model)}
    for name, parameter in model.named_parameters():  # the first name of a tied parameter
        setattr(parameter, _NAME, name)
        setattr(parameter, _ROLE, "unembedding" if id(parameter) in heads else None)
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            setattr(module.weight, _ROLE, "embedding")  # also where the head is tied to it
        elif isinstance(module, nn.modules.conv._ConvNd):
            shape = full_shape(module.weight)
            setattr(module.weight, _MATRIX, (shape[0], shape.numel() // shape[0]))
            setattr(module.weight, _TRANSPOSED, module.transposed)
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers': a Linear stored (in, out)
            setattr(module.weight, _TRANSPOSED, True)


def _head_weights(model: nn.Module) -> Iterator[Tensor]:
    """Weights of output embeddings: what a Hugging Face model calls so, and Linears named as the head outside any layer."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    weight = getattr(get_output_embeddings(), "weight", None) if get_output_embeddings else None
    if isinstance(weight, Tensor):
        yield weight
    for name, module in model.named_modules():
        *path, last = name.split(".")
        if isinstance(module, nn.Linear) and last in _HEAD_NAMES and not any(part.isdigit() for part in path):
            yield module.weight


def parameter_name(parameter: Tensor) -> str:
    """The qualified name that `tag` wrote. Raises ConfigError for a parameter that was never tagged."""
    name: str | None = getattr(parameter, _NAME, None)
    if name is None:
        raise ConfigError(
            f"a parameter of shape {tuple(full_shape(parameter))} is not registered; call ds_optforge.register(model) "
            "before deepspeed.initialize, Accelerator.prepare or Trainer, with the model that is trained (in plain PyTorch, "
            "ds_optforge.build_optimizer(model, config) does so)"
        )
    return name


def route(parameter: Tensor, config: OptimizerConfig, own: Mapping[str, Any] | None = None, place: str = "") -> Route:
    """Decide one parameter's rule.

    Args:
        parameter: of the model, tagged.
        config: of the optimizer.
        own: the settings of the parameter group that the user put it into, KellerJordan's ``use_muon`` included.
        place: the parameter's place in the given groups ("param_groups[0].params[3]"): its name, where ``use_muon`` says
            all that is needed and it has no tag.

    Raises:
        ConfigError: an unregistered parameter, settings that its rule does not read, a matrix rule for a vector.
    """
    own = dict(own or {})
    use_muon = own.pop("use_muon", None)
    name = getattr(parameter, _NAME, place) if use_muon is not None else parameter_name(parameter)
    shape = full_shape(parameter)
    matched = [i for i, override in enumerate(config.common.overrides) if re.search(override.match, name)]
    role, certain = _role(parameter, config, matched, use_muon)
    if use_muon is not None:
        own.setdefault("name", _rule_for_flag(config, use_muon))
    pieces = _matrices_in(parameter, name, config, matched)
    fused = any(config.common.overrides[i].split or config.common.overrides[i].heads for i in matched)
    thin = any(max(rows, cols) > config.common.max_aspect_ratio * min(rows, cols) for _, rows, cols in pieces)
    try:
        settings = config.settings(role, matched, thin and not (certain or fused), own, place.rpartition(".")[0])
    except ConfigError as error:
        raise ConfigError(str(error) if name == place else f"{name}: {error}") from None
    if settings.needs_matrix() and len(shape) < 2:
        raise ConfigError(f"{name}: got rule '{settings.rule}' for shape {tuple(shape)}; allowed: at least two dimensions")
    group = ".".join([role, settings.rule, *(f"override{i}" for i in matched)])
    if settings.state_dtype == "8bit" and (role == "scalar" or shape.numel() < _SMALLEST_8BIT):
        settings = settings.model_copy(update={"state_dtype": "float32"})
        group += ".float32"
    matrices = tuple(pieces) if settings.needs_matrix() else ()
    transposed = getattr(parameter, _TRANSPOSED, False)
    return Route(name, tuple(shape), shape.numel(), role, settings, matrices, transposed, group)


def _matrices_in(parameter: Tensor, name: str, config: OptimizerConfig, matched: Sequence[int]) -> list[tuple[int, int, int]]:
    """(start, rows, cols) of each matrix: a bank's members, a conv filter bank, or what ``split`` and ``heads`` say."""
    shape = full_shape(parameter)
    if hasattr(parameter, _MATRIX):
        rows, cols = getattr(parameter, _MATRIX)
    elif len(shape) < 2:
        rows, cols = 1, shape.numel()
    elif hasattr(parameter, _NAME):
        rows, cols = shape[-2:]
    else:  # KellerJordan's groups are not registered; more dimensions than two are convolution filters there
        rows, cols = shape[0], shape.numel() // shape[0]
    blocks = [rows]
    for key in ("split", "heads"):
        asked = [(i, value) for i in matched if (value := getattr(config.common.overrides[i], key)) is not None]
        if asked:
            index, value = asked[-1]
            if getattr(parameter, _TRANSPOSED, False):
                raise ConfigError(f"{name}: overrides[{index}].{key} cuts rows, but this weight is stored (in, out)")
            blocks = (
                _split(blocks, value, f"{name}: overrides[{index}]")
                if key == "split"
                else _heads(blocks, value, f"{name}: overrides[{index}]")
            )
    matrices = []
    for bank in range(0, shape.numel(), rows * cols):
        start = bank
        for block in blocks:
            matrices.append((start, block, cols))
            start += block * cols
    return matrices


def _split(blocks: list[int], parts: tuple[int, ...], where: str) -> list[int]:
    if sum(parts) != blocks[0]:
        raise ConfigError(f"{where}.split: got {list(parts)}, {sum(parts)} rows; allowed: parts of its {blocks[0]} rows")
    return list(parts)


def _heads(blocks: list[int], heads: int | tuple[int, ...], where: str) -> list[int]:
    counts = [heads] * len(blocks) if isinstance(heads, int) else list(heads)
    if len(counts) != len(blocks):
        raise ConfigError(f"{where}.heads: got {len(counts)} counts; allowed: {len(blocks)}, one per entry of split")
    for rows, count in zip(blocks, counts, strict=True):
        if rows % count:
            raise ConfigError(f"{where}.heads: got {count} for {rows} rows; allowed: a divisor of {rows}")
    return [rows // count for rows, count in zip(blocks, counts, strict=True) for _ in range(count)]


def _rule_for_flag(config: OptimizerConfig, use_muon: bool) -> str:
    if not use_muon:
        return "adamw"
    return config.main.rule if config.main.needs_matrix() else "muon"


def _role(parameter: Tensor, config: OptimizerConfig, matched: Sequence[int], use_muon: bool | None) -> tuple[Role, bool]:
    """The role, and whether it was asked for by name (then the aspect ratio does not matter)."""
    asked = [role for i in matched if (role := config.common.overrides[i].role) is not None]
    if asked:
        return asked[-1], True
    if use_muon:
        return "matrix", True
    placed: Role | None = getattr(parameter, _ROLE, None)
    if placed is not None:
        return placed, False
    return ("scalar" if len(full_shape(parameter)) < 2 else "matrix"), False


def routing_table(routes: Iterable[Route]) -> str:
    """One line per parameter, the same on every rank that has the same model and configuration."""
    return "\n".join(
        f"{r.name} {'x'.join(map(str, r.shape))} {r.role} {r.settings.rule} {len(r.matrices)} {r.settings!r}" for r in routes
    )


def routes_of(model: nn.Module, config: OptimizerConfig) -> list[Route]:
    """The route of each trainable parameter of ``model``, which is tagged here and may be on the meta device."""
    tag(model)
    return [route(parameter, config) for parameter in model.parameters() if parameter.requires_grad]


def log_routing(routes: Sequence[Route], config: OptimizerConfig) -> None:
    """The line that says how many parameters each rule got, and the warnings that go with it."""
    counts: dict[str, int] = {}
    for r in routes:
        counts[r.settings.rule] = counts.get(r.settings.rule, 0) + r.numel
    main = config.main
    if main.needs_matrix():
        counts = {main.rule: 0, "adamw": 0} | counts
    logger.info(", ".join(f"{_title(rule)}: {numel:,} params" for rule, numel in counts.items()))
    if not main.needs_matrix():
        return
    if not any(r.settings.needs_matrix() for r in routes):
        logger.warning("no parameter is a matrix for '%s': every one is trained by adamw", main.rule)
        return
    beside = [r for r in routes if not r.settings.needs_matrix()]
    if not main.matches_adamw and "lr" not in config.common.adamw and any(r.settings.lr == main.lr for r in beside):
        logger.warning(
            "adamw.lr is not set: AdamW runs at '%s's lr = %g, which is usually too high; set adamw.lr, or "
            "orthogonalization.scale = 'match_rms_adamw' to share one learning rate",
            main.rule,
            main.lr,
        )


def _title(rule: str) -> str:
    settings = rule_settings(rule)
    return settings.title if settings else rule
