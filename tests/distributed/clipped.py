"""What the ranks of a pool run with QK-clip."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

import ds_optforge
from tests import attentions
from tests.distributed import cases


def train(config: dict[str, Any], family: str, steps: int, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Parameters, and the logits that each step saw."""
    model = attentions.FAMILIES[family](**(options or {}))
    engine = ds_optforge.initialize(model=model, config=config)[0]
    rank, world, parts = dist.get_rank(), dist.get_world_size(), engine.gradient_accumulation_steps()
    optimizer = cases.base_optimizer(engine)
    seen = []
    for step in range(steps):
        tokens = attentions.batch(step, engine.train_batch_size())
        for micro in torch.chunk(tokens, parts):
            share = torch.chunk(micro, world)[rank]
            loss = engine(input_ids=share, labels=share).loss
            engine.backward(loss)
            engine.step()
        seen.append(optimizer.attention_logits)
    found = {"parameters": cases.full_parameters(engine.module), "seen": seen}
    engine.destroy()
    return found
