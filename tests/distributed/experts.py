"""What ranks run with AutoEP: a small DeepSeek-V3 of transformers, whose experts DeepSpeed shares out.

(With transformers 5.23 DeepSpeed 0.19.8 fails on Mixtral and Qwen-MoE, for the sake of the logits of their routers.)
"""

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import ds_optforge
from ds_optforge.optimizer import groups_of
from tests.distributed import tensor_parallel
from tests.distributed.cases import base_optimizer, engine_config
from tests.distributed.tensor_parallel import without_optimizer

BATCH, LENGTH, VOCABULARY = 4, 8, 50
INNER = 24  # rows of an expert's gate, and of its up projection
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 40,
    "moe_intermediate_size": INNER,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
}
# A gate and an up projection are one parameter until AutoEP takes them apart.
APART = {"overrides": [{"match": "gate_up_proj", "split": [INNER, INNER]}]}


def mixture() -> DeepseekV3ForCausalLM:
    """A model with four experts, and one that every token uses, in two of three layers, in float32."""
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES))


def tokens_of(step: int) -> Tensor:
    """The global batch of a step, (BATCH, LENGTH)."""
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))


def one_process(params: Mapping[str, Any] | None, steps: int) -> dict[str, Tensor]:
    """The parameters after ``steps`` in plain PyTorch, as AutoEP names them; ``params`` None for torch.optim.AdamW."""
    wanted = None if params is None else {**params, **APART}
    alone = tensor_parallel.trained_alone(
        mixture(), wanted, steps, lambda model, step: model(tokens_of(step), labels=tokens_of(step)).loss
    )
    found = {}
    for name, weight in alone.items():
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            found[f"{prefix}w1"], found[f"{prefix}w3"] = weight.split(INNER, dim=1)
        else:
            found[name.replace("mlp.gate.", "mlp.router.gate.").replace("mlp.experts.down_proj", "mlp.experts.w2")] = weight
    return found


def autoep(
    expert_ranks: int,
    stage: int,
    params: Mapping[str, Any] | None,
    steps: int,
    door: str = "initialize",
    **extra: Any,
) -> dict[str, Tensor]:
    """Train under AutoEP and return whole parameters; ``params`` None for torch.optim.AdamW."""
    engine = autoep_engine(autoep_config(expert_ranks, stage, params or {}, **extra), params, door)
    try:
        train(engine, steps)
        return whole_parameters(engine.module)
    finally:
        engine.destroy()


def autoep_config(expert_ranks: int, stage: int, params: Mapping[str, Any], **extra: Any) -> dict[str, Any]:
    """A DeepSpeed configuration with a global batch of BATCH."""
    section = {"enabled": True, "autoep_size": expert_ranks, "use_grouped_mm": False}
    return engine_config(stage, params, **{"expert_parallel": section, "train_batch_size": BATCH, **extra})


def autoep_engine(config: dict[str, Any], params: Mapping[str, Any] | None, door: str = "initialize") -> Any:
    """An engine by one of the ways in which users make one."""
    model = mixture()
    if params is None:
        return deepspeed.initialize(model=model, config=without_optimizer(config), optimizer=grouped_control)[0]
    if door == "initialize":
        return ds_optforge.initialize(model=model, config=config)[0]
    if door == "register":
        ds_optforge.register(model)
        return deepspeed.initialize(model=model, config=config)[0]
    if door == "listed":  # as Accelerate and the HF Trainer hand parameters over
        ds_optforge.register(model)
        return deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))[0]
    if door == "function":
        return ds_optforge.initialize(model=model, config=without_optimizer(config), optimizer=made_of(params))[0]
    optimizer = ds_optforge.build_optimizer(model, dict(params))
    initialize = ds_optforge.initialize if door == "object" else deepspeed.initialize
    return initialize(model=model, config=without_optimizer(config), optimizer=optimizer)[0]


def made_of(params: Mapping[str, Any]) -> Any:
    """A function of the parameters that makes an optimizer."""
    return lambda parameters: ds_optforge.OptForge(parameters, **params)


def grouped_control(parameters: Any) -> torch.optim.Optimizer:
    """`control`, with the experts in the groups that DeepSpeed wants for them."""
    from deepspeed.moe.utils import configure_moe_param_groups

    return torch.optim.AdamW(configure_moe_param_groups(list(parameters)), lr=3e-3, eps=1e-5, weight_decay=0.1)


def train(engine: Any, steps: int, first: int = 0) -> None:
    """`tensor_parallel.train`, on this model's tokens."""
    tensor_parallel.train(engine, steps, first, tokens_of)


def whole_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, whole, put together from ZeRO-3's partitions, tensor parallelism's shards and the ranks' experts."""
    found = tensor_parallel.whole_parameters(model)
    for name, parameter in model.named_parameters():
        if not getattr(parameter, "allreduce", True):
            group = groups._get_expert_parallel_group(parameter.group_name)
            banks = [torch.empty_like(found[name]) for _ in range(dist.get_world_size(group))]
            dist.all_gather(banks, found[name], group=group)
            found[name] = torch.cat(banks)
    return found


def routes(config: dict[str, Any], params: Mapping[str, Any]) -> dict[str, tuple[str, tuple[tuple[int, int, int], ...]]]:
    """The rule of each parameter, and the matrices in it."""
    engine = autoep_engine(config, params)
    found = groups_of(base_optimizer(engine)).members.values()
    engine.destroy()
    return {route.name: (route.settings.rule, route.matrices) for members in found for route in members.routes}


def refused(config: dict[str, Any], params: Mapping[str, Any], door: str) -> str:
    """The error that ends the training before its first step, or in it."""
    try:
        train(autoep_engine(config, params, door), 1)
    except ds_optforge.ConfigError as error:
        return str(error)
    return ""


def save_and_resume(config: dict[str, Any], params: Mapping[str, Any], folder: str) -> tuple[bool, str]:
    """Whether a run that goes on from the engine's checkpoint is the uninterrupted one to the bit; the portable one's error."""
    engine = autoep_engine(config, params)
    train(engine, 2)
    engine.save_checkpoint(f"{folder}/engine")
    error = ""
    try:
        ds_optforge.save_checkpoint(engine, f"{folder}/portable")
    except ds_optforge.CheckpointError as found:
        error = str(found)
    train(engine, 2, 2)
    uninterrupted = whole_parameters(engine.module)
    engine.destroy()
    fresh = autoep_engine(config, params)
    fresh.load_checkpoint(f"{folder}/engine")
    train(fresh, 2, 2)
    resumed = whole_parameters(fresh.module)
    fresh.destroy()
    return all(torch.equal(resumed[name], weight) for name, weight in uninterrupted.items()), error


def resume_portable(config: dict[str, Any], params: Mapping[str, Any], folder: str) -> dict[str, Tensor]:
    """The parameters after four steps, of which the checkpoint of `save_and_resume` has two."""
    engine = autoep_engine(config, params)
    ds_optforge.load_checkpoint(engine, f"{folder}/portable")
    train(engine, 2, 2)
    try:
        return whole_parameters(engine.module)
    finally:
        engine.destroy()
