"""Which parameters are adapters, and which of them are orthogonalized: LoRA and what builds on it.

Adapters are known by the names that PEFT gives the parts of its layers, which other packages use too, and by those of kohya-ss
and torchtune; none of them is imported.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from torch import nn

from ds_optforge.config.sections import Lora
from ds_optforge.errors import ConfigError

Factor = Literal["A", "B"]
Part = Literal["A", "B", "embedding", "experts", "magnitude"]

# Qu et al. 2026, "Can Muon Fine-tune Adam-Pretrained Models?" (arXiv 2605.10468), whose runs with Muon match or exceed those
# with AdamW, orthogonalize both; OneTrainer orthogonalizes B alone (github.com/Nerogar/OneTrainer/pull/1314).
_DEFAULT: Lora = "both"

# By the name of the attribute that holds the adapters of a layer, or is the only one.
_PARTS: dict[str, Part] = {
    "lora_A": "A",
    "lora_a": "A",
    "lora_down": "A",
    "lora_B": "B",
    "lora_b": "B",
    "lora_up": "B",
    "lora_embedding_A": "embedding",
    "lora_embedding_B": "embedding",
    "trainable_tokens_delta": "embedding",
    "lora_magnitude_vector": "magnitude",
}
_ADAPTER = re.compile(rf"(?:^|\.)({'|'.join(_PARTS)})(?:\.|$)")


def adapter_part(modules: Mapping[str, nn.Module], path: str, leaf: str) -> Part | None:
    """Return what a parameter is of an adapter; None if it is no adapter's.

    A and B are the factors of the change B A of a linear map or a convolution. Factors beside an embedding ("embedding") have a
    column or a row for each token. PEFT fuses the factors of all experts of a bank ("experts"): those of B alternate column by
    column, so that no expert's is a block of it. The magnitude is DoRA's.

    Args:
        modules: of the model, by name.
        path: of the module that holds the parameter.
        leaf: the parameter's name in that module.
    """
    name = f"{path}.{leaf}" if path else leaf
    found = _ADAPTER.search(name)
    if found is None:
        return None
    part, layer = _PARTS[found[1]], modules[name[: found.start()]]
    if part in ("A", "B") and isinstance(layer, nn.Embedding):  # loralib's
        return "embedding"
    if part in ("A", "B") and hasattr(layer, "parameter_name") and getattr(layer, "num_experts", 1) > 1:
        return "experts"
    return part


def takes(factor: Factor, lora: Lora | None) -> bool:
    """Return whether a matrix rule takes a factor.

    Args:
        factor: of an adapter.
        lora: as configured; None for the default.
    """
    return {"both": True, "b_only": factor == "B", "adamw": False}[lora or _DEFAULT]


def refuse_without_adapters(names: Iterable[str], lora: Lora | None, path: str = "optimizer.params") -> None:
    """Refuse a configured ``lora`` where no parameter is an adapter's.

    Args:
        names: of all parameters of the model.
        lora: as configured; None if it is not.
        path: of the section that it is in.

    Raises:
        ConfigError: no parameter is.
    """
    if lora is not None and not any(_ADAPTER.search(name) for name in names):
        raise ConfigError(
            f"{path}.lora: got '{lora}', but no parameter is an adapter's ({', '.join(_PARTS)} in its name); allowed: a model "
            "with adapters, as peft.get_peft_model returns one, or no such key"
        )
