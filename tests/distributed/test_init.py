"""What ``ds-optforge init`` writes trains on two ranks, at the first attempt, as a configuration written by hand does.

The three ways from AdamW to Muon: a script of DeepSpeed, the HF Trainer, and a loop through Accelerate.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from ds_optforge.cli import main
from tests.distributed import cases
from tests.distributed.conftest import Pools

STEPS = 6
SAME_ON_STAGES = 1e-3  # sums in another order, which bfloat16 amplifies
TO_MATCH = {"scale": "match_rms_adamw", "rms": 0.4}
LAST = {"betas": [0.9, 0.95], "eps": 1e-6}


def migrated(folder: Path, name: str, content: str, *options: str) -> tuple[dict[str, Any], str]:
    """(the configuration that init writes, which check calls valid; what is left to do)."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    out = folder / "new.json"
    assert main(["init", "--from", str(folder / name), "--out", str(out), *options]) == 0
    assert main(["check", str(out)]) == 0
    return json.loads(out.read_text()), (folder / "new.json.reasons.md").read_text().partition("## To do")[2]


def assert_trains(losses: list[float]) -> None:
    assert all(math.isfinite(loss) for loss in losses)
    assert len(losses) == STEPS


OPTIMIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "AdamW": (
        {"lr": 3e-3, "weight_decay": 0.1, **LAST},
        {
            "name": "muon",
            "lr": 3e-3,
            "weight_decay": 0.1,
            "orthogonalization": TO_MATCH,
            "adamw": {"lr": 3e-3, "weight_decay": 0.1, **LAST},
        },
    ),
    "Muon": (
        {"muon_lr": 0.02, "adam_lr": 3e-3, "weight_decay": 0.1, **LAST},
        {"name": "muon", "lr": 0.02, "weight_decay": 0.1, "adamw": {"lr": 3e-3, "weight_decay": 0.1, **LAST}},
    ),
    "Lion": (
        {"lr": 3e-4, "betas": [0.9, 0.99], "weight_decay": 0.5},
        {
            "name": "muon",
            "lr": 3e-4,
            "weight_decay": 0.5,
            "orthogonalization": {"scale": "match_rms_adamw", "rms": 1.0},
            "roles": {
                "embedding": {"name": "lion", "lr": 3e-4, "betas": [0.9, 0.99], "weight_decay": 0.5},
                "unembedding": {"name": "lion", "lr": 3e-4, "betas": [0.9, 0.99], "weight_decay": 0.5},
                "scalar": {"name": "lion", "lr": 3e-4, "betas": [0.9, 0.99]},
            },
        },
    ),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_script_of_deepspeed(kind: str, pools: Pools, tmp_path: Path) -> None:
    """bf16 and WarmupCosineLR; ZeRO-2 and ZeRO-3 give the same losses, and those of the configuration written by hand."""
    given, by_hand = OPTIMIZERS[kind]
    cosine = {"total_num_steps": STEPS, "warmup_num_steps": 2, "warmup_type": "linear", "cos_min_ratio": 0.1}
    losses = {}
    for stage in (2, 3):
        beside = {"train_batch_size": 8, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
        source = {"optimizer": {"type": kind, "params": given}, "scheduler": {"type": "WarmupCosineLR", "params": cosine}}
        config, _ = migrated(tmp_path / str(stage), "ds.json", json.dumps({**beside, **source}))
        first, second = pools[2].run(cases.train, config, STEPS)
        assert first["losses"] == second["losses"]
        assert_trains(first["losses"])
        losses[stage] = first["losses"]
        schedule = {"name": "cosine", "warmup_num_steps": 2, "total_num_steps": STEPS, "final_lr_fraction": 0.1}
        written = {"optimizer": {"type": "OptForge", "params": by_hand}, "scheduler": {"type": "OptForgeSchedule"}}
        written["scheduler"]["params"] = schedule
        assert pools[2].run(cases.train, {**beside, **written}, STEPS)[0]["losses"] == losses[stage]
    assert losses[2] == pytest.approx(losses[3], rel=SAME_ON_STAGES)


def arguments(folder: Path, stage: int) -> str:
    """A file of TrainingArguments, beside the DeepSpeed file that it names."""
    autos = {key: "auto" for key in ("lr", "betas", "eps", "weight_decay")}
    lengths = {key: "auto" for key in ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")}
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": autos},
        "scheduler": {"type": "WarmupDecayLR", "params": lengths},
    }
    (folder / "ds.json").write_text(json.dumps(config))
    named = {"deepspeed": "ds.json", "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    return json.dumps({"output_dir": "x", **SETTINGS, **named})


SETTINGS = {"learning_rate": 3e-3, "weight_decay": 0.1, "warmup_steps": 2, "max_steps": STEPS, "max_grad_norm": 0.5}


def test_the_trainer(pools: Pools, tmp_path: Path) -> None:
    """The file's learning_rate is that of all groups; LLaMA-Factory's callback registers as ``register`` does."""
    frameworks = pytest.importorskip("tests.distributed.frameworks", reason="transformers is not installed (extra 'hf')")
    model = "model_name_or_path: x\ntemplate: default\nfinetuning_type: full\ntrain_from_scratch: true\n"
    _, printed = migrated(tmp_path / "factory", "train.yaml", model)
    (callback,) = re.findall(r"^class Register.*?(?=^if __name__)", printed, re.DOTALL | re.MULTILINE)
    losses = {}
    for stage, registers in ((2, ""), (3, callback)):
        config, _ = migrated(tmp_path, "arguments.json", arguments(tmp_path, stage))
        first, second = pools[2].run(frameworks.train_llama, config, str(tmp_path), SETTINGS, registers=registers)
        assert first["losses"] == second["losses"]
        assert_trains(first["losses"])
        losses[stage] = first["losses"]
        assert {round(rate, 12) for rate in first["rates"][1].values()} == {3e-3}
        decays = {group["optforge_group"]: group["weight_decay"] for group in first["groups"]}
        expected = {"matrix.muon": 0.1, "embedding.adamw": 0.1, "unembedding.adamw": 0.1, "scalar.adamw": 0.0}
        assert decays == expected
        adamw = {"lr": 3e-3, "weight_decay": 0.1, **LAST}
        by_hand = {"name": "muon", "lr": "auto", "weight_decay": "auto", "orthogonalization": TO_MATCH, "adamw": adamw}
        lengths = {"name": "linear", "warmup_num_steps": "auto", "total_num_steps": "auto"}
        config["optimizer"], config["scheduler"]["params"] = {"type": "OptForge", "params": by_hand}, lengths
        assert pools[2].run(frameworks.train_llama, config, str(tmp_path), SETTINGS)[0]["losses"] == losses[stage]
        for file in ("new.json", "new.json.reasons.md"):
            (tmp_path / file).unlink()
    assert losses[2] == pytest.approx(losses[3], rel=SAME_ON_STAGES)


def test_a_loop_through_accelerate(pools: Pools, tmp_path: Path) -> None:
    """The code that init prints, with the AdamW's rate and decay, and the schedule that the loop had."""
    frameworks = pytest.importorskip("tests.distributed.frameworks", reason="transformers is not installed (extra 'hf')")
    losses = {}
    for stage in (2, 3):
        content = f"distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: {stage}\n  gradient_clipping: 0.5\n"
        config, printed = migrated(tmp_path / str(stage), "launch.yaml", content)
        snippets = re.findall(r"```python\n(.*?)```", printed, re.DOTALL)
        names = {"LEARNING_RATE": 3e-3, "WEIGHT_DECAY": 0.1}
        first, second = pools[2].run(frameworks.train_as_printed, config, snippets, names, STEPS)
        assert first["losses"] == second["losses"]
        assert_trains(first["losses"])
        losses[stage] = first["losses"]
        cosine = [0.5 * (1 + math.cos(math.pi * progress / 4)) for progress in range(4)]
        for found, factor in zip(first["rates"], [0, 0.5, *cosine], strict=True):
            assert found.keys() == {"matrix.muon", "embedding.adamw", "unembedding.adamw", "scalar.adamw"}
            assert list(found.values()) == pytest.approx([3e-3 * factor] * 4)
    assert losses[2] == pytest.approx(losses[3], rel=SAME_ON_STAGES)
