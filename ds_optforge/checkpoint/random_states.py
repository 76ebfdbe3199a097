"""The states of a rank's random generators, as tensors of a checkpoint."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy
import torch
from torch import Tensor

from ds_optforge.checkpoint.files import Checkpoint
from ds_optforge.errors import CheckpointError
from ds_optforge.reading import json_value

Set: TypeAlias = Callable[[Any], Any]


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
    found = {kind: checkpoint.whole(name) for kind, name in names.items() if name in checkpoint.tensors}
    try:
        _set(found, torch.Generator().set_state, random.Random().setstate, numpy.random.RandomState().set_state)
    except Exception as error:  # of any kind: tried on generators that nobody draws from, before anything changes
        raise CheckpointError(f"{checkpoint.folder}: random/{rank} is no random state ({error})") from None
    return found


def set_random_states(found: Mapping[str, Tensor]) -> None:
    """Set the generators of this rank to what `saved_random_states` returned."""
    _set(found, torch.set_rng_state, random.setstate, numpy.random.set_state)
    if "accelerator" in found:
        torch.get_device_module().set_rng_state(found["accelerator"])


def _set(found: Mapping[str, Tensor], set_torch: Set, set_python: Set, set_numpy: Set) -> None:
    if "torch" in found:
        set_torch(found["torch"])
    if "python" in found:
        version, keys, gauss = json_value(found["python"].numpy().tobytes())
        set_python((version, tuple(keys), gauss))
    if "numpy" in found:
        kind, words, *rest = json_value(found["numpy"].numpy().tobytes())
        set_numpy((kind, numpy.array(words, dtype=numpy.uint32), *rest))
