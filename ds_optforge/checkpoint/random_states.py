"""The states of a rank's random generators, as tensors of a checkpoint."""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy
import torch
from torch import Tensor

from ds_optforge.checkpoint.files import Checkpoint


def random_states() -> dict[str, Tensor]:
    """The states of this rank's random generators, as uint8 tensors."""
    version, keys, gauss = random.getstate()
    kind, words, *rest = cast("tuple[Any, ...]", numpy.random.get_state(legacy=True))
    states = {
        "torch": torch.get_rng_state(),
        "python": _bytes([version, keys, gauss]),
        "numpy": _bytes([kind, words.tolist(), *rest]),
    }
    if torch.accelerator.is_available():
        states["accelerator"] = torch.get_device_module().get_rng_state()
    return states


def _bytes(value: Sequence[Any]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def saved_random_states(checkpoint: Checkpoint, rank: int) -> dict[str, Tensor]:
    """The saved random states of a rank; none for a rank that the checkpoint lacks, which keeps its own."""
    names = {kind: f"random/{rank}/{kind}" for kind in random_states()}
    return {kind: checkpoint.whole(name) for kind, name in names.items() if name in checkpoint.tensors}


def set_random_states(found: Mapping[str, Tensor]) -> None:
    if "torch" in found:
        torch.set_rng_state(found["torch"])
    if "python" in found:
        version, keys, gauss = json.loads(found["python"].numpy().tobytes())
        random.setstate((version, tuple(keys), gauss))
    if "numpy" in found:
        kind, words, *rest = json.loads(found["numpy"].numpy().tobytes())
        numpy.random.set_state((kind, numpy.array(words, dtype=numpy.uint32), *rest))
    if "accelerator" in found:
        torch.get_device_module().set_rng_state(found["accelerator"])
