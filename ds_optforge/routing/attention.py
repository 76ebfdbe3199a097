"""Finds the attention of a model: whose outputs are which head's query and key, for QK-clip.

A module of transformers is recognised by its forward pass, which calls the attention function of transformers' interface;
others say themselves where their queries and keys come from (`register_attention`).
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ds_optforge.errors import ConfigError
from ds_optforge.routing.fused import Fused
from ds_optforge.routing.tags import tags_of
from ds_optforge.zero.shards import full_shape

INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # what transformers' modules call their attention function by

_REGISTERED = "optforge_attention"  # the attribute of a module that holds what it registered
_QUERIES, _KEYS = ("q_proj", "query"), ("k_proj", "key")
_LATENT = ("kv_a_proj_with_mqa", "kv_b_proj")  # of multi-head latent attention
_NORM = re.compile(r"^((q|k|qk|query|key)_?(layer_?)?(norm|ln)|norm_?(q|k))")
_PROJECTION = re.compile(r"^(q|k|query|key|qkv|q_b|kv_b|c_attn|Wqkv|query_key_value)(_(proj|linear))?$")
_NO_ADAPTERS = 'adapters of other layers, or no "qk_clip"'
_WAY_OUT = (
    "ds_optforge.register_attention(module, query=..., key=..., heads=...) for each such module before the optimizer is built, "
    'or no "qk_clip"'
)


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Outputs of a projection that belong to one head.

    Attributes:
        start: number of the first of them.
        numel: their number.
        head: number of the key head to which they belong.
        power: of the head's factor, by which they are multiplied: 0.5, or 1.0 where the other side is left alone.
    """

    start: int
    numel: int
    head: int
    power: float = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """A linear map that makes queries, keys or both.

    Attributes:
        module: that holds ``weight`` and perhaps ``bias``.
        rows: the outputs that QK-clip rescales.
        outputs: number of all its outputs.
    """

    module: nn.Module
    rows: tuple[HeadRows, ...]
    outputs: int

    @property
    def parameters(self) -> list[Tensor]:
        """The weight, and the bias if there is one; the outputs are the rows of a weight that is not `transposed`."""
        found = (getattr(self.module, leaf, None) for leaf in ("weight", "bias"))
        return [parameter for parameter in found if isinstance(parameter, Tensor)]

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored (in, out)."""
        return _is_transposed(self.module)


Watch = Callable[..., None]  # takes query, key, attn_mask, is_causal, scale


@dataclass(slots=True, eq=False)
class Attention:
    """A module whose attention logits are bounded by QK-clip.

    Attributes:
        module: that computes queries and keys, and attends.
        projections: of its queries and keys.
        heads: number of heads of the queries.
        key_heads: number of heads of the keys; heads of the queries that share one are bounded together.
        size: elements of a query of one head.
        calls_interface: whether it calls the attention function of transformers' interface; else it calls `observe`.
        watch: what `observe` passes queries and keys on to, while the module's forward pass is watched.
    """

    module: nn.Module
    projections: tuple[Projection, ...]
    heads: int
    key_heads: int
    size: int
    calls_interface: bool
    watch: Watch | None = field(default=None, repr=False)

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> None:
        """Show what the module attends with, in its forward pass; does nothing in steps in which nothing is clipped.

        The arguments are those of torch's scaled_dot_product_attention.

        Args:
            query: (batch, heads, tokens, size), with position embeddings applied.
            key: (batch, key_heads, tokens, size), or with the key heads repeated to as many as the query's.
            attn_mask: True, or an addend that is not hugely negative, where a query attends to a key.
            is_causal: whether a query attends to keys at its own place and before it alone.
            scale: of the logits; None for size ** -0.5.
        """
        if self.watch is not None:
            self.watch(query, key, attn_mask=attn_mask, is_causal=is_causal, scale=scale)


def register_attention(
    module: nn.Module, *, query: nn.Linear, key: nn.Linear, heads: int, key_heads: int | None = None
) -> Callable[..., None]:
    """Say which maps make the queries and keys of ``module``, for ``"qk_clip"``. Call it before the optimizer is built.

    Outputs lie head by head. A map that makes queries, keys and values, one after the other, is passed as both.

    Args:
        module: that attends in its forward pass.
        query: makes the queries, heads * size outputs.
        key: makes the keys, key_heads * size outputs.
        heads: of the queries.
        key_heads: of the keys (and values), if fewer heads of them are shared by several of the queries.

    Returns:
        `Attention.observe`, which the forward pass must call with the queries and keys that it attends with, as in
        ``self.observe(q, k, is_causal=True)``, unless it calls the attention function of transformers' interface.

    Raises:
        ConfigError: numbers that do not fit each other.
    """
    count = heads if key_heads is None else key_heads
    joined = query is key
    total = _outputs(query)
    size, rest = divmod(total, heads + 2 * count if joined else heads)
    if min(heads, count) < 1 or heads % count or rest or (not joined and _outputs(key) != count * size):
        raise ConfigError(
            f"register_attention: got {heads} heads and {count} of keys for maps of {total} and {_outputs(key)} outputs; "
            "allowed: heads that the outputs divide by, all of one size, shared evenly"
        )
    wide = Fused(("q", "k", "v") if joined else ("q",), (heads * size, count * size, count * size), (heads, count, count))
    projections: list[Projection] = []
    if joined:
        projections.append(Projection(query, (*_rows(wide, 0, count), *_rows(wide, 1, count)), total))
    else:
        narrow = Fused(("k",), (count * size,), (count,))
        projections += [Projection(query, _rows(wide, 0, count), total), Projection(key, _rows(narrow, 0, count), count * size)]
    found = Attention(module, tuple(projections), heads, count, size, calls_interface(module))
    setattr(module, _REGISTERED, found)
    return found.observe


def calls_interface(module: nn.Module) -> bool:
    """Whether the forward pass of ``module`` calls the attention function of transformers' interface."""
    code = getattr(forward_of(module), "__code__", None)
    return code is not None and INTERFACE in code.co_names


