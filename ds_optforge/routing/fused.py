"""The matrices that a weight joins, as far as its module and the model's configuration tell: for ``"auto"``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

# Of attention whose outputs are q, k, v one after the other: all heads of each.
_JOINED = ("qkv", "qkv_proj", "Wqkv", "c_attn", "qkv_linear")
# Classes whose layout is another, with names of the above. None is split.
_OTHERS = ("CodeGenAttention", "MiniMaxLightningAttention", "GPTBigCodeAttention")
# Of each head q, k, v; then the next head's.
_BY_HEAD = ("GPTNeoXAttention", "GPTNeoXJapaneseAttention", "BloomAttention", "PersimmonAttention")
_HEADED = {"q_proj": False, "query": False, "q_b_proj": False, "k_proj": True, "v_proj": True, "key": True, "value": True}


@dataclass(frozen=True, slots=True)
class Fused:
    """The matrices that a weight joins.

    Attributes:
        names: of the matrices, as people call them.
        parts: output rows of each.
        heads: number of equal blocks of rows, one per head, of each; 1 for a matrix without heads.
        block: rows of a part that follow each other before the next part's; 0 if the parts follow each other whole.
    """

    names: tuple[str, ...]
    parts: tuple[int, ...]
    heads: tuple[int, ...]
    block: int = 0

    def __str__(self) -> str:
        """Return the names, and how they lie."""
        return ", ".join(self.names) + (" by turns" if self.block else "")


def fused_in(modules: Mapping[str, nn.Module], path: str, leaf: str, shape: torch.Size, transposed: bool) -> Fused | None:
    """Return the matrices that a weight joins, or the heads of one that joins none; None if nothing is known.

    Args:
        modules: of the model, by qualified name.
        path: of the module that holds the weight.
        leaf: name of the weight in it.
        shape: of the whole weight.
        transposed: whether it is stored (in, out).
    """
    module = modules[path]
    outputs = shape[-1] if transposed else shape[-2]
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return _recurrent(module, leaf, outputs)
    if isinstance(module, nn.MultiheadAttention):
        return _multihead(module, leaf, outputs)
    if leaf == "gate_up_proj" and getattr(module, "has_gate", True):
        by_turns = not getattr(module, "is_concatenated", True)
        return _halves(("gate", "up"), outputs, int(by_turns))
    parent, own = modules.get(path.rpartition(".")[0]), path.rpartition(".")[2]
    if parent is None or leaf != "weight":
        return None
    if own in ("gate_up_proj", "Wi"):
        return _halves(("gate", "up") if own == "gate_up_proj" else ("up", "gate"), outputs)
    if own == "in_proj" and hasattr(parent, "conv1d"):
        return _state_space(parent, outputs)
    return _attention(parent, _Numbers(modules, path), own, outputs)


class _Numbers:
    """Numbers of a layer: from its module's attributes, else from the nearest configuration around it."""

    def __init__(self, modules: Mapping[str, nn.Module], path: str) -> None:
        parts = path.split(".")
        around = [modules[".".join(parts[:count])] for count in range(len(parts) - 1, -1, -1)]
        self._module = around[0]
        self._config = next((config for module in around if (config := getattr(module, "config", None)) is not None), None)

    def __call__(self, *names: str) -> int | None:
        for source in (self._module, self._config):
            for name in names:
                value = getattr(source, name, None)
                if type(value) is int and value > 0:
                    return value
        return None

    def flag(self, name: str) -> bool:
        """Return a flag of the module or the configuration; False if neither has it."""
        return bool(getattr(self._module, name, getattr(self._config, name, False)))


