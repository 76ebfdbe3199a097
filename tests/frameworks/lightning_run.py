"""What the ranks of tests/frameworks/test_lightning.py run in the environment of Lightning: its Trainer and DeepSpeedStrategy.

torchrun --nproc-per-node 2 -m tests.frameworks.lightning_run STAGE OUT [--snippets NAME ...] [--arguments JSON]
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import lightning
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ds_optforge.integrations.deepspeed import base_optimizer
from ds_optforge.optimizer import groups_of
from tests import models
from tests.distributed import cases
from tests.frameworks.environments import blocks
from tests.oracles import EXACT

EPOCH = 4  # steps, each of 8 rows
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}


class CPU(CUDAAccelerator):
    """A CPU for Lightning's DeepSpeedStrategy, which refuses every accelerator that is no CUDAAccelerator."""

    def setup_device(self, device: torch.device) -> None:
        """Do nothing."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """Return nothing."""
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        """Return the numbers of ranks."""
        return list(range(int(devices)))

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        """Return one with each number."""
        return [torch.device("cpu", index) for index in devices]

    @staticmethod
    def is_available() -> bool:
        """Return True."""
        return True


class Watch(lightning.Callback):
    """Keeps the losses of all steps, and at the end what was trained and by which optimizer."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[dict[str, float]] = []
        self.found: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Note the rates of the step."""
        groups = base_optimizer(trainer.strategy.deepspeed_engine)[1].param_groups
        self.rates.append({group["optforge_group"]: group["lr"] for group in groups})

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the mean loss over the ranks."""
        self.losses.append(trainer.strategy.reduce(outputs["loss"].detach().clone()).item())

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Look at the engine, which is gone after `fit`."""
        engine = trainer.strategy.deepspeed_engine
        _, optimizer = base_optimizer(engine)
        self.found = {
            "losses": self.losses,
            "rates": self.rates,
            "parameters": cases.full_parameters(engine.module),
            "optimizer": type(optimizer).__name__,
            "wrapper": type(engine.optimizer).__name__,
            "groups": {name: [route.name for route in group.routes] for name, group in groups_of(optimizer).members.items()},
        }


def train(stage: int, out: str, snippets: list[str], arguments: dict[str, Any]) -> None:
    """Run the page's lines on `models.AwkwardNet`; rank 0 saves what `Watch` has found.

    Args:
        stage: of ZeRO.
        out: the file.
        snippets: of the page: the module's, others, and the one that trains.
        arguments: more of the Trainer's.
    """
    code = blocks("lightning")
    tokens, targets = zip(*(models.batch(step) for step in range(EPOCH)), strict=True)
    data = TensorDataset(torch.cat(tokens), torch.cat(targets))
    # Lightning's own sampler shuffles.
    ranks = {"num_replicas": int(os.environ["WORLD_SIZE"]), "rank": int(os.environ["RANK"])}
    loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, shuffle=False, **ranks))
    names: dict[str, Any] = {"model": models.build(), "loader": loader, "last": arguments.pop("last", None)}
    watch = Watch()
    for name in snippets:
        text = code[name].replace("deepspeed_stage_3", f"deepspeed_stage_{stage}")
        # A CPU in the place of GPUs, and something that watches.
        text = text.replace("devices=8", "devices=2, **arguments").replace(
            "trainer.fit(", "trainer.callbacks.append(watch)\ntrainer.fit("
        )
        names |= {"watch": watch, "arguments": {"accelerator": CPU(), "use_distributed_sampler": False, **QUIET, **arguments}}
        exec(text, names)
        if name == "module":
            if "portable" in snippets:  # the length of the whole run
                exec(text.replace("self.trainer.estimated_stepping_batches", str(3 * EPOCH)), names)
            names["MUON"] = {**names["MUON"], **EXACT, "adamw": {"lr": 3e-3, "eps": 1e-5}}
    if names["trainer"].global_rank == 0:
        torch.save(watch.found, out)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", type=int)
    parser.add_argument("out")
    parser.add_argument("--snippets", nargs="+", default=["module", "fit"])
    parser.add_argument("--arguments", type=json.loads, default={})
    options = parser.parse_args()
    train(options.stage, options.out, options.snippets, options.arguments)


if __name__ == "__main__":
    main()
