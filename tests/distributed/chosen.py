"""What ranks do for tests of ``sharding.rows``: step one matrix whose gradient is given, and count; load what was saved."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ds_optforge
from tests.distributed.cases import base_optimizer, engine_config
from tests.distributed.planned import Sent


def count(stage: int, params: dict[str, Any], sizes: list[float], cols: int) -> dict[str, Any]:
    """Step an (n, cols) weight once, whose gradient has the n ``sizes`` as absolute values by row.

    The counts are of the rank's ``step()``: bytes sent to others by all-to-all, and FLOPs.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(cols, len(sizes), bias=False))
    signs = torch.randn(len(sizes), cols).sign()
    engine = ds_optforge.initialize(model=model, config=engine_config(stage, params))[0]
    outputs = engine(torch.eye(cols))  # (cols, n): the transposed weight
    engine.backward((outputs * (signs * torch.tensor(sizes)[:, None]).T).sum())
    with Sent() as sent, FlopCounterMode(display=False) as flops:
        engine.step()
    buffers = sorted({key for state in base_optimizer(engine).state.values() for key in state})
    engine.destroy()
    return {"sent": sent.bytes.get("c10d::alltoall_base_", 0), "flops": flops.get_total_flops(), "state": buffers}
