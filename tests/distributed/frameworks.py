"""What the ranks of a pool run through Accelerate and the HF Trainer: the real ones, on small models."""

import copy
import os
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DummyOptim, DummyScheduler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)

import ds_optforge
from ds_optforge.integrations.accelerate import make_accelerator, optimizer_and_scheduler
from ds_optforge.integrations.deepspeed import base_optimizer
from tests import models
from tests.distributed import cases


def rates(engine: Any) -> dict[str, float]:
    """Each group's learning rate now."""
    return {group["optforge_group"]: group["lr"] for group in cases.base_optimizer(engine).param_groups}


# ------------------------------------------------------------------------------------------ Accelerate


def paired(config: dict[str, Any], model: nn.Module, real: tuple[bool, bool]) -> tuple[Accelerator, Any, Any]:
    """The accelerator, an optimizer and a scheduler, real or dummies: what a real one replaces is not in its configuration."""
    if real[0] == real[1]:
        accelerator = make_accelerator(config)
        return accelerator, *optimizer_and_scheduler(accelerator, model, real=real[0])
    left = {key: value for key, value in config.items() if key != ("optimizer" if real[0] else "scheduler")}
    accelerator = make_accelerator(left)
    if real[0]:
        optimizer = ds_optforge.build_optimizer(model, config)
        return accelerator, optimizer, DummyScheduler(optimizer)
    ds_optforge.register(model)
    optimizer = DummyOptim(list(model.parameters()))
    build = partial(ds_optforge.build_scheduler, config=config)
    return accelerator, optimizer, DummyScheduler(optimizer, lr_scheduler_callable=build)


def rates_under_accelerate(config: dict[str, Any], steps: int, real: tuple[bool, bool]) -> list[dict[str, float]]:
    """The learning rates of every step; ``real``: the optimizer, the scheduler."""
    model = models.build()
    accelerator, *pair = paired(config, model, real)
    engine, optimizer, scheduler = accelerator.prepare(model, *pair)
    found = []
    for step in range(steps):
        found.append(rates(engine))
        accelerator.backward(engine(*models.batch(step)))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    engine.destroy()
    return found


def train_as_printed(config: dict[str, Any], snippets: list[str], names: dict[str, Any], steps: int) -> dict[str, Any]:
    """Losses, whole parameters and learning rates of a loop with the optimizer and scheduler that printed code makes.

    Args:
        config: of DeepSpeed.
        snippets: the code, for a ``model``; its ``get_scheduler`` is a cosine with 2 steps of warm-up.
        names: what it has to be told.
        steps: of the run.
    """
    model = models.build()
    accelerator = make_accelerator(config)
    cosine = partial(get_cosine_schedule_with_warmup, num_warmup_steps=2, num_training_steps=steps)
    known: dict[str, Any] = {"model": model, "get_scheduler": lambda optimizer, _: cosine(optimizer), **names}
    for snippet in snippets:
        exec(snippet, known)  # what `ds-optforge init` prints
    tokens, targets = zip(*(models.batch(step) for step in range(steps)), strict=True)
    loader = DataLoader(
        TensorDataset(torch.cat(tokens), torch.cat(targets)), batch_size=len(tokens[0]) // dist.get_world_size()
    )
    engine, optimizer, scheduler, loader = accelerator.prepare(model, known["optimizer"], known["scheduler"], loader)
    losses, found = [], []
    for batch in loader:
        found.append(rates(engine))
        loss = engine(*batch)
        accelerator.backward(loss)
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    parameters = cases.full_parameters(engine.module)
    engine.destroy()
    return {"losses": losses, "parameters": parameters, "rates": found}


