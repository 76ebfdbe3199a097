"""LLaMA-Factory trains with what `ds-optforge init` makes of its file, and with the script that it prints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.frameworks.environments import blocks, launch
from tests.frameworks.tuning import ACCELERATOR, GLOO, SAVED, STEPS, check_same, check_two_ranks, prepared

GIVEN: dict[str, Any] = {
    "model_name_or_path": "model",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "full",
    "template": "empty",
    "dataset": "tiny",
    "dataset_dir": "data",
    "deepspeed": "ds.json",
    "output_dir": "out",
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "max_steps": STEPS,
    "save_steps": SAVED,
    "logging_steps": 1,
    "seed": 1,
}
ON_CPU = {"accelerator_config": ACCELERATOR, "report_to": "none", "overwrite_cache": True, "overwrite_output_dir": True}


def train(folder: Path, stage: int, ranks: int, **changes: Any) -> Path:
    """The last checkpoint of a run that follows what init prints."""
    to_do = prepared("llamafactory", folder, stage, GIVEN | {"per_device_train_batch_size": 4 // ranks})
    (script,) = re.findall(r"```python\n(.*?)```", to_do, re.DOTALL)
    assert script == blocks("llama_factory")["train_optforge.py"]
    (folder / "train_optforge.py").write_text(GLOO + script)
    (folder / "torchaudio.py").touch()  # that of the package index wants CUDA, and models of audio alone use it
    (lines,) = re.findall(r"In .*?:\n\n```\n(.*?)\n```", to_do, re.DOTALL)
    settings = yaml.safe_load((folder / "train.yaml").read_text())
    settings |= yaml.safe_load(lines.replace(str(folder) + "/", "")) | ON_CPU | changes
    (folder / "train.yaml").write_text(yaml.safe_dump(settings))
    command = blocks("llama_factory")["command"].replace("--nproc-per-node 8", f"--nproc-per-node {ranks}")
    launch("llamafactory", command, folder, ACCELERATE_USE_DEEPSPEED="true")
    return folder / settings["output_dir"] / f"checkpoint-{STEPS}"


@pytest.mark.compatibility("llama_factory", verdict="exact")
@pytest.mark.parametrize("stage", [2, 3])
def test_full_fine_tuning(stage: int, tmp_path: Path) -> None:
    """Two ranks end with the weights of one, on ZeRO-1, and go on from a checkpoint bit for bit."""
    one = train(tmp_path / "one", 1, 1)
    two = train(tmp_path / "two", stage, 2)
    groups, weights = check_two_ranks(two, one)
    assert [name for name in groups["matrix.muon"] if "layers.0" not in name] == []
    again = train(tmp_path / "two", stage, 2, output_dir="again", resume_from_checkpoint=f"out/checkpoint-{SAVED}")
    check_same(again, weights)
