"""What the ranks of a pool run to try a feature of DeepSpeed: Muon, and torch.optim.AdamW as the control, on the same model.

Next to it, in one process and without DeepSpeed, what both should come to (`reference`).
"""

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel import parallel_state_sp as ulysses
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, nn
from torch.nn import functional as F

import ds_optforge
from tests import models
from tests.distributed import cases
from tests.oracles import EXACT

STEPS = 4
MUON = {**cases.MUON, **EXACT}
OPTIMIZERS = ("muon", "adamw")


def control(parameters: Any) -> torch.optim.AdamW:
    """The optimizer that DeepSpeed knows best."""
    return torch.optim.AdamW(parameters, lr=3e-3, eps=1e-5, weight_decay=0.1)


# ------------------------------------------------------------------------------------------ models


class Routed(nn.Module):
    """Two experts, of which a rank uses one in a step: ZeRO-3 would wait for the other's weights, were it no leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(24, 24) for _ in range(2))

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        chosen_expert: Tensor = self.experts[chosen](x)
        return chosen_expert


class RoutedNet(nn.Module):
    """An embedding, experts, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(models.VOCABULARY, 24)
        self.routed = Routed()
        self.lm_head = nn.Linear(24, models.VOCABULARY)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        return F.cross_entropy(self.lm_head(x + self.routed(x, int(tokens[0]) % 2)), targets)


class Attention(nn.Module):
    """Four heads of 6 over a sequence that ranks have shared out (Ulysses), or that one has whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(models.VOCABULARY, 24)
        self.qkv = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in range(3))
        self.out = nn.Linear(24, 24)
        self.lm_head = nn.Linear(24, models.VOCABULARY)
        self.attend: Callable[..., Tensor] = attention

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        heads = [linear(x).view(*tokens.shape, 4, 6) for linear in self.qkv]
        x = x + self.out(self.attend(*heads).reshape(*tokens.shape, 24))
        return F.cross_entropy(self.lm_head(x).flatten(0, 1), targets.flatten())


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of (batch, sequence, heads, width)."""
    swapped = (each.transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(*swapped).transpose(1, 2)


def sequences(step: int) -> tuple[Tensor, Tensor]:
    """Two sequences of 8 tokens, and what they should become."""
    tokens, targets = models.batch(step, 16)
    return tokens.view(2, 8), targets.view(2, 8)


def build(kind: str) -> nn.Module:
    """The model of that name, from one seed."""
    torch.manual_seed(0)
    return {"awkward": models.AwkwardNet, "routed": RoutedNet, "attention": Attention}[kind]()


# ------------------------------------------------------------------------------------------ on ranks


def engine_of(model: nn.Module, config: dict[str, Any], optimizer: str, **arguments: Any) -> Any:
    """An engine by the one line and JSON, or the control's."""
    config = copy.deepcopy(config)
    if optimizer == "muon":
        ds_optforge.register(model)
        return deepspeed.initialize(model=model, config=config, **arguments)[0]
    del config["optimizer"]
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return deepspeed.initialize(model=model, config=config, optimizer=control(model.parameters()), **arguments)[0]


def train(config: dict[str, Any], kind: str = "awkward", leaf: bool = False) -> dict[str, dict[str, Tensor]]:
    """Whole parameters after `STEPS` steps, by optimizer."""
    found = {}
    for optimizer in OPTIMIZERS:
        model = build(kind)
        if leaf:
            deepspeed.utils.set_z3_leaf_modules(model, [Routed])
        engine = engine_of(model, config, optimizer)
        cases.run_steps(engine, 0, STEPS, engine.gradient_accumulation_steps())
        found[optimizer] = cases.full_parameters(engine.module)
        engine.destroy()
    return found


def train_sequence_parallel(config: dict[str, Any], size: int) -> dict[str, dict[str, Tensor]]:
    """The same on `Attention`, whose sequences are cut over ``size`` ranks; the other ranks have other sequences."""
    found = {}
    ulysses.initialize_sequence_parallel(size)
    group = ulysses.get_sequence_parallel_group()
    for optimizer in OPTIMIZERS:
        model = build("attention")
        engine = engine_of(model, config, optimizer, mpu=ulysses)
        model.attend = partial(DistributedAttention(attention, group, scatter_idx=2, gather_idx=1), batch_dim_idx=0)
        place, row = dist.get_rank(group), dist.get_rank() // size
        for step in range(STEPS):
            tokens, targets = (
                each.chunk(dist.get_world_size() // size)[row].chunk(size, dim=1)[place] for each in sequences(step)
            )
            # Over the ranks of a sequence DeepSpeed adds gradients up; on ZeRO-3 it takes the mean of all ranks.
            engine.backward(engine(tokens, targets) / (1 if engine.zero_optimization_stage() == 3 else size))
            engine.step()
        found[optimizer] = cases.full_parameters(engine.module)
        engine.destroy()
    deepspeed.utils.groups.mpu = None  # outlives the engine
    return found


# ------------------------------------------------------------------------------------------ in one process


def mean(first: Tensor, second: Tensor) -> Tensor:
    """Of two ranks' gradients, as DeepSpeed takes it when nothing is said."""
    return (first + second) / 2


def total(first: Tensor, second: Tensor) -> Tensor:
    """`gradient_allreduce_op: sum`."""
    return first + second


# How two gradients become one that both ranks step with. Halving what is small loses a bit in float16, so its place counts.
COMBINED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": mean,
    "total": total,
    "mean of bf16": lambda first, second: mean(first.bfloat16(), second.bfloat16()).float(),
    "bf16 of the mean": lambda first, second: mean(first, second).bfloat16().float(),
    "mean of fp16": lambda first, second: mean(first.half(), second.half()).float(),
    "halves in fp16": lambda first, second: ((first / 2).half() + (second / 2).half()).float(),
    "fp16 in halves": lambda first, second: (first.half() / 2 + second.half() / 2).float(),
}


@cache
def reference(optimizer: str, kind: str = "awkward", combined: str = "mean", autocast: bool = False) -> dict[str, Tensor]:
    """Parameters after `STEPS` steps of one process, which takes the gradients of two ranks in turn."""
    model = build(kind)
    batch = sequences if kind == "attention" else models.batch
    chosen = ds_optforge.build_optimizer(model, MUON) if optimizer == "muon" else control(model.parameters())
    for step in range(STEPS):
        of_ranks = []
        for tokens, targets in zip(*(each.chunk(2) for each in batch(step)), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(tokens, targets)
            of_ranks.append(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))
        for (name, parameter), first, second in zip(model.named_parameters(), *of_ranks, strict=True):
            in_linear = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear)
            parameter.grad = COMBINED[combined if in_linear or not autocast else "mean"](first, second)
        chosen.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of a parameter."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - weight).norm() / weight.norm()) for name, weight in expected.items())
