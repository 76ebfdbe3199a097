"""What the ranks of a pool run: real DeepSpeed engines on small models. Every function returns plain data."""

import contextlib
import os
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

import ds_optforge
from tests import models
from tests.step_trace import traced
from workload import build_model, load_corpus, micro_batch_rows

STEPS = 12  # of a run that is compared with another: enough for warm-ups to end, and for idle layers to be idle four times
MUON = {"name": "muon", "lr": 0.02, "weight_decay": 0.1, "adamw": {"lr": 3e-3, "eps": 1e-5}}


def engine_config(stage: int, params: Mapping[str, Any], **extra: Any) -> dict[str, Any]:
    """A DeepSpeed configuration with global batch 8; keys of ``extra`` are merged in, one level deep."""
    config: dict[str, Any] = {
        "train_batch_size": 8,
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1.0 where nothing is said
        "optimizer": {"type": "OptForge", "params": dict(params)},
        "zero_optimization": {"stage": stage},
    }
    for key, value in extra.items():
        config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
    return config


def build_engine(config: dict[str, Any], model_options: Mapping[str, Any], zero_init: bool = False) -> Any:
    """An engine on `models.AwkwardNet`; with ``zero_init`` its parameters are partitioned as they are made."""
    if zero_init:
        torch.manual_seed(0)
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = models.AwkwardNet(**model_options)
        load_weights(model, models.build(**model_options).state_dict())
    else:
        model = models.build(**model_options)
    return ds_optforge.initialize(model=model, config=config)[0]


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """zero.Init draws each rank's numbers anew; give it those of the ordinary model."""
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.data.copy_(weights[name])


def full_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, whole, in float32."""
    parameters = {}
    for name, parameter in model.named_parameters():
        gathers = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters(parameter) if gathers else contextlib.nullcontext():
            parameters[name] = parameter.detach().float().clone()
    return parameters


def run_steps(engine: Any, first: int, steps: int, accumulation: int = 1) -> list[float]:
    """Train on this rank's share of each global batch; the mean loss over ranks of every step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in range(first, first + steps):
        tokens, targets = models.batch(step, engine.train_batch_size())
        micro = len(tokens) // (world * accumulation)
        total = torch.zeros(())
        for part in range(accumulation):
            share = slice((part * world + rank) * micro, (part * world + rank + 1) * micro)
            loss = engine(tokens[share], targets[share])
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / accumulation
        dist.all_reduce(total)
        losses.append(total.item() / world)
    return losses


def train(
    config: dict[str, Any],
    steps: int = STEPS,
    model_options: Mapping[str, Any] | None = None,
    zero_init: bool = False,
) -> dict[str, Any]:
    """Train and return losses, whole parameters and what tells how the engine was built."""
    engine = build_engine(config, model_options or {}, zero_init)
    try:
        losses = run_steps(engine, 0, steps, engine.gradient_accumulation_steps())
        return {
            "losses": losses,
            "parameters": full_parameters(engine.module),
            "wrapper": type(engine.optimizer).__name__,
            "rates": {group["optforge_group"]: group["lr"] for group in engine.optimizer.param_groups},
        }
    finally:
        engine.destroy()


def train_in_own_mode(config: dict[str, Any]) -> None:
    """Rank 1 gathers, whatever the configuration says."""
    if dist.get_rank() == 1:
        config["optimizer"]["params"]["sharding"] = {"mode": "gather"}
    run_steps(build_engine(config, {}), 0, 1)


def all_to_alls(config: dict[str, Any]) -> int:
    """How many all-to-alls the first step makes."""
    engine = build_engine(config, {})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run_steps(engine, 0, 1)
    engine.destroy()
    return sum(event.name == "c10d::alltoall_base_" for event in profile.events())


def train_with_object(config: dict[str, Any], door: str, groups: bool = False, steps: int = 10) -> dict[str, Any]:
    """Train with an optimizer object in place of the section of ``config``, by either door and without `register`.

    ``groups``: KellerJordan's, made as his users make them.
    """
    model = models.build()
    parameters = list(model.parameters())
    if groups:
        matrices = [p for p in parameters if p.ndim >= 2]
        rest = [p for p in parameters if p.ndim < 2]
        optimizer = ds_optforge.MuonWithAuxAdam(
            [{"params": matrices, "use_muon": True}, {"params": rest, "use_muon": False, "eps": 1e-5}]
        )
    else:
        optimizer = ds_optforge.build_optimizer(model, config)
    given = {key: value for key, value in config.items() if key != "optimizer"}
    doors = {"deepspeed": deepspeed.initialize, "ds_optforge": ds_optforge.initialize}
    engine = doors[door](model=model, config=given, optimizer=optimizer)[0]
    try:
        losses = run_steps(engine, 0, steps)
        return {"losses": losses, "parameters": full_parameters(engine.module), "kept": base_optimizer(engine) is optimizer}
    finally:
        engine.destroy()


