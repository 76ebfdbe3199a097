"""ms-swift trains with the plugin file of docs/frameworks/ms-swift.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.frameworks.environments import blocks, launch
from tests.frameworks.tuning import ACCELERATOR, GLOO, ROLES, SAVED, STEPS, check_same, check_two_ranks, logged, prepared

EXACT = '"orthogonalization": {"dtype": "float32", "scale": "match_rms_adamw"}, "sharding": {"wire_dtype": "float32"}'
ON_CPU = (
    "--model_type llama --template dummy --torch_dtype float32 --fp16 false --bf16 false --check_model false --report_to none "
    f"--accelerator_config '{json.dumps(ACCELERATOR)}' --add_version false --split_dataset_ratio 0 --learning_rate 3e-3 "
    f"--gradient_accumulation_steps 1 --max_steps {STEPS} --save_steps {SAVED} --logging_steps 1"
)


def train(folder: Path, stage: int, ranks: int, out: str = "out", more: str = "") -> Path:
    """The last checkpoint of a run of the page's command."""
    if not folder.exists():
        prepared("swift", folder, stage)
    code = blocks("ms-swift")
    plugin = code["optforge_swift.py"].replace('"orthogonalization": {"scale": "match_rms_adamw"}', EXACT)
    (folder / "optforge_swift.py").write_text(plugin)
    (folder / "gloo.py").write_text(GLOO)
    command = code["command"].replace("NPROC_PER_NODE=8", f"NPROC_PER_NODE={ranks}").replace("MODEL", "model")
    command = command.replace("DATA", "data/messages.jsonl").replace("zero3", f"zero{stage}")
    command = command.replace("--external_plugins", "--external_plugins gloo.py").strip()
    batch = f"--per_device_train_batch_size {4 // ranks} --output_dir {out}"
    launch("swift", f"{command} {ON_CPU} {batch} {more}", folder, ACCELERATE_USE_DEEPSPEED="true")
    return folder / out / f"checkpoint-{STEPS}"


@pytest.mark.compatibility("swift", verdict="exact")
@pytest.mark.parametrize("stage", [2, 3])
def test_full_fine_tuning(stage: int, tmp_path: Path) -> None:
    """Two ranks end with the weights of one, on ZeRO-1, and go on from a checkpoint bit for bit."""
    one = train(tmp_path / "one", 1, 1)
    two = train(tmp_path / "two", stage, 2)
    _, weights = check_two_ranks(two, one)
    assert {f"learning_rate/{role}" for role in ROLES} <= logged(two)
    again = train(tmp_path / "two", stage, 2, "again", f"--resume_from_checkpoint out/checkpoint-{SAVED}")
    check_same(again, weights)
