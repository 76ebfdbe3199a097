"""Which parameters are adapters, and which of them are orthogonalized: LoRA and what builds on it.

Adapters are known by the names that PEFT gives the parts of its layers (``lora_A``, ``lora_B``, ``lora_embedding_A``,
``lora_magnitude_vector``), which other packages use too, and those of kohya-ss and torchtune; none of them is imported.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Literal

from torch import nn

from ds_optforge.config.sections import Lora
from ds_optforge.errors import ConfigError

Part = Literal["A", "B", "embedding", "experts", "magnitude"]

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


def adapter_parts(model: nn.Module) -> Iterator[tuple[nn.Parameter, Part]]:
    """Yield the adapters' parameters in ``model`` with what they are.

    A and B are the factors of a linear map's or a convolution's change B A. Factors beside an embedding ("embedding") have a
    column, or a row, for each token. PEFT fuses the factors of all experts of a bank ("experts"): B's alternate column by
    column, so that no expert's is a block of it. The magnitude is DoRA's.
    """
    for name, parameter in model.named_parameters():
        found = _ADAPTER.search(name)
        if found is None:
            continue
        part, layer = _PARTS[found[1]], model.get_submodule(name[: found.start()])
        if part in ("A", "B") and isinstance(layer, nn.Embedding):  # loralib's
            part = "embedding"
        elif part in ("A", "B") and getattr(layer, "num_experts", 1) > 1 and hasattr(layer, "parameter_name"):
            part = "experts"
        yield parameter, part


def left_to_adamw(part: Part, lora: Lora | None) -> str:
    """Return why a matrix rule leaves an adapter's parameter to adamw; empty if it does not.

    Args:
        part: what it is.
        lora: as configured; None for the default.
    """
    lora = lora or _DEFAULT
    if part not in ("A", "B"):
        return {"embedding": "adapter of an embedding", "experts": "fused adapters of experts", "magnitude": "magnitude"}[part]
    if lora == "adamw" or (lora == "b_only" and part == "A"):
        return f"factor {part} with lora '{lora}'"
    return ""


def refuse_without_adapters(names: Iterable[str], lora: Lora | None, path: str) -> None:
    """Refuse a configured ``lora`` where no parameter is an adapter's.

    Args:
        names: of all parameters of the model.
        lora: as configured; None if it is not.
        path: of the key, for the message.

    Raises:
        ConfigError: no parameter is.
    """
    if lora is not None and not any(_ADAPTER.search(name) for name in names):
        raise ConfigError(
            f"{path}: got '{lora}', but no parameter is an adapter's ({', '.join(_PARTS)} in its name); allowed: a model with "
            "adapters, as after peft.get_peft_model; or no such key"
        )