class Run:
    """A model under Accelerate, fed by a DataLoader that Accelerate shares out."""

    def __init__(self, config: dict[str, Any], steps: int, accumulation: int = 1, real: bool = False) -> None:
        model = models.build()
        self.accelerator = make_accelerator(config, gradient_accumulation_steps=accumulation)
        pair = optimizer_and_scheduler(self.accelerator, model, total_steps=steps, real=real)
        tokens, targets = zip(*(models.batch(step) for step in range(steps)), strict=True)
        micro = len(tokens[0]) // (accumulation * dist.get_world_size())
        loader = DataLoader(TensorDataset(torch.cat(tokens), torch.cat(targets)), batch_size=micro)
        prepared = self.accelerator.prepare(model, *pair, loader)
        self.engine, self.optimizer, self.scheduler, self.loader = prepared
        self.accumulation = accumulation
        self.norms: list[float] = []

    def train(self, first: int, steps: int) -> list[float]:
        """The mean loss over ranks and micro-batches of each step."""
        losses, total = [], torch.zeros(())
        micro_batches = list(self.loader)[first * self.accumulation : (first + steps) * self.accumulation]
        for tokens, targets in micro_batches:
            with self.accelerator.accumulate(self.engine):
                loss = self.engine(tokens, targets)
                self.accelerator.backward(loss)
                total += loss.detach() / self.accumulation
                if self.accelerator.sync_gradients:
                    self.norms.append(self.accelerator.clip_grad_norm_(self.engine.parameters(), 1e9))
                    losses.append(self.accelerator.reduce(total, "mean").item())
                    total = torch.zeros(())
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        return losses


def train_under_accelerate(config: dict[str, Any], steps: int, accumulation: int, real: bool = False) -> dict[str, Any]:
    """Losses, whole parameters, the gradient norms that Accelerate told, and its count of processes."""
    run = Run(config, steps, accumulation, real)
    losses = run.train(0, steps)
    parameters = cases.full_parameters(run.engine.module)
    run.engine.destroy()
    return {"losses": losses, "parameters": parameters, "norms": run.norms, "processes": run.accelerator.num_processes}


def save_state(config: dict[str, Any], folder: str, real: bool) -> list[float]:
    """4 steps, save_state, then the losses of 4 more."""
    run = Run(config, 8, real=real)
    run.train(0, 4)
    run.accelerator.save_state(folder)
    losses = run.train(4, 4)
    run.engine.destroy()
    return losses


def load_state(config: dict[str, Any], folder: str, real: bool) -> list[float]:
    """A fresh run that loads, and the losses of the last 4 steps."""
    run = Run(config, 8, real=real)
    run.accelerator.load_state(folder)
    losses = run.train(4, 4)
    run.engine.destroy()
    return losses


def averages_under_accelerate(config: dict[str, Any]) -> dict[str, Any]:
    """Weights before, inside and after `evaluation_weights`, and what Accelerate exports inside."""
    run = Run(config, 8)
    run.train(0, 8)
    before = cases.full_parameters(run.engine.module)
    with ds_optforge.evaluation_weights(run.engine):
        inside = cases.full_parameters(run.engine.module)
        exported = run.accelerator.get_state_dict(run.engine)
    after = cases.full_parameters(run.engine.module)
    run.engine.destroy()
    return {"before": before, "inside": inside, "after": after, "exported": dict(exported or {})}


def after_another_state(config: dict[str, Any]) -> None:
    """Something asked Accelerate for its state first: on a CPU it counts one process then."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState()
    make_accelerator(config)


# ------------------------------------------------------------------------------------------ HF Trainer


class Recorder(TrainerCallback):
    """What every step began with: its learning rates; and what a callback that reports sees."""

    def __init__(self) -> None:
        self.rates: list[dict[str, float]] = []
        self.reported: list[dict[str, float]] = []
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Called by the Trainer."""
        groups = base_optimizer(self.trainer.optimizer)[1].param_groups
        self.rates.append({group["optforge_group"]: group["lr"] for group in groups})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **keywords: Any) -> None:
        """Called by the Trainer."""
        self.reported.append(dict(logs))


