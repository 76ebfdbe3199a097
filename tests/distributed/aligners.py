"""What the ranks of a pool run with TRL: its trainers on small random models, with adapters that they make themselves."""

import os
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

import ds_optforge
from ds_optforge.integrations.deepspeed import base_optimizer
from ds_optforge.optimizer import groups_of
from tests.distributed import cases

TARGETS = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, tuple[Any, Any]] = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "reward": (RewardTrainer, RewardConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
}
WORDS = [f"w{number}" for number in range(46)]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])}
    found = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def rows(kind: str, count: int = 8) -> Dataset:
    """Sentences of the same lengths, as the trainer wants them."""
    numbers = torch.randint(len(WORDS), (3, count, 4), generator=torch.Generator().manual_seed(0))
    first, good, bad = ([" ".join(WORDS[i] for i in row) for row in part.tolist()] for part in numbers)
    columns = {
        "sft": {"text": [f"{a} {b}" for a, b in zip(first, good, strict=True)]},
        "dpo": {"prompt": first, "chosen": [f" {text}" for text in good], "rejected": [f" {text}" for text in bad]},
        "reward": {"chosen": [f"{a} {b}" for a, b in zip(first, good, strict=True)], "rejected": bad},
        "grpo": {"prompt": first},
    }
    return Dataset.from_dict(columns[kind])


def model(kind: str) -> Any:
    """One layer, the same weights in every process."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=50, num_hidden_layers=1, pad_token_id=0, bos_token_id=2, eos_token_id=3, **shape)
    if kind != "reward":
        return LlamaForCausalLM(config)
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


def lora(kind: str) -> LoraConfig:
    """Rank 4."""
    return LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM")


def settings_of(kind: str, folder: str, config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the trainer's configuration: 2 steps of 4 rows on all ranks."""
    ranks = int(os.environ["WORLD_SIZE"])
    special = {"grpo": {"num_generations": 2, "max_completion_length": 4}}
    return {
        "output_dir": folder,
        "deepspeed": config or None,
        "use_cpu": not config,
        "accelerator_config": {"use_configured_state": True},
        "per_device_train_batch_size": 4 // ranks,
        "max_steps": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **special.get(kind, {}),
    }


def reward(completions: list[str], **columns: Any) -> list[float]:
    """Two completions hardly ever get the same, without which there would be no gradient."""
    return [float(sum(map(ord, text))) for text in completions]


def refused_early(params: dict[str, Any], folder: str) -> None:
    """An optimizer of the model before TRL has put adapters into it."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
    PartialState(backend="gloo", cpu=True)
    before = model("sft")
    trainer = SFTTrainer(
        model=before,
        args=SFTConfig(**settings_of("sft", folder, {})),
        train_dataset=rows("sft"),
        processing_class=tokenizer(),
        peft_config=lora("sft"),
        optimizers=(ds_optforge.build_optimizer(before, params), None),
    )
    trainer.add_callback(ds_optforge.OptForgeCallback(trainer))
    trainer.train()


def run_page(snippet: str, config: dict[str, Any], folder: str) -> list[float]:
    """The losses of the lines of docs/frameworks/trl.md."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    names: dict[str, Any] = {"ds_optforge": ds_optforge, "SFTTrainer": SFTTrainer, "model": model("sft"), "lora": lora("sft")}
    names |= {"arguments": SFTConfig(**settings_of("sft", folder, config)), "rows": rows("sft"), "tokenizer": tokenizer()}
    exec(snippet, names)
    losses = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    names["trainer"].model_wrapped.destroy()
    return losses


def train(kind: str, config: dict[str, Any], params: dict[str, Any], folder: str) -> dict[str, Any]:
    """Train with one of TRL's trainers, which puts adapters of rank 4 into the model.

    Args:
        kind: of `KINDS`.
        config: of DeepSpeed with an optimizer section, for an OptForgeCallback; empty for none, and a TrainerOptimizer.
        params: settings of the TrainerOptimizer.
        folder: for what it writes.

    Returns:
        The groups' parameters, and all weights at the beginning and at the end.
    """
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true" if config else "false"
    PartialState(backend="gloo", **({} if config else {"cpu": True}))
    trainer_class, settings_class = KINDS[kind]
    arguments = {"reward_funcs": reward} if kind == "grpo" else {}
    trainer = trainer_class(
        model=model(kind),
        args=settings_class(**settings_of(kind, folder, config)),
        train_dataset=rows(kind),
        processing_class=tokenizer(),
        peft_config=lora(kind),
        **arguments,
    )
    if not config:  # an argument of two of the four alone, and an attribute of all
        trainer.optimizer_cls_and_kwargs = (ds_optforge.TrainerOptimizer, params)
    trainer.add_callback(ds_optforge.OptForgeCallback(trainer))
    before = cases.full_parameters(trainer.model)
    trainer.train()
    _, optimizer = base_optimizer(trainer.optimizer)
    found = {name: [route.name for route in members.routes] for name, members in groups_of(optimizer).members.items()}
    parameters = cases.full_parameters(trainer.model)
    if config:
        trainer.model_wrapped.destroy()
    return {"groups": found, "before": before, "parameters": parameters}
