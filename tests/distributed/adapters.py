"""What the ranks of a pool run with PEFT's adapters: the real ones, on a small Llama of transformers."""

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import save_file
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ds_optforge
from ds_optforge import build_optimizer
from ds_optforge.optimizer import groups_of
from tests.distributed import cases

TARGETS = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "qlora": {},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


def base(width: int = 32) -> LlamaForCausalLM:
    """4 query heads and 2 key-value heads, the same weights in every process."""
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, **shape))


def lora(kind: str = "lora") -> LoraConfig:
    """Rank 4."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **KINDS[kind]})


def quantized() -> LlamaForCausalLM:
    """The base with its linear maps in bitsandbytes' NF4, as transformers loads it."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    with TemporaryDirectory() as folder:
        model = base(width=64)  # a block of NF4; save_pretrained would write on the first rank alone
        model.config.save_pretrained(folder)
        save_file(model.state_dict(), Path(folder, "model.safetensors"), {"format": "pt"})
        model = LlamaForCausalLM.from_pretrained(folder, quantization_config=nf4, device_map="cpu")
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def adapted(kind: str = "lora") -> PeftModel:
    """The base with one adapter, the same in every process."""
    model = quantized() if kind == "qlora" else base()
    torch.manual_seed(1)
    return get_peft_model(model, lora(kind)).train()  # not in training, bitsandbytes rearranges its weights on a CPU


def batch(step: int) -> Tensor:
    """8 sequences of 6 tokens."""
    return torch.randint(50, (8, 6), generator=torch.Generator().manual_seed(step))


def share(step: int) -> Tensor:
    """This rank's sequences."""
    size = 8 // dist.get_world_size()
    return batch(step)[dist.get_rank() * size :][:size]


def train_plain(params: dict[str, Any], steps: int, kind: str, switch: Sequence[str] = ()) -> dict[str, Tensor]:
    """The parameters of one process without DeepSpeed."""
    model = two_adapters() if switch else adapted(kind)
    optimizer = build_optimizer(model, params)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for step in range(steps):
        if switch:
            use(model, switch[step])
        model(input_ids=batch(step), labels=batch(step)).loss.backward()
        for parameter in trained:  # ZeRO counts missing gradients as zeros
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(config: dict[str, Any], steps: int, kind: str, door: str = "initialize") -> dict[str, Any]:
    """Parameters, and the group of each; ``door``: where the model is registered."""
    if door == "before":
        model = base()
        ds_optforge.register(model)
        torch.manual_seed(1)
        model = get_peft_model(model, lora(kind))
    else:
        model = adapted(kind)
    if door == "after":
        ds_optforge.register(model)
    if door == "initialize":
        engine = ds_optforge.initialize(model=model, config=config)[0]
    else:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine = deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]
    try:
        run(engine, range(steps))
        return {"parameters": cases.full_parameters(engine.module), "groups": groups(engine)}
    finally:
        engine.destroy()