def base_optimizer(engine: Any) -> ds_optforge.OptForge:
    """The OptForge under an engine's wrapper."""
    wrapper = engine.optimizer
    base: ds_optforge.OptForge = wrapper if isinstance(wrapper, ds_optforge.OptForge) else wrapper.optimizer
    return base


def state_formats(engine: Any) -> list[tuple[str, str]]:
    """Name and dtype of every state tensor, in order."""
    states = base_optimizer(engine).state.values()
    return [(key, str(getattr(value, "dtype", "number"))) for state in states for key, value in state.items()]


def save_and_load(config: dict[str, Any], folder: str, model_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """5 steps, save, 5 steps; then a fresh engine that loads and takes the last 5 again."""
    engine = build_engine(config, model_options or {})
    run_steps(engine, 0, 5)
    engine.save_checkpoint(folder)
    uninterrupted = {"losses": run_steps(engine, 5, 5), "parameters": full_parameters(engine.module)}
    uninterrupted["state"] = state_formats(engine)
    engine.destroy()
    return {"uninterrupted": uninterrupted, "resumed": load(config, folder, model_options)}


def load(config: dict[str, Any], folder: str, model_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A fresh engine that loads what `save_and_load` saved, and takes the last 5 steps."""
    fresh = build_engine(config, model_options or {})
    path, _ = fresh.load_checkpoint(folder)
    assert path is not None
    resumed = {"losses": run_steps(fresh, 5, 5), "parameters": full_parameters(fresh.module)}
    resumed["state"] = state_formats(fresh)
    fresh.destroy()
    return resumed


def overflow_then_idle(config: dict[str, Any]) -> bool:
    """A step that overflows, then one in which a layer has no part: is everything finite?"""
    engine = build_engine(config, {"sometimes": True})
    engine.module.calls = 1  # the first step uses the layer, the third does not
    run_steps(engine, 0, 40)
    weights = full_parameters(engine.module).values()
    states = [v for state in base_optimizer(engine).state.values() for v in state.values() if isinstance(v, Tensor)]
    skipped = engine.skipped_steps
    engine.destroy()
    return skipped > 0 and all(bool(value.float().isfinite().all()) for value in [*weights, *states])


def train_past_overflow(config: dict[str, Any]) -> dict[str, Any]:
    """Start with a loss scale that overflows; compare parameters around the skipped steps, then go on."""
    engine = build_engine(config, {})
    before = full_parameters(engine.module)
    run_steps(engine, 0, 1)
    after = full_parameters(engine.module)
    skipped = engine.skipped_steps
    unchanged = all(torch.equal(before[name], after[name]) for name in before) and not engine.optimizer.optimizer.state
    losses = run_steps(engine, 1, 60)
    engine.destroy()
    return {"skipped": skipped, "unchanged": unchanged, "learns": losses[-1] < losses[0]}


def load_into_another(saved: dict[str, Any], loading: dict[str, Any], folder: str) -> tuple[str, bool]:
    """Save from one configuration, load into an engine of another; the error, and whether state stayed as it was."""
    engine = build_engine(saved, {})
    run_steps(engine, 0, 1)
    engine.save_checkpoint(folder)
    engine.destroy()
    other = build_engine(loading, {})
    run_steps(other, 0, 1)
    before = [piece.detach().clone() for piece in other.optimizer.optimizer.state]
    message = ""
    try:
        other.load_checkpoint(folder, load_module_only=False)
    except ds_optforge.ConfigError as error:
        message = str(error)
    after = list(other.optimizer.optimizer.state)
    other.destroy()
    return message, all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def disagree(stage: int, **extra: Any) -> None:
    """Rank 0 has the matrix the other way round: the same number of elements, so DeepSpeed notices nothing."""
    torch.manual_seed(0)
    rows, cols = (24, 32) if dist.get_rank() == 0 else (32, 24)
    model = nn.Sequential(nn.Linear(cols, cols, bias=False), nn.Linear(cols, rows, bias=False))
    model[0].weight = nn.Parameter(torch.randn(16, 16))
    engine = ds_optforge.initialize(model=model, config=engine_config(stage, MUON, **extra))[0]
    loss = sum(parameter.square().sum() for parameter in engine.module.parameters())
    engine.backward(loss)
    engine.step()


def without_register(config: dict[str, Any]) -> None:
    """The JSON alone."""
    deepspeed.initialize(model=models.build(), config=config)


def flattening_scheduler(stage: int) -> None:
    """DeepSpeed's WarmupLR writes one rate into every group; `register` cannot see the scheduler section."""
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 2, "warmup_min_lr": 0.001}}
    model = models.build()
    ds_optforge.register(model)
    engine = deepspeed.initialize(model=model, config=engine_config(stage, MUON, scheduler=scheduler))[0]
    run_steps(engine, 0, 1)


