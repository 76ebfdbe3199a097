"""Finds the output layers of a model: by what the model says, by name, and by place."""

import re
from collections.abc import Iterator

from torch import Tensor, nn

from ds_optforge.zero.pipeline import is_pipeline, last_layer
from ds_optforge.zero.shards import local_shape

# Of a Linear.
_NAME = re.compile(
    r"^(lm_head|heads?|unembed(ding)?|embed_out|output|output_layer|output_projection|classifier|score|(to_)?logits|qa_outputs"
    r"|cls|fc_out|.+_(heads?|classifier|logits|score|predictor))$"
)
# Of a module whose last Linear is the output.
_CONTAINER = re.compile(r"^(lm_head|heads?|classifier|cls|.+_(heads?|classifier|predictor))$")
# PEFT's layers that are trained whole beside adapters: the copy of a layer has a name below the layer's.
_TRAINED_WHOLE = re.compile(r"\.modules_to_save\.[^.]+$")
_ATTENTION = re.compile(r"^(multi|attn|attention)_heads?$")


def head_weights(model: nn.Module) -> dict[int, str]:
    """Return the weights of output layers, by the id of the parameter, each with what it was recognised by."""
    found: dict[int, str] = {}
    for weight, why in _weights(model):
        found.setdefault(id(weight), why)
    if not found and (linear := _last_by_place(model)):
        found[id(linear.weight)] = "output: the last layer"
    return found


def _weights(model: nn.Module) -> Iterator[tuple[Tensor, str]]:
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    weight = getattr(get_output_embeddings(), "weight", None) if get_output_embeddings else None
    if isinstance(weight, Tensor):
        yield weight, "output embedding"
    numbered = 1 if is_pipeline(model) else 0  # parts of a name that are the layer's number
    for name, module in model.named_modules():
        *path, own = _TRAINED_WHOLE.sub("", name).split(".")
        path = path[numbered:]
        if any(part.isdigit() for part in path):
            continue
        if isinstance(module, nn.Linear) and _NAME.match(own):
            yield module.weight, f"output: its name is '{own}'"
        elif _CONTAINER.match(own) and not _ATTENTION.match(own):
            output = _last_output(module)
            if output is not None:
                yield output, f"output: the last layer of '{own}'"
    last = _last_layer(model)
    if last is not None and (linear := _only_linear(last)):
        yield linear.weight, "output: the last layer"


def _last_output(container: nn.Module) -> Tensor | None:
    """Return the weight of the last Linear, or convolution of single pixels, in ``container``; None if it ends otherwise."""
    modules = [module for module in container.modules() if _matrices(module)]
    last = modules[-1] if modules else None
    if isinstance(last, nn.Linear):
        return last.weight
    if isinstance(last, nn.modules.conv._ConvNd) and set(last.kernel_size) == {1}:
        return last.weight
    return None


def _last_by_place(model: nn.Module) -> nn.Linear | None:
    """Return the Linear behind all other weights, outside any numbered layer and outside attention; else None.

    A chain is looked at by `_last_layer`, a container without a forward pass has no order, and what a model of transformers
    has for an output it says itself.
    """
    unordered = nn.Sequential | nn.ModuleList | nn.ModuleDict
    if isinstance(model, unordered) or is_pipeline(model) or hasattr(model, "get_output_embeddings"):
        return None
    modules = [(name, module) for name, module in model.named_modules() if _matrices(module)]
    if len(modules) < 2:
        return None
    name, last = modules[-1]
    parent = model.get_submodule(name.rpartition(".")[0])
    inside = any(part.isdigit() for part in name.split(".")) or isinstance(parent, nn.MultiheadAttention)
    return last if isinstance(last, nn.Linear) and not inside else None


def _last_layer(model: nn.Module) -> nn.Module | None:
    """Return the last layer with parameters of a PipelineModule, or of an nn.Sequential that holds an embedding; else None."""
    if is_pipeline(model):
        return last_layer(model)
    if not isinstance(model, nn.Sequential) or not any(isinstance(module, nn.Embedding) for module in model.modules()):
        return None
    return next((layer for layer in reversed(model) if any(True for _ in layer.parameters())), None)


def _only_linear(layer: nn.Module) -> nn.Linear | None:
    """Return the Linear that a layer is, or holds as its only one and its only matrix; else None."""
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    matrices = [parameter for parameter in layer.parameters() if len(local_shape(parameter)) > 1]
    return linears[0] if len(linears) == len(matrices) == 1 else None


def _matrices(module: nn.Module) -> bool:
    """Whether a module itself holds a parameter of two dimensions or more."""
    return any(len(local_shape(parameter)) > 1 for parameter in module.parameters(recurse=False))
