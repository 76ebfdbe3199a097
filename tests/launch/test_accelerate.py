"""`accelerate launch` with each of its files in launch/: the losses of the deepspeed launcher, with or without Accelerator."""

from __future__ import annotations

import pytest

from tests.launch.commands import DEEPSPEED, ROOT, Launches, on_this_machine

pytest.importorskip("accelerate", reason="accelerate is not installed (extra 'hf')")
pytest.importorskip("transformers", reason="transformers is not installed (extra 'hf')")

FILE = "accelerate launch --config_file launch/accelerate_{kind}.yaml "
KINDS = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
COMMANDS = {kind: FILE.format(kind=kind) + f"train.py --ds_config ds_configs/muon_{kind}.json" for kind in KINDS}
COMMANDS["loop"] = FILE.format(kind="zero2") + "examples/accelerate_gpt.py --ds_config ds_configs/muon_zero2.json"


@pytest.mark.promise("accelerate-launch")
@pytest.mark.parametrize("kind", COMMANDS)
def test_the_losses_are_those_of_the_deepspeed_launcher(launched: Launches, kind: str):
    """Other stages reduce gradients in another order, which bfloat16 products then round elsewhere."""
    exact = kind in ("zero2", "loop")
    assert launched(COMMANDS[kind]).losses == pytest.approx(launched(DEEPSPEED).losses, rel=1e-6 if exact else 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_each_file_names_its_command(kind: str):
    lines = (ROOT / "launch" / f"accelerate_{kind}.yaml").read_text().splitlines()
    assert f"#     {COMMANDS[kind]}" in lines


def test_a_start_without_deepspeed_says_what_to_change():
    """--cpu is Accelerate's word for plain PyTorch with DDP."""
    process = on_this_machine("accelerate launch --cpu --num_processes 1 examples/accelerate_gpt.py")
    assert process.returncode != 0
    assert "ACCELERATE_USE_CPU: got 'True', with which Accelerate trains by DDP; allowed: 'false'" in process.stderr
