"""Modules on the meta device to plan for, made from the models of the catalog or from a Hugging Face configuration."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_optforge.errors import ConfigError
from ds_optforge.forecast.catalog import EMBEDDINGS, HEAD, MODEL_SHAPES
from ds_optforge.reading import json_value, text

_ALLOWED = f"{', '.join(MODEL_SHAPES)}, or the path of a Hugging Face config.json or of its folder"
_MOST = 4096  # layers, and experts of a layer


def skeleton(model: str) -> nn.Module:
    """Make a module with the parameters of ``MODEL_SHAPES[model]``, on the meta device.

    It has no forward pass. Embeddings are nn.Embeddings and matrices are nn.Linears, from which their roles follow.
    """
    root = nn.Module()
    with torch.device("meta"):
        for name, shape in MODEL_SHAPES[model]:
            *path, last = name.split(".")
            if name in EMBEDDINGS:
                root.add_module(path[0], nn.Embedding(shape[0], shape[1]))
            elif name == HEAD or (last == "weight" and len(shape) == 2):
                _descend(root, path[:-1]).add_module(path[-1], nn.Linear(shape[1], shape[0], bias=False))
            else:
                _descend(root, path).register_parameter(last, nn.Parameter(torch.empty(shape)))
    return root


def _descend(module: nn.Module, path: list[str]) -> nn.Module:
    for name in path:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module


def load(model: str) -> nn.Module:
    """Make a module on the meta device: the `skeleton` of a model of the catalog, or the model of a Hugging Face config.json.

    Args:
        model: a name in `MODEL_SHAPES`, or the path of a Hugging Face config.json, or of a folder with one.

    Raises:
        ConfigError: ``model`` is neither, or transformers is missing or does not know the configuration.
    """
    if model in MODEL_SHAPES:
        return skeleton(model)
    if not Path(model).exists():
        near = get_close_matches(model.lower(), MODEL_SHAPES, n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise ConfigError(f"model: got {model!r}{hint}; allowed: {_ALLOWED}")
    _refuse_many_layers(model)
    try:
        import transformers
    except ImportError:
        raise ConfigError(f"{model}: needs transformers; allowed: {_ALLOWED}; pip install 'ds-optforge[hf]'") from None
    try:
        # Else transformers asks on the terminal whether to run the code that a configuration names.
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
        with torch.device("meta"):
            module = _model_of(transformers, config)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{model}: not the config.json of a model that transformers knows ({reason})") from None
    assert isinstance(module, nn.Module)
    return module


def _refuse_many_layers(model: str) -> None:
    """Raise ConfigError for a file that is no JSON object, or asks for more layers than any model has."""
    path = Path(model, "config.json") if Path(model).is_dir() else Path(model)
    try:
        config = json_value(text(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model}: not the config.json of a model that transformers knows ({error})") from None
    for key, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, int) and value > _MOST and any(word in key for word in ("layer", "expert", "block", "depth")):
            raise ConfigError(f"{model}: {key}: got {value}; allowed: {_MOST}")


def _model_of(transformers: Any, config: Any) -> Any:
    """Make the model that ``config`` names as its architecture; else a language model, else one without a head."""
    named = next((found for name in config.architectures or () if (found := getattr(transformers, name, None))), None)
    if named is not None:
        return named(config)
    try:
        return transformers.AutoModelForCausalLM.from_config(config)
    except ValueError:
        return transformers.AutoModel.from_config(config)
