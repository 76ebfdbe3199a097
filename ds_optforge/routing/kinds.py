"""What each weight of a model is, from the module that holds it: its class, its name and its place; the shape comes last.

transformers, PEFT and DeepSpeed are recognised by the names of their classes and attributes, and never imported.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from ds_optforge.routing.fused import Fused, fused_in
from ds_optforge.routing.heads import head_weights
from ds_optforge.zero.shards import full_shape


@dataclass(frozen=True, slots=True)
class Kind:
    """What a weight is.

    Attributes:
        why: what it was recognised as, for people.
        role: "embedding", "unembedding" or "scalar"; None for a matrix, and where the shape decides.
        hidden: whether it is known to be a hidden linear map, so that its aspect ratio does not matter.
        elementwise: whether a matrix rule leaves it to adamw whatever its shape.
        matrix: (rows, cols) of each of its matrices; None if the shape decides.
        transposed: whether it is stored (in, out).
        fused: the matrices that it joins; None if nothing is known of any.
    """

    why: str
    role: Literal["embedding", "unembedding", "scalar"] | None = None
    hidden: bool = False
    elementwise: bool = False
    matrix: tuple[int, int] | None = None
    transposed: bool = False
    fused: Fused | None = None


UNKNOWN = Kind("its shape")

_HIDDEN = Kind("hidden linear map", hidden=True)
_TABLE = re.compile(
    r"relative|position|(^|_)pos_?(emb|enc)|(^|_)(latents?|query_tokens|quer(y|ies)_embed|codebooks?|codevectors|embed(ding)?s?)$"
)
_TOKEN = re.compile(r"(^|_)(cls|class|mask|dist|distillation|reg|register)_?(tokens?|embeddings?)$")
_BIAS = re.compile(r"(^|_)bias(_[a-z0-9]+)*$")
_SCALE = re.compile(r"(^|_)(layer_?scale|scales?|gamma|temperature|A_log|dt|time_[a-z]+)(_?\d+)?$")
_LINEAR = re.compile("Linear|^Conv1D$")
_ROUTER = re.compile("Router|TopKGate|MoEGate")
_STORED_IN_OUT = {"Llama4TextExperts"}  # others say so themselves: is_transposed


def kinds_of(model: nn.Module) -> Iterator[tuple[nn.Parameter, Kind]]:
    """Yield each parameter of ``model`` with what it is; a tied one once, as a table if one of its modules holds it as such."""
    heads = head_weights(model)
    modules = dict(model.named_modules())
    found: dict[int, tuple[nn.Parameter, Kind]] = {}
    for path, module in modules.items():
        for leaf, parameter in module.named_parameters(recurse=False):
            kind = _kind(modules, path, leaf, parameter)
            known = found.get(id(parameter), (parameter, None))[1]
            if known is None or (kind.role == "embedding" and known.role != "embedding"):
                found[id(parameter)] = (parameter, kind)
    for weight, kind in found.values():
        why = heads.get(id(weight)) if kind.role != "embedding" else None
        yield weight, Kind(why, "unembedding", transposed=kind.transposed) if why else kind


def _kind(modules: dict[str, nn.Module], path: str, leaf: str, parameter: Tensor) -> Kind:
    path, leaf, magnitude = _original(modules, path, leaf)
    module = modules[path]
    if magnitude:
        return Kind("magnitude of a normalised weight", "scalar")
    if getattr(parameter, "_no_weight_decay", False):
        return Kind("marked by the model as free of decay", "scalar")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or (leaf == "weight" and type(module).__name__.endswith("Embedding")):
        return Kind("embedding", "embedding")
    if _is_norm(module):
        return Kind("norm", "scalar")
    if _BIAS.search(leaf) and not _TABLE.search(leaf):
        return Kind("bias", "scalar")
    if isinstance(module, nn.modules.conv._ConvNd):
        return _convolution(module, parameter)
    kind = _matrix(modules, path, leaf, parameter)
    fused = fused_in(modules, path, leaf, full_shape(parameter), kind.transposed) if kind.hidden else None
    return replace(kind, fused=fused) if fused else kind


def _original(modules: dict[str, nn.Module], path: str, leaf: str) -> tuple[str, str, bool]:
    """Return the module and the name that a parametrized weight had before, and whether this is its magnitude."""
    owner, _, rest = path.rpartition("parametrizations.")
    if rest and owner.removesuffix(".") in modules and leaf.startswith("original"):
        return owner.removesuffix("."), rest, leaf == "original0"
    module = modules[path]
    if leaf in ("weight_g", "weight_v") and hasattr(module, "weight_g"):  # torch.nn.utils.weight_norm
        return path, "weight", leaf == "weight_g"
    plain = leaf.removesuffix("_orig")  # torch.nn.utils.spectral_norm, and pruning
    return path, plain if hasattr(module, plain) else leaf, False


def _is_norm(module: nn.Module) -> bool:
    name = type(module).__name__
    return "Norm" in name and not _LINEAR.search(name) and not any(True for _ in module.children())


def _convolution(module: nn.modules.conv._ConvNd, parameter: Tensor) -> Kind:
    shape = full_shape(parameter)
    groups = module.groups
    rows = shape[0] // groups  # of a transposed one these are inputs
    cols = shape.numel() // shape[0]
    if groups > 1 and module.in_channels == groups:
        return Kind("depthwise convolution", elementwise=True, matrix=(rows, cols), transposed=module.transposed)
    what = f"convolution of {groups} groups" if groups > 1 else "convolution"
    return Kind(what, hidden=True, matrix=(rows, cols), transposed=module.transposed)


def _matrix(modules: dict[str, nn.Module], path: str, leaf: str, parameter: Tensor) -> Kind:
    module, parent = modules[path], modules.get(path.rpartition(".")[0])
    name, own = type(module).__name__, path.rpartition(".")[2]
    linear = leaf == "weight" and (isinstance(module, nn.Linear) or _LINEAR.search(name) is not None)
    if _ROUTER.search(name) or "router" in own or (linear and _chooses_experts(own, parent)):
        return Kind("router", elementwise=True)
    if linear and own.endswith("gate") and full_shape(parameter)[0] == 1:
        return Kind("gate", "scalar")
    if linear and own == "dt_proj":
        return Kind("time step of a state-space model", elementwise=True)
    if linear:
        stored = name == "Conv1D" and hasattr(module, "nf")  # transformers'
        return replace(_HIDDEN, transposed=stored)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return replace(_HIDDEN, why="recurrent map")
    if isinstance(module, nn.MultiheadAttention):
        return replace(_HIDDEN, why="projection of attention")
    if len(full_shape(parameter)) > 2 and ("Expert" in name or own == "experts"):
        stored = bool(getattr(module, "is_transposed", name in _STORED_IN_OUT))
        return replace(_HIDDEN, why="experts", transposed=stored)
    return _named(leaf, len(full_shape(parameter)))


def _chooses_experts(own: str, parent: nn.Module | None) -> bool:
    """Whether a linear map of that name in ``parent`` chooses between experts."""
    if parent is None or own not in ("gate", "router", "wg", "gating"):
        return False
    return hasattr(parent, "experts") or _ROUTER.search(type(parent).__name__) is not None


def _named(leaf: str, dimensions: int) -> Kind:
    """Recognise a parameter that no known module holds by its name."""
    if _TOKEN.search(leaf):
        return Kind("class or mask token", "scalar")
    if dimensions > 1 and _TABLE.search(leaf):
        return Kind("table of positions, latents or codes", "embedding")
    if _SCALE.search(leaf):
        return Kind("scale", "scalar")
    return UNKNOWN
