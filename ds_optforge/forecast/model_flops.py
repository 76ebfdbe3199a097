"""FLOPs of a forward and backward pass, from the shapes of a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ds_optforge.forecast.catalog import MODEL_GEOMETRY
from ds_optforge.routing.roles import Route


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the shapes of a language model's parameters do not tell.

    Attributes:
        attention: sum over the layers of heads times the width of a head, the mean of that of q and k and that of v; 0 where it
            is not known, and attention is then left out.
        active: share of the experts that a token is sent to; 1 without experts.
    """

    attention: int
    active: float = 1.0


def geometry_of(name: str, model: nn.Module) -> Geometry:
    """Return the geometry of a model of the catalog, or of one that has a configuration of transformers."""
    if name in MODEL_GEOMETRY:
        layers, width, active = MODEL_GEOMETRY[name]
        return Geometry(layers * width, active)
    config = getattr(model, "config", None)
    if config is None:
        return Geometry(0)
    config = config.get_text_config()
    layers, heads = (getattr(config, key, None) or 0 for key in ("num_hidden_layers", "num_attention_heads"))
    experts = _first(config, "num_local_experts", "num_experts", "n_routed_experts")
    chosen = _first(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk")
    return Geometry(layers * int(heads * _head_width(config, heads)), chosen / experts if experts and chosen else 1.0)


def _first(config: Any, *keys: str) -> int:
    values = (getattr(config, key, None) for key in keys)
    return next((value for value in values if isinstance(value, int)), 0)


def _head_width(config: Any, heads: int) -> float:
    """Mean width of a head of q and k, and of v: latent attention (DeepSeek-V2) has two."""
    if value := _first(config, "v_head_dim"):
        return (_first(config, "qk_nope_head_dim") + _first(config, "qk_rope_head_dim") + value) / 2
    own = _first(config, "head_dim")
    return own or (_first(config, "hidden_size") / heads if heads else 0)


def flops_per_token(routes: Sequence[Route], geometry: Geometry, sequence_length: int) -> float:
    """Return the FLOPs of a forward and backward pass for each token.

    6 for each element of a matrix that a token is multiplied by (Kaplan et al. 2020, arXiv 2001.08361), which leaves out
    tables that are only looked up, and experts that the token is not sent to. Attention adds 12 times its width times the
    length (Chowdhery et al. 2022, arXiv 2204.02311, appendix B), of which a causal kernel computes half. What activation
    checkpointing computes again is no part of it: the utilisation is to contain it.

    Args:
        routes: of all parameters of the model.
        geometry: of the model.
        sequence_length: tokens of a sequence.
    """
    multiplied = sum(_active_numel(route, geometry.active) for route in routes if len(route.shape) > 1)
    tables = sorted(route.numel for route in routes if route.role == "embedding")
    if tables and not any(route.role == "unembedding" for route in routes):
        tables.pop()  # the largest is the head, too
    return 6.0 * (multiplied - sum(tables)) + 6.0 * geometry.attention * sequence_length


def _active_numel(route: Route, active: float) -> float:
    return route.numel * (active if "experts" in route.name.split(".") else 1.0)