def llama(tied: bool) -> LlamaForCausalLM:
    """One layer, 4 query heads and 2 key-value heads of 8 rows."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=1, tie_word_embeddings=tied, **shape))


def sentences(count: int) -> list[dict[str, torch.Tensor]]:
    """Sequences of 8 tokens, the same in every process."""
    rows = torch.randint(50, (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows]


def train_llama(
    config: dict[str, Any],
    folder: str,
    settings: dict[str, Any],
    tied: bool = False,
    resume: int | None = None,
    snippet: str = "",
    registers: str = "",
    optimizer: dict[str, Any] | None = None,
    callback: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train with the HF Trainer, 2 sequences a rank and step, in order.

    Args:
        config: of DeepSpeed, left as it is; empty for a Trainer without DeepSpeed.
        settings: of TrainingArguments.
        resume: from the checkpoint of that step.
        snippet: code that makes a trainer of model, arguments and rows, and trains.
        registers: code that makes a callback Register, to be used in the place of ``register(model)``.
        optimizer: settings for a TrainerOptimizer, in the place of ``register(model)``.
        callback: arguments of an OptForgeCallback, in the place of ``register(model)``.

    Returns:
        Losses, in training and in evaluation, learning rates, weights and parameter groups; the Trainer's log, and what a
        reporter saw of it.
    """
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true" if config else "false"
    PartialState(backend="gloo", **({} if config else {"cpu": True}))  # on a CPU Accelerate would count one process
    names: dict[str, Any] = {"ds_optforge": ds_optforge, "TrainerCallback": TrainerCallback}
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
        deepspeed=copy.deepcopy(config) or None,
        use_cpu=not config,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        accelerator_config={"use_configured_state": True},
        **{"save_strategy": "no", **settings},
    )
    model = llama(tied)
    recorder = Recorder()
    callbacks: list[TrainerCallback] = [recorder]
    if registers:
        exec(registers, names)  # what `ds-optforge init` prints
        callbacks.append(names["Register"]())
    elif optimizer is None and callback is None and not snippet:
        ds_optforge.register(model)
    data: dict[str, Any] = {"train_dataset": sentences(64), "eval_dataset": sentences(16)}
    if optimizer is not None:
        data["optimizer_cls_and_kwargs"] = (ds_optforge.TrainerOptimizer, optimizer)
    if snippet:
        names |= {"model": model, "arguments": arguments, "rows": data["train_dataset"]}
        exec(snippet, names)  # the text of the docs
        trainer = names["trainer"]
    else:
        trainer = Trainer(model=model, args=arguments, callbacks=callbacks, **data)
        recorder.trainer = trainer
        if callback is not None:
            trainer.add_callback(ds_optforge.OptForgeCallback(trainer, **callback))
        trainer.train(resume_from_checkpoint=str(Path(folder, f"checkpoint-{resume}")) if resume else None)
    engine = trainer.model_wrapped
    result = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "evaluated": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "rates": recorder.rates,
        "parameters": cases.full_parameters(getattr(engine, "module", engine)),
        "groups": [{**group, "params": None} for group in base_optimizer(trainer.optimizer)[1].param_groups],
        "log": trainer.state.log_history,
        "reported": recorder.reported,
    }
    if config:
        engine.destroy()
    return result


def go_on(stage: int, params: dict[str, Any], folder: str, step: int, steps: int) -> dict[str, Any]:
    """Resume from a portable checkpoint of `train_llama` on 2 ranks, without the Trainer, for ``steps`` more of its steps."""
    config = {
        "train_batch_size": 4,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "OptForge", "params": params},
    }
    engine = ds_optforge.initialize(model=llama(False), config=config)[0]
    ds_optforge.load_checkpoint(engine, folder)
    losses = []
    for i in range(step, step + steps):
        batch = torch.stack([row["input_ids"] for row in sentences(64)[4 * i : 4 * i + 4]])
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    parameters = cases.full_parameters(engine.module)
    engine.destroy()
    return {"losses": losses, "parameters": parameters}


# ------------------------------------------------------------------------------------------ export


def language_model(kind: str) -> PreTrainedModel:
    """A tiny Llama, or a tiny GPT-2, whose embedding and head are one weight."""
    torch.manual_seed(0)
    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes))
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4))


def prompt() -> torch.Tensor:
    """Tokens of which `save_language_model` and its test compute logits."""
    return torch.arange(24).view(2, 12) % 61


def save_language_model(config: dict[str, Any], kind: str, folder: str, ours: bool = True) -> torch.Tensor:
    """Train, and save in both ways, with config.json beside the tags of the engine; the logits of `prompt` at that moment."""
    model = language_model(kind)
    if ours:
        engine = ds_optforge.initialize(model=model, config=config)[0]
    else:
        engine = deepspeed.initialize(model=model, config=config, optimizer=torch.optim.AdamW(model.parameters(), lr=3e-3))[0]
    tokens = prompt()
    for _ in range(3):
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(f"{folder}/engine")
    if ours:
        ds_optforge.save_checkpoint(engine, f"{folder}/portable")
    model.config.save_pretrained(f"{folder}/engine")
    engine.eval()
    with torch.no_grad():
        logits: torch.Tensor = engine(input_ids=tokens).logits.float()
    engine.destroy()
    return logits
