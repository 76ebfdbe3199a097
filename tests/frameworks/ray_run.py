"""What tests/frameworks/test_ray.py runs in the environment of Ray: its TorchTrainer, with workers on the CPU.

python -m tests.frameworks.ray_run STAGE WORKERS STEPS FOLDER [--dies-at STEP]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from tests import models
from tests.distributed import cases
from tests.frameworks.environments import blocks
from tests.oracles import EXACT

STEPS = 12
SCHEDULE: dict[str, Any] = {
    "type": "OptForgeSchedule",
    "params": {"name": "linear", "warmup_num_steps": 2, "total_num_steps": STEPS},
}


def share(step: int, folder: str, dies_at: int | None) -> tuple[Tensor, ...]:
    """This worker's rows of a global batch; the last worker's process ends there once, where that is asked for."""
    rank, world = dist.get_rank(), dist.get_world_size()
    died = Path(folder, "died")
    if step == dies_at and rank == world - 1 and not died.exists():
        died.touch()
        os._exit(1)
    return tuple(part.chunk(world)[rank] for part in models.batch(step))


def main() -> None:
    """Run the page's lines; print the metrics of the last report, and the checkpoint."""
    import ray  # which the environment of the tests lacks

    parser = argparse.ArgumentParser()
    parser.add_argument("stage", type=int)
    parser.add_argument("workers", type=int)
    parser.add_argument("steps", type=int)
    parser.add_argument("folder")
    parser.add_argument("--dies-at", type=int)
    options = parser.parse_args()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=True)
    config = cases.engine_config(options.stage, {**cases.MUON, **EXACT}, scheduler=SCHEDULE)
    names: dict[str, Any] = {
        "settings": {"deepspeed": config, "steps": options.steps, "save_every": 4, "folder": f"{options.folder}/portable"},
        "storage": f"{options.folder}/storage",
        "build_model": models.build,
        "batch": lambda step: share(step, options.folder, options.dies_at),
    }
    text = blocks("ray")["train"].replace("num_workers=8, use_gpu=True", f"num_workers={options.workers}")
    exec(text, names)
    result = names["result"]
    print("RESULT", json.dumps({**result.metrics, "checkpoint": result.checkpoint.path}))


if __name__ == "__main__":
    main()