def run(engine: Any, steps: Sequence[int]) -> list[float]:
    """This rank's loss of each step."""
    losses = []
    for step in steps:
        loss = engine(input_ids=share(step), labels=share(step)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def groups(engine: Any) -> dict[str, list[str]]:
    """Names of the parameters of each group."""
    members = groups_of(cases.base_optimizer(engine)).members
    return {group: [route.name for route in found.routes] for group, found in members.items()}


# ------------------------------------------------------------------------------------------ adapters that are switched


def two_adapters() -> PeftModel:
    """Adapters "default" and "other", both trainable, of which both are in use."""
    model = adapted()
    model.add_adapter("other", lora())
    model.base_model.set_adapter(["default", "other"])
    return model


def use(model: Any, adapter: str) -> None:
    """Train with one adapter; PEFT freezes the other."""
    model.set_adapter(adapter)


def switch(config: dict[str, Any], order: Sequence[str]) -> dict[str, Tensor]:
    """Parameters after a step with each of the adapters in ``order``."""
    engine = ds_optforge.initialize(model=two_adapters(), config=config)[0]
    try:
        for step, adapter in enumerate(order):
            use(engine.module, adapter)
            run(engine, [step])
        return cases.full_parameters(engine.module)
    finally:
        engine.destroy()


def switch_to_a_frozen_one(config: dict[str, Any]) -> None:
    """The other adapter is frozen when the engine is built, as PEFT leaves it."""
    model = adapted()
    model.add_adapter("other", lora())
    engine = ds_optforge.initialize(model=model, config=config)[0]
    try:
        run(engine, [0])
        engine.module.base_model.set_adapter(["default", "other"])
        run(engine, [1])
    finally:
        engine.destroy()


# ------------------------------------------------------------------------------------------ checkpoints and adapters on a disk


def save_and_resume(config: dict[str, Any], other: dict[str, Any], folder: str) -> dict[str, Any]:
    """4 steps, a portable checkpoint and 4 more; the last 4 again in another engine that loads it."""
    engine = ds_optforge.initialize(model=adapted(), config=config)[0]
    run(engine, range(4))
    ds_optforge.save_checkpoint(engine, folder)
    run(engine, range(4, 8))
    uninterrupted = cases.full_parameters(engine.module)
    engine.destroy()
    fresh = ds_optforge.initialize(model=adapted(), config=other)[0]
    ds_optforge.load_checkpoint(fresh, folder)
    run(fresh, range(4, 8))
    resumed = cases.full_parameters(fresh.module)
    fresh.destroy()
    return {"uninterrupted": uninterrupted, "resumed": resumed}


def save_adapter(config: dict[str, Any], folder: str, snippet: str) -> Tensor:
    """Train, run the page's ``snippet`` that saves the adapter, and return the logits of the engine."""
    engine = ds_optforge.initialize(model=adapted(), config=config)[0]
    try:
        run(engine, range(4))
        exec(snippet, {"engine": engine, "folder": folder})  # the text of the docs
        with torch.no_grad():
            logits: Tensor = engine(input_ids=batch(9)).logits.clone()
        return logits
    finally:
        engine.destroy()


def loaded(folder: str, merge: bool) -> Tensor:
    """The logits of a plain model with the saved adapter, beside the weights or merged into them."""
    model = PeftModel.from_pretrained(base(), folder)
    with torch.no_grad():
        logits: Tensor = (model.merge_and_unload() if merge else model)(input_ids=batch(9)).logits
    return logits


def tune(config: dict[str, Any], steps: int, adapt: bool) -> list[float]:
    """Losses, the mean over ranks, on one batch that a model of AdamW has never seen."""
    model = base()
    optimizer = build_optimizer(model, {"name": "adamw", "lr": 3e-3})
    for step in range(20):
        model(input_ids=batch(step), labels=batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    config["scheduler"]["params"]["total_num_steps"] = steps
    config["train_batch_size"] = 8
    engine = ds_optforge.initialize(model=get_peft_model(model, lora()) if adapt else model, config=config)[0]
    try:
        losses = torch.tensor(run(engine, [99] * steps))
        dist.all_reduce(losses)
        return [loss / dist.get_world_size() for loss in losses.tolist()]
    finally:
        engine.destroy()


def run_page(snippet: str, others: bool) -> list[float]:
    """The text of the docs, on the base or on a model with two adapters, and this rank's losses."""
    names: dict[str, Any] = {"ds_optforge": ds_optforge, "model": two_adapters() if others else base()}
    exec(snippet, names)
    engine = names["engine"]
    try:
        size = engine.train_micro_batch_size_per_gpu()
        tokens = batch(0).repeat(size // 8, 1)
        losses = []
        for _ in range(4):
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses
    finally:
        engine.destroy()


# ------------------------------------------------------------------------------------------ HF Trainer


def train_with_trainer(config: dict[str, Any], folder: str, register_first: bool) -> dict[str, Any]:
    """Four steps; the model is registered before it gets its adapter, or after."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")  # on a CPU Accelerate would count one process
    arguments = TrainingArguments(
        output_dir=str(Path(folder)),
        per_device_train_batch_size=8 // dist.get_world_size(),
        max_steps=4,
        deepspeed=config,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        train_sampling_strategy="sequential",
        learning_rate=0.02,
        weight_decay=0.1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        accelerator_config={"use_configured_state": True},
    )
    model = base()
    if register_first:
        ds_optforge.register(model)
    torch.manual_seed(1)
    model = get_peft_model(model, lora())
    if not register_first:
        ds_optforge.register(model)
    data = [{"input_ids": row, "labels": row} for step in range(4) for row in batch(step)]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    engine = trainer.model_wrapped
    try:
        return {"parameters": cases.full_parameters(engine.module), "groups": groups(engine)}
    finally:
        engine.destroy()