def change_weight_behind_engine() -> None:
    """ZeRO would overwrite such a change with its own copy of the weight. Only the rank that holds it sees it."""
    engine = build_engine(engine_config(2, MUON), {})
    engine.module.blocks[1].weight.data.view(-1)[0] += 1.0
    run_steps(engine, 0, 1)


def evaluate_on_average(config: dict[str, Any], folder: str) -> dict[str, Any]:
    """Train, look at the weights inside and after `evaluation_weights`, go on training."""
    engine = build_engine(config, {})
    run_steps(engine, 0, 10, engine.gradient_accumulation_steps())
    before = full_parameters(engine.module)
    saved: dict[str, Any] = {"state": {}, "param_groups": []}  # is refused before anybody looks at it
    refused = []
    with ds_optforge.evaluation_weights(engine):
        inside = full_parameters(engine.module)
        engine.eval()
        loss = engine(*models.batch(0)).item()
        optimizer = base_optimizer(engine)
        saves, loads = lambda: engine.save_checkpoint(folder), lambda: optimizer.load_state_dict(saved)
        actions = (optimizer.step, saves, loads) if optimizer.averages_weights else ()
        for action in actions:
            try:
                action()
            except RuntimeError as error:
                refused.append(str(error))
    after = full_parameters(engine.module)
    engine.train()
    run_steps(engine, 10, 10, engine.gradient_accumulation_steps())
    end = full_parameters(engine.module)
    engine.destroy()
    return {"before": before, "inside": inside, "after": after, "end": end, "loss": loss, "refused": refused}


def average_beside(config: dict[str, Any], decay: float) -> dict[str, Any]:
    """Train; the weights inside `evaluation_weights`, and the moving average of what the engine's weights were."""
    engine = build_engine(config, {})
    try:
        expected: dict[str, Tensor] = {}
        for step in range(STEPS):
            run_steps(engine, step, 1)
            for name, weight in full_parameters(engine.module).items():
                expected[name] = expected[name].lerp_(weight, 1 - decay) if step else weight
        with ds_optforge.evaluation_weights(engine):
            inside = full_parameters(engine.module)
        return {"inside": inside, "expected": expected, "trained": full_parameters(engine.module)}
    finally:
        engine.destroy()


class MixtureNet(nn.Module):
    """Four experts, one per token: with 8 tokens some are idle in some steps."""

    def __init__(self, expert_parallel_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(models.VOCABULARY, 24)
        expert = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))
        self.moe = MoE(24, expert, num_experts=4, ep_size=expert_parallel_size, k=1, use_rts=False, **ROOMY)
        self.lm_head = nn.Linear(24, models.VOCABULARY)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        mixed, *_ = self.moe(x)  # the balance loss depends on how many tokens a rank sees
        return nn.functional.cross_entropy(self.lm_head(x + mixed), targets)


# No token is dropped, so that the result does not depend on how tokens are shared out.
ROOMY = {"capacity_factor": 4.0, "eval_capacity_factor": 4.0, "min_capacity": 0}


def train_mixture(config: dict[str, Any], expert_parallel_size: int, steps: int = 20) -> dict[str, Any]:
    """Losses, and the groups that the optimizer made."""
    engine = ds_optforge.initialize(model=MixtureNet(expert_parallel_size), config=config)[0]
    losses = run_steps(engine, 0, steps)
    groups = [group["optforge_group"] for group in base_optimizer(engine).param_groups]
    engine.destroy()
    return {"losses": losses, "groups": groups}