def forward_of(module: nn.Module) -> Any:
    """Return the function that is the forward pass of the class of ``module``, without decorators."""
    return inspect.unwrap(type(module).forward)


def attention_of(models: Sequence[nn.Module]) -> dict[str, Attention]:
    """Find the attention that is trained in ``models``, by the qualified name of its module.

    Attention whose projections are all frozen is left out. One that two models have is named as in the first.

    Raises:
        ConfigError: attention that QK-clip cannot bound, or none at all.
    """
    found: dict[str, Attention] = {}
    seen: set[int] = set()
    for path, module in (item for model in models for item in model.named_modules()):
        if id(module) in seen:
            continue
        seen.add(id(module))
        attention = _attention(path, module)
        if attention is not None and _is_trained(path, attention):
            found[path] = attention
    if not found:
        raise ConfigError(
            f"qk_clip: found no attention to bound in {type(models[0]).__name__}; looked for modules that call transformers' "
            f"attention interface ({INTERFACE}) and have trainable q and k projections, and for registered ones; allowed: "
            f"{_WAY_OUT}"
        )
    _refuse_shared(found)
    return found


def _attention(path: str, module: nn.Module) -> Attention | None:
    registered: Attention | None = vars(module).get(_REGISTERED)
    if registered is not None:
        return registered
    joins = _joined_by(module)
    if not calls_interface(module):
        if isinstance(module, nn.MultiheadAttention) or (_makes("q", joins) and _makes("k", joins)):
            raise _refusal(path, module, "attention that does not call transformers' attention interface", _WAY_OUT)
        return None
    _refuse_bounded(path, module)
    if all(hasattr(module, name) for name in _LATENT):
        return _latent(path, module)
    queries, keys = _makes("q", joins), _makes("k", joins)
    if not queries or not keys:
        names = ", ".join(name for name, _ in module.named_children())
        raise _refusal(path, module, f"attention whose q and k projections are not known among {names}", _WAY_OUT)
    (query, of_query, q), (key, of_key, k) = queries[0], keys[0]
    heads, count = of_query.heads[q], of_key.heads[k]
    size = of_query.parts[q] // heads
    if heads % count or of_key.parts[k] // count != size or getattr(module, "head_dim", size) != size:
        raise _refusal(path, module, f"{heads} heads of queries and {count} of keys of other sizes", _WAY_OUT)
    rows_q, rows_k = _rows(of_query, q, count), _rows(of_key, k, count)
    if query is key:
        return Attention(module, (Projection(query, (*rows_q, *rows_k), _outputs(query)),), heads, count, size, True)
    projections = Projection(query, rows_q, _outputs(query)), Projection(key, rows_k, _outputs(key))
    return Attention(module, projections, heads, count, size, True)


def _joined_by(module: nn.Module) -> list[tuple[str, nn.Module, Fused]]:
    """Return (name, module, what it joins) of each linear map directly in ``module`` of which routing knows that."""
    found = []
    for name, child in module.named_children():
        weight = getattr(child, "weight", None)
        fused = tags_of(weight).kind.fused if isinstance(weight, Tensor) else None
        if fused is not None:
            found.append((name, child, fused))
    return found


def _makes(letter: str, joins: Iterable[tuple[str, nn.Module, Fused]]) -> list[tuple[nn.Module, Fused, int]]:
    """Return (module, what it joins, number among these) of the maps that make queries, "q", or keys, "k"."""
    own = _QUERIES if letter == "q" else _KEYS
    return [
        (module, fused, fused.names.index(name))
        for where, module, fused in joins
        for name in (where if where in own else letter,)
        if name in fused.names
    ]