def _attention(parent: nn.Module, number: _Numbers, own: str, outputs: int) -> Fused | None:
    name = type(parent).__name__
    heads = number("num_heads", "num_attention_heads", "n_heads", "n_head")
    if heads is None or name in _OTHERS:
        return None
    if own == "kv_a_proj_with_mqa":
        return _listed(("latent", "rotary key"), (number("kv_lora_rank"), number("qk_rope_head_dim")), outputs)
    if own == "kv_b_proj":
        return Fused(("k and v",), (outputs,), (heads,)) if outputs % heads == 0 else None
    if own in _HEADED:
        count = (number("num_key_value_heads", "num_kv_heads", "n_kv_heads") or heads) if _HEADED[own] else heads
        return Fused((own,), (outputs,), (count,)) if outputs % count == 0 else None
    if own == "query_key_value":
        return _query_key_value(name, number, heads, outputs)
    return _joined(number, heads, outputs) if own in _JOINED else None


def _joined(number: _Numbers, heads: int, outputs: int) -> Fused | None:
    """Return q, k, v one after the other, with fewer heads of k and v where the numbers of rows say so."""
    groups = number("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads")
    for count in dict.fromkeys((groups or heads, heads)):
        size, rest = divmod(outputs, heads + 2 * count)
        if not rest and (count == heads or size == number("head_dim")):
            return Fused(("q", "k", "v"), (heads * size, count * size, count * size), (heads, count, count))
    return None


def _query_key_value(name: str, number: _Numbers, heads: int, outputs: int) -> Fused | None:
    if name in _BY_HEAD and outputs % (3 * heads) == 0:
        return Fused(("q", "k", "v"), (outputs // 3,) * 3, (heads,) * 3, outputs // (3 * heads))
    if not name.startswith("Falcon"):
        return None
    groups = number("num_kv_heads")
    if number.flag("new_decoder_architecture"):  # of each group the q of its heads, k, v
        size = outputs // (heads + 2 * groups) if groups else 0
        found = _listed(
            ("q", "k", "v"),
            (heads * size, size * (groups or 0), size * (groups or 0)),
            outputs,
            (heads, groups or 0, groups or 0),
        )
        return replace(found, block=size) if found else None
    if number.flag("multi_query"):
        size = outputs // (heads + 2)
        return _listed(("q", "k", "v"), (heads * size, size, size), outputs, (heads, 1, 1))
    return Fused(("q", "k", "v"), (outputs // 3,) * 3, (heads,) * 3, outputs // (3 * heads))


def _state_space(mixer: nn.Module, outputs: int) -> Fused | None:
    """Return the parts of a Mamba mixer's in_proj."""
    inner = getattr(mixer, "intermediate_size", None)
    heads, groups, state = (getattr(mixer, name, None) for name in ("num_heads", "n_groups", "ssm_state_size"))
    if inner and heads and groups and state:
        shared = 2 * groups * state
        return _listed(("gate", "x, B, C", "time step"), (inner, inner + shared, heads), outputs)
    return _listed(("x", "gate"), (inner, inner), outputs)


def _recurrent(module: nn.RNNBase | nn.RNNCellBase, leaf: str, outputs: int) -> Fused | None:
    gates = {"LSTM": ("input", "forget", "cell", "output"), "GRU": ("reset", "update", "new")}
    names = next((names for kind, names in gates.items() if type(module).__name__.startswith(kind)), ())
    if not names or "weight_hr" in leaf or outputs % len(names):
        return None
    return Fused(names, (outputs // len(names),) * len(names), (1,) * len(names))


def _multihead(module: nn.MultiheadAttention, leaf: str, outputs: int) -> Fused | None:
    if leaf == "in_proj_weight":
        return Fused(("q", "k", "v"), (outputs // 3,) * 3, (module.num_heads,) * 3)
    return Fused((leaf.removesuffix("_weight"),), (outputs,), (module.num_heads,)) if leaf.endswith("_proj_weight") else None


def _halves(names: tuple[str, str], outputs: int, block: int = 0) -> Fused | None:
    return Fused(names, (outputs // 2,) * 2, (1, 1), block) if outputs % 2 == 0 else None


def _listed(names: tuple[str, ...], parts: Sequence[Any], outputs: int, heads: tuple[int, ...] | None = None) -> Fused | None:
    """Return these parts if their sizes are known and add up."""
    if any(part is None for part in parts) or sum(parts) != outputs:
        return None
    return Fused(names, tuple(parts), heads or (1,) * len(parts))
