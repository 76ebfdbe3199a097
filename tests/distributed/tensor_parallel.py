"""What ranks run under tensor parallelism: AutoTP on a small Llama of transformers, and layers in the manner of Megatron."""

import contextlib
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import ds_optforge
from tests.distributed.cases import engine_config

BATCH, LENGTH, VOCABULARY = 4, 8, 64


def llama(tied: bool = False) -> LlamaForCausalLM:
    """A Llama with grouped key and value heads, in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def tokens_of(step: int) -> Tensor:
    """The global batch of a step, (BATCH, LENGTH)."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)


def one_process(params: Mapping[str, Any] | None, steps: int) -> dict[str, Tensor]:
    """The parameters after ``steps`` in plain PyTorch; ``params`` None for torch.optim.AdamW."""
    model = llama()
    optimizer = control(model) if params is None else ds_optforge.build_optimizer(model, dict(params))
    for step in range(steps):
        tokens = tokens_of(step)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def control(model: nn.Module) -> torch.optim.Optimizer:
    """DeepSpeed's users' usual optimizer."""
    return torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-5, weight_decay=0.1)


def autotp(
    tensor_ranks: int, stage: int, params: Mapping[str, Any] | None, steps: int, door: str = "json", **extra: Any
) -> dict[str, Tensor]:
    """Train under AutoTP and return whole parameters; ``params`` None for torch.optim.AdamW."""
    config = autotp_config(tensor_ranks, stage, params or {}, **extra)
    engine = autotp_engine(config, params, door)
    try:
        train(engine, steps)
        return whole_parameters(engine.module)
    finally:
        engine.destroy()


def autotp_config(tensor_ranks: int, stage: int, params: Mapping[str, Any], **extra: Any) -> dict[str, Any]:
    """A DeepSpeed configuration with a global batch of BATCH."""
    extra = {"tensor_parallel": {"autotp_size": tensor_ranks}, "train_batch_size": BATCH, **extra}
    return engine_config(stage, params, **extra)


def autotp_engine(config: dict[str, Any], params: Mapping[str, Any] | None, door: str = "json") -> Any:
    model = llama()
    if params is None:
        return deepspeed.initialize(model=model, config=without_optimizer(config), optimizer=control(model))[0]
    if door == "json":
        return ds_optforge.initialize(model=model, config=config)[0]
    if door == "register":
        ds_optforge.register(model)
        return deepspeed.initialize(model=model, config=config)[0]
    optimizer = ds_optforge.build_optimizer(model, dict(params))
    return ds_optforge.initialize(model=model, config=without_optimizer(config), optimizer=optimizer)[0]


def without_optimizer(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "optimizer"} | {"zero_allow_untested_optimizer": True}


def train(engine: Any, steps: int, first: int = 0) -> None:
    """Each data rank takes its rows of the global batch, on all its tensor ranks alike."""
    data_ranks, data_rank = groups._get_data_parallel_world_size(), groups._get_data_parallel_rank()
    rows = BATCH // data_ranks
    for step in range(first, first + steps):
        tokens = tokens_of(step)[data_rank * rows : (data_rank + 1) * rows]
        engine.backward(engine(tokens, labels=tokens).loss)
        engine.step()


def whole_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, whole, put together from ZeRO-3's partitions and the shards."""
    found = {}
    for name, parameter in model.named_parameters():
        gathers = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters(parameter) if gathers else contextlib.nullcontext():
            local = parameter.detach().float().clone()
        if getattr(parameter, "tensor_model_parallel", False):
            meta = getattr(parameter, "ds_autotp_universal_checkpoint_meta", {})
            dim = meta.get("partition_dim", getattr(parameter, "partition_dim", 0))
            group = (
                groups.get_tensor_model_parallel_group() if groups.mpu is None else groups.mpu.get_tensor_model_parallel_group()
            )
            shards = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
            dist.all_gather(shards, local.contiguous(), group=group)
            local = torch.cat(shards, dim)
        found[name] = local
    return found


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest relative distance of a parameter, in the Frobenius norm."""
    return max(float((found[name] - whole).norm() / whole.norm()) for name, whole in expected.items())