def _rows(fused: Fused, part: int, key_heads: int) -> tuple[HeadRows, ...]:
    """Return the outputs of each head of one part of what a map joins; several heads of queries belong to one of the keys."""
    units = min(fused.heads) if fused.block else 1
    unit, before = sum(fused.parts) // units, sum(fused.parts[:part]) // units
    heads = fused.heads[part]
    size, shared = fused.parts[part] // heads, heads // key_heads
    found = []
    for head in range(heads):
        turn, place = divmod(head, heads // units)
        found.append(HeadRows(turn * unit + before + place * size, size, head // shared))
    return tuple(found)


def _latent(path: str, module: nn.Module) -> Attention:
    """Return multi-head latent attention, whose keys have a rotary part that all heads share.

    That part is left alone, so that the factor of its product is all on the queries' side (Kimi K2, section 2.1).
    """
    query = getattr(module, "q_b_proj", None) or getattr(module, "q_proj", None)
    key = getattr(module, "kv_b_proj", None)
    config = getattr(module, "config", None)
    names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_attention_heads")
    numbers = [found for name in names if isinstance(found := getattr(config, name, None), int)]
    if len(numbers) != len(names) or not isinstance(query, nn.Module) or not isinstance(key, nn.Module):
        found = "latent attention without q_proj or q_b_proj, or whose configuration lacks one of " + ", ".join(names)
        raise _refusal(path, module, found, _WAY_OUT)
    plain, rotary, value, heads = numbers
    size, joint = plain + rotary, plain + value
    if _outputs(query) != heads * size or _outputs(key) != heads * joint:
        found = f"latent attention of {_outputs(query)} and {_outputs(key)} outputs"
        raise _refusal(path, module, found, f"{heads * size} and {heads * joint} by its numbers, or {_WAY_OUT}")
    of_query = [
        rows
        for head in range(heads)
        for rows in (HeadRows(head * size, plain, head), HeadRows(head * size + plain, rotary, head, power=1.0))
    ]
    of_key = [HeadRows(head * joint, plain, head) for head in range(heads)]
    projections = Projection(query, tuple(of_query), heads * size), Projection(key, tuple(of_key), heads * joint)
    return Attention(module, projections, heads, heads, size, True)


def _refuse_bounded(path: str, module: nn.Module) -> None:
    """Refuse attention whose logits do not follow the weights: what is normalised or clamped has a bound of its own."""
    config = getattr(module, "config", None)
    norm = next((name for name, _ in module.named_children() if _NORM.match(name)), None)
    if norm is not None:
        found = f"{norm}, which normalises queries or keys, so that scaling their weights changes nothing"
        raise _refusal(path, module, found, 'no "qk_clip" for such a model: its norms bound the logits')
    wrapped = next((name for name, child in module.named_children() if _PROJECTION.match(name) and _is_wrapped(child)), None)
    if wrapped is not None:
        raise _refusal(path, module, f"{wrapped} with an adapter, so that no rows of one weight make its outputs", _NO_ADAPTERS)
    if getattr(config, "clip_qkv", None) is not None:
        raise _refusal(path, module, "clip_qkv, which clamps queries and keys", 'no clip_qkv, or no "qk_clip"')
    if getattr(module, "reorder_and_upcast_attn", False) and getattr(config, "_attn_implementation", "") == "eager":
        raise _refusal(path, module, "reorder_and_upcast_attn, which attends without the interface", "another implementation")


def _is_trained(path: str, attention: Attention) -> bool:
    """Whether the projections are trained, all of them.

    Raises:
        ConfigError: some are frozen, or have parameters beside weight and bias, as adapters.
    """
    trained = set()
    for projection in attention.projections:
        own = {id(parameter) for parameter in projection.parameters}
        for parameter in projection.module.parameters():
            trained.add(parameter.requires_grad)
            if id(parameter) not in own and parameter.requires_grad:
                found = f"a {type(projection.module).__name__} with parameters beside weight and bias"
                raise _refusal(path, attention.module, found, _NO_ADAPTERS)
    if trained == {True, False}:
        raise _refusal(path, attention.module, "q and k projections of which some are frozen", "all of them trained, or none")
    return trained == {True}


def _refuse_shared(found: Mapping[str, Attention]) -> None:
    """Refuse a projection that two modules have: it would be rescaled for both."""
    seen: dict[int, str] = {}
    for path, attention in found.items():
        for parameter in _parameters(attention):
            other = seen.setdefault(id(parameter), path)
            if other != path:
                raise _refusal(path, attention.module, f"a projection that {other} has too", "projections of its own")


def _parameters(attention: Attention) -> Iterator[Tensor]:
    for projection in attention.projections:
        yield from projection.parameters


def _refusal(path: str, module: nn.Module, found: str, allowed: str) -> ConfigError:
    return ConfigError(f"qk_clip: {path or 'the model'} ({type(module).__name__}): got {found}; allowed: {allowed}")


def _outputs(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, Tensor)
    shape = full_shape(weight)
    return shape[-1] if _is_transposed(module) else shape[0]


def _is_wrapped(module: nn.Module) -> bool:
    """Whether PEFT has put an adapter around a layer."""
    return hasattr(module, "base_layer")


def _is_transposed(module: nn.Module) -> bool:
    return isinstance(module.weight, Tensor) and tags_of(module.weight).kind.transposed
