"""What ranks run of a PipelineModule whose stages have tensor ranks, with layers in the manner of Megatron."""

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.nn import functional as F

import ds_optforge
from tests import models
from tests.distributed import pipelines, tensor_parallel

WIDTH, STEPS, TENSOR_RANKS = 24, 4, 2


def specs(mpu: tensor_parallel.Mpu | None) -> list[LayerSpec]:
    """Two stages: an embedding and a block, a block and a head. Of the weights only those of the blocks are cut."""
    block = LayerSpec(tensor_parallel.MegatronBlock, WIDTH, 36, mpu)
    return [
        LayerSpec(nn.Embedding, models.VOCABULARY, WIDTH),
        block,
        block,
        LayerSpec(nn.Linear, WIDTH, models.VOCABULARY, bias=False),
    ]


def build(config: dict[str, Any], data_ranks: int = 1, control: bool = False) -> Any:
    """An engine on two stages of ``data_ranks`` times two ranks; ``control``: with torch.optim.AdamW."""
    mpu = tensor_parallel.Mpu(TENSOR_RANKS)
    model = PipelineModule(
        specs(mpu),
        topology=PipeModelDataParallelTopology(num_pp=2, num_mp=TENSOR_RANKS, num_dp=data_ranks),
        loss_fn=F.cross_entropy,
        seed_layers=True,
        base_seed=pipelines.SEED,
        partition_method="uniform",
    )
    if not control:
        engine = ds_optforge.initialize(model=model, config=config)[0]
    else:
        given = tensor_parallel.without_optimizer(config)
        engine = deepspeed.initialize(model=model, config=given, optimizer=tensor_parallel.control(model))[0]
    return engine


def train(config: dict[str, Any], data_ranks: int = 1, control: bool = False) -> dict[str, Any]:
    """Losses, this stage's parameters, whole, and the last record of telemetry."""
    engine = build(config, data_ranks, control)
    try:
        losses = pipelines.run_steps(engine, 0, STEPS)
        base = engine.optimizer if isinstance(engine.optimizer, torch.optim.Optimizer) else engine.optimizer.optimizer
        return {"losses": losses, "parameters": whole_parameters(engine), "telemetry": getattr(base, "telemetry", {})}
    finally:
        engine.destroy()


def whole_parameters(engine: Any) -> dict[str, Tensor]:
    """This stage's parameters, put together from the shards."""
    blocks = (layer for layer in engine.module.modules() if isinstance(layer, tensor_parallel.MegatronBlock))
    deepspeed.utils.groups.mpu = next(blocks).mpu  # a pipeline's grid knows the tensor ranks by another name
    found = tensor_parallel.whole_parameters(engine.module)
    return {name: value for name, value in found.items() if not name.startswith("optforge_placeholders")}


def save(config: dict[str, Any], folder: str) -> tuple[str, bool]:
    """What a portable checkpoint says; whether a run from the engine's own goes on as the uninterrupted one, bit for bit."""
    engine = build(config)
    pipelines.run_steps(engine, 0, 2)
    engine.save_checkpoint(f"{folder}/engine")
    message = ""
    try:
        ds_optforge.save_checkpoint(engine, f"{folder}/portable")
    except ds_optforge.CheckpointError as error:
        message = str(error)
    pipelines.run_steps(engine, 2, 2)
    expected = pipelines.parameters(engine)
    engine.destroy()
    fresh = build(config)
    fresh.load_checkpoint(f"{folder}/engine")
    pipelines.run_steps(fresh, 2, 2)
    resumed = pipelines.parameters(fresh)
    fresh.destroy()
    return message, all(torch.equal(resumed[name], value) for name, value in expected.items())


def refused(config: dict[str, Any]) -> str:
    """The error of a PipelineModule that AutoTP is to cut."""
    model = PipelineModule(specs(None), num_stages=2, loss_fn=F.cross_entropy)
    try:
        ds_optforge.initialize(model=model, config=config)
    except ds_optforge.ConfigError as error:
        return str(error)
    return ""


class Whole(nn.Sequential):
    """The same layers in one process, with the same names."""

    def __init__(self) -> None:
        layers = []
        for index, spec in enumerate(specs(None)):
            torch.manual_seed(pipelines.SEED + index)
            layers.append(spec.build())
        super().__init__(*layers)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(super().forward(tokens), targets)


def in_one_process(params: Mapping[str, Any] | None, clip: float) -> tuple[list[float], dict[str, Tensor], dict[str, Any]]:
    """Losses, parameters and telemetry in plain PyTorch; ``params`` None for torch.optim.AdamW."""
    model = Whole()
    optimizer = tensor_parallel.control(model) if params is None else ds_optforge.build_optimizer(model, dict(params))
    return *pipelines.one_process(optimizer, model, STEPS, clip), getattr(optimizer, "telemetry", {})
