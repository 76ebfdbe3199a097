"""What the tests of frameworks around the HF Trainer share: the DeepSpeed file, `ds-optforge init`, and what a run has left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from ds_optforge.checkpoint.convert import read
from ds_optforge.checkpoint.export import export
from ds_optforge.checkpoint.files import Checkpoint
from ds_optforge.checkpoint.logical import weight_name
from ds_optforge.cli import main
from tests.distributed.test_parity import assert_same
from tests.frameworks.environments import launch
from tests.oracles import EXACT

STEPS, SAVED = 8, 4
# Of frameworks that leave the process group to Accelerate, which counts one process on a CPU unless it is told the backend. Nor
# does anything close the group, and of a rank that ends with one open gloo's threads may abort.
GLOO = """import atexit

from accelerate import PartialState

atexit.register(PartialState(backend="gloo").destroy_process_group)
"""
ACCELERATOR = {"use_configured_state": True, "dispatch_batches": False}
ROLES = {"matrix.muon", "embedding.adamw", "unembedding.adamw", "scalar.adamw"}


def prepared(framework: str, folder: Path, stage: int, given: dict[str, Any] | None = None) -> str:
    """Make a folder with a tiny model, data and ds.json; and train.yaml, which init reads. Return what that leaves to do.

    ds_muon.json, which init writes, then has float32 everywhere, so that runs can be compared.
    """
    folder.mkdir(exist_ok=True)
    if not (folder / "model").exists():
        launch(framework, "python -m tests.frameworks.tiny .", folder)
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": stage == 3},
    }
    (folder / "ds.json").write_text(json.dumps(config))
    if given is None:
        return ""
    (folder / "train.yaml").write_text(yaml.safe_dump(given))
    out, reasons = folder / "ds_muon.json", folder / "ds_muon.json.reasons.md"
    for made in (out, reasons):
        made.unlink(missing_ok=True)  # of an earlier run
    assert main(["init", "--from", str(folder / "train.yaml"), "--out", str(out)]) == 0
    config = json.loads(out.read_text())
    params = config["optimizer"]["params"]
    params["orthogonalization"] |= EXACT["orthogonalization"]
    params["sharding"] = EXACT["sharding"]
    out.write_text(json.dumps(config))
    return reasons.read_text().partition("## To do")[2]


def trained(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(parameter groups by name, weights by name) of a checkpoint of the Trainer, whose optimizer has to be OptForge."""
    _, manifest = read(checkpoint)
    out = checkpoint.with_name(checkpoint.name + "-exported")
    export(checkpoint, out)
    return {name: sorted(group["members"]) for name, group in manifest["groups"].items()}, load_file(out / "model.safetensors")


def trained_portable(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same of a portable checkpoint of a model that is not transformers'."""
    found = Checkpoint(checkpoint)
    shapes = found.manifest["shapes"]
    weights = {name: found.whole(weight_name(name)).view(shape) for name, shape in shapes.items()}
    return {name: sorted(group["members"]) for name, group in found.manifest["groups"].items()}, weights


def check_two_ranks(two: Path, one: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Two ranks ended with the weights of one and with the usual roles, and their loss fell. Return what ``trained`` does."""
    groups, weights = trained(two)
    assert groups.keys() == ROLES
    assert_same(weights, trained(one)[1])
    assert losses(two)[-1] < losses(two)[0]
    return groups, weights


def check_same(again: Path, weights: Mapping[str, Tensor]) -> None:
    """A run that went on from a checkpoint has these weights, bit for bit."""
    found = trained(again)[1]
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def losses(checkpoint: Path) -> list[float]:
    """Of the Trainer's log."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def logged(checkpoint: Path) -> set[str]:
    """What the first record of training in the Trainer's log has."""
    return set(json.loads((checkpoint / "trainer_state.json").read_text())["log_history"][0])
