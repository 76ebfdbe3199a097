"""What ranks run with models that zero.Init partitioned as they were made.

In these AutoTP makes parameters anew, as AutoEP does in all models.
"""

from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
from torch import Tensor, nn

import ds_optforge
from tests.distributed import experts, tensor_parallel
from tests.distributed.cases import load_weights


def autoep(ranks: int, params: Mapping[str, Any], steps: int) -> dict[str, Tensor]:
    """Train under AutoEP and return whole parameters."""
    engine = ds_optforge.initialize(model=partitioned(experts.mixture), config=experts.autoep_config(ranks, 3, params))[0]
    try:
        experts.train(engine, steps)
        return experts.whole_parameters(engine.module)
    finally:
        engine.destroy()


def autotp(ranks: int, params: Mapping[str, Any], steps: int, with_object: bool = False) -> dict[str, Tensor]:
    """Train under AutoTP and return whole parameters."""
    model, config = partitioned(tensor_parallel.llama), tensor_parallel.autotp_config(ranks, 3, params)
    if with_object:
        optimizer = ds_optforge.build_optimizer(model, dict(params))
        config = tensor_parallel.without_optimizer(config)
        engine = ds_optforge.initialize(model=model, config=config, optimizer=optimizer)[0]
    else:
        engine = ds_optforge.initialize(model=model, config=config)[0]
    try:
        tensor_parallel.train(engine, steps)
        return tensor_parallel.whole_parameters(engine.module)
    finally:
        engine.destroy()


def partitioned(make: Callable[[], nn.Module]) -> nn.Module:
    """The model with the weights that it has without zero.Init."""
    config = {"train_batch_size": experts.BATCH, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = make()
    load_weights(model, make().state_dict())
    return model
