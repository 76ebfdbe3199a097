"""Files of a pipeline that cannot be told apart, or contradict each other, are refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ds_optforge import CheckpointError
from ds_optforge.checkpoint.layer_files import stages

FOLDER = Path("/saved/global_step3")
WEIGHT = torch.arange(6.0).view(2, 3)


def model(*names: str) -> dict[Path, Any]:
    """The only stage, without ZeRO, with parameters of these names."""
    described = {"placement": {"names": list(names)}, "shapes": [[2, 3] for _ in names]}
    optimizer = {"optforge": [described], "state": {}}
    states = {"mp_world_size": 1, "dp_world_size": 1, "frozen_param_shapes": None, "buffer_names": [], "optimizer": optimizer}
    return {FOLDER / "mp_rank_00_model_states.pt": states}


def layers(**weights: torch.Tensor) -> dict[Path, Any]:
    return {FOLDER / f"{name}-model_states.pt": {"weight": weight} for name, weight in weights.items()}


def test_a_tied_layer_is_found_by_its_shapes() -> None:
    """Its file has a number only, and so has that of its other place."""
    names = ("tied_modules.embed.weight", "1.weight")
    ((found,), _) = stages(model(*names), {}, layers(layer_00=WEIGHT, layer_01=-WEIGHT, layer_02=WEIGHT.clone()))[0]
    assert found["module"].keys() == set(names)
    assert torch.equal(found["module"]["tied_modules.embed.weight"], WEIGHT)


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        (("tied_modules.a.weight", "tied_modules.b.weight"), {"layer_00": WEIGHT}, "layer_00-model_states.pt: may be any of"),
        (("tied_modules.a.weight",), {"layer_00": WEIGHT, "layer_02": -WEIGHT}, "layer_02-model_states.pt: holds other values"),
        (("0.weight", "1.weight"), {"layer_00": WEIGHT}, r"no layer_\*-model_states.pt holds '1.weight'"),
        (("0.weight",), {"layer_00-model_00": WEIGHT}, "layer_00-model_00-model_states.pt: is of a tensor-parallel pipeline"),
    ],
    ids=["two keys", "other values", "missing", "tensor parallelism"],
)
def test_what_cannot_be_told_is_refused(names: tuple[str, ...], given: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        stages(model(*names), {}, layers(**given))
