"""The HF Trainer under each launcher: one curve for one seed."""

from __future__ import annotations

import pytest

from tests.launch.commands import Launches

pytest.importorskip("transformers", reason="transformers is not installed (extra 'hf')")

COMMANDS = {
    "deepspeed": "deepspeed --num_gpus 2 examples/hf_trainer.py --zero_stage 2",
    "accelerate": "accelerate launch --config_file launch/accelerate_zero3.yaml examples/hf_trainer.py --zero_stage 3",
}


@pytest.mark.promise("accelerate-launch")
def test_launchers_and_stages_give_one_curve(launched: Launches):
    expected = launched(COMMANDS["deepspeed"]).losses
    assert len(expected) == 3
    assert expected[-1] < expected[0]
    assert launched(COMMANDS["accelerate"]).losses == pytest.approx(expected, rel=1e-3)