def train_workload(config: dict[str, Any], steps: int) -> list[float]:
    """The tiny GPT on the default corpus, by one line and JSON: losses, the mean over ranks."""
    schedule = config["scheduler"]["params"]
    if "total_num_steps" in schedule:
        schedule["total_num_steps"] = steps
    torch.manual_seed(0)
    model = build_model("tiny", sequence_length=64)
    ds_optforge.register(model)
    engine = deepspeed.initialize(model=model, config=config)[0]
    micro = engine.train_micro_batch_size_per_gpu()
    losses = []
    for step in range(steps):
        rows = micro_batch_rows(0, dist.get_rank(), dist.get_world_size(), micro)
        tokens, targets = CORPUS().batch(step, 0, engine.train_batch_size(), 64, rows)
        loss = engine(tokens, targets)
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    engine.destroy()
    return losses


CORPUS = cache(lambda: load_corpus(None))


def run_snippet(code: str, folder: str) -> list[float]:
    """Run README code that makes an engine or a plain optimizer for ``model``, then train with it."""
    os.chdir(folder)
    names: dict[str, Any] = {"model": models.build()}
    exec(code, names)  # the README's own text
    if "engine" in names:
        engine = names["engine"]
        losses = fit_one_batch(lambda batch: engine(*batch), engine.backward, engine.step)
        engine.destroy()
        return losses
    model, optimizer = names["model"], names["optimizer"]

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()
        if "scheduler" in names:
            names["scheduler"].step()

    return fit_one_batch(lambda batch: model(*batch), torch.Tensor.backward, step)


def fit_one_batch(forward: Any, backward: Any, step: Any, steps: int = 10) -> list[float]:
    """The loss on the same batch, step by step."""
    losses = []
    for _ in range(steps):
        loss = forward(models.batch(0))
        backward(loss)
        step()
        losses.append(loss.item())
    return losses


def nan_on_one_rank(config: dict[str, Any]) -> bool:
    """Two steps, then one whose gradient is NaN on rank 0 alone: is every weight and state what it was?"""
    engine = build_engine(config, {})
    run_steps(engine, 0, 2)
    before = full_parameters(engine.module)
    state = [v.clone() for s in base_optimizer(engine).state.values() for v in s.values() if isinstance(v, Tensor)]
    loss = engine(*models.batch(2)) * (float("nan") if dist.get_rank() == 0 else 1.0)
    engine.backward(loss)
    engine.step()
    after = full_parameters(engine.module)
    now = [v for s in base_optimizer(engine).state.values() for v in s.values() if isinstance(v, Tensor)]
    same = all(torch.equal(before[name], after[name]) for name in before)
    same = same and all(torch.equal(a, b) for a, b in zip(state, now, strict=True))
    engine.destroy()
    return same


def train_with_and_without_offload(
    config: dict[str, Any], model_options: Mapping[str, Any] | None = None, steps: int = 8, **offload: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`train` twice on one seed: the optimizer's slices on the accelerator, and on the CPU."""
    sections = ({"device": "none"}, {"device": "cpu", **offload})
    zero = config["zero_optimization"]
    kept, offloaded = (
        train({**config, "zero_optimization": {**zero, "offload_optimizer": section}}, steps, model_options)
        for section in sections
    )
    return kept, offloaded


def trace_step(config: dict[str, Any], model_options: Mapping[str, Any], allowed: int = sys.maxsize) -> dict[str, Any]:
    """What OptForge's own ``step()`` runs, and the most bytes that one call holds (of ``allowed``), once its state is there."""
    engine = build_engine(config, model_options)
    run_steps(engine, 0, 1)
    optimizer = base_optimizer(engine)
    with traced(optimizer, allowed) as calls:
        run_steps(engine, 1, 1)
    slices = [piece.numel() for piece in optimizer.state]
    engine.destroy()
    operators = [operator for call in calls for operator in call.operators]
    return {"operators": operators, "peak": max(call.peak for call in calls), "slices": slices}


def first_step_under_deepspeed(config: dict[str, Any]) -> tuple[str, bool]:
    """The one line and JSON: the error that stops it before or in its first step, and whether any state was made."""
    model = models.build()
    ds_optforge.register(model)
    engine = None
    try:
        engine = deepspeed.initialize(model=model, config=config)[0]
        run_steps(engine, 0, 1)
    except Exception as error:  # of whatever type: DeepSpeed's own checks raise most of them
        return f"{type(error).__name__}: {error}", engine is not None and bool(base_optimizer(engine).state)
    return "", True
