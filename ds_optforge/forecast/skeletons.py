"""Modules on the meta device to plan for: of the models in the catalog, or of a Hugging Face configuration."""

from pathlib import Path

import torch
from torch import nn

from ds_optforge.errors import ConfigError
from ds_optforge.forecast.catalog import EMBEDDINGS, HEAD, MODEL_SHAPES

_ALLOWED = f"{', '.join(MODEL_SHAPES)}, or the path of a Hugging Face config.json"


def skeleton(model: str) -> nn.Module:
    """A module of `MODEL_SHAPES`' parameters, on the meta device. It cannot run; embeddings and the head are what they are."""
    root = nn.Module()
    with torch.device("meta"):
        for name, shape in MODEL_SHAPES[model]:
            *path, last = name.split(".")
            if name in EMBEDDINGS:
                root.add_module(path[0], nn.Embedding(shape[0], shape[1]))
            elif name == HEAD:
                root.add_module(path[0], nn.Linear(shape[1], shape[0], bias=False))
            else:
                _descend(root, path).register_parameter(last, nn.Parameter(torch.empty(shape)))
    return root


def _descend(module: nn.Module, path: list[str]) -> nn.Module:
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module


def load(model: str) -> nn.Module:
    """A module on the meta device: the `skeleton` of a shipped model, or what transformers builds from a config.json.

    Args:
        model: a name in `MODEL_SHAPES`, or the path of a Hugging Face config.json.

    Raises:
        ConfigError: neither, or a configuration that transformers does not know.
    """
    if model in MODEL_SHAPES:
        return skeleton(model)
    if not Path(model).exists():
        raise ConfigError(f"model: got {model!r}; allowed: {_ALLOWED}")
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    except ImportError:
        raise ConfigError(f"{model}: needs transformers; allowed: {_ALLOWED}; pip install 'ds-optforge[hf]'") from None
    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            try:
                module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
            except ValueError:  # no language model: no head
                module = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{model}: not the config.json of a model that transformers knows ({reason})") from None
    assert isinstance(module, nn.Module)
    return module
