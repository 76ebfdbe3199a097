"""What the ranks of a pool run on models that torch has sharded, and on parameters that are unfrozen too late."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import ds_optforge
from tests import models
from tests.distributed.cases import MUON, engine_config, run_steps


def fsdp(kind: str) -> None:
    """Build an optimizer for a model after FSDP has wrapped it."""
    model: nn.Module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    if kind == "fully_shard":
        fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    else:
        model = FullyShardedDataParallel(model, use_orig_params=kind == "use_orig_params", device_id=torch.device("cpu"))
    ds_optforge.build_optimizer(model, MUON)


def unfreeze(stage: int) -> None:
    """Train for a step, then unfreeze a layer."""
    engine = ds_optforge.initialize(model=models.build(frozen=True), config=engine_config(stage, MUON))[0]
    try:
        run_steps(engine, 0, 1)
        engine.module.blocks[0].weight.requires_grad_(True)
        run_steps(engine, 1, 1)
    finally:
        engine.destroy()
