"""The candidates that the benchmarks of a step compare, and the model that all of them train."""

from typing import Any

import deepspeed
import torch
from deepspeed import comm

import ds_optforge
from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.forecast.forecast import lay_out
from ds_optforge.routing.roles import routes_of
from ds_optforge.rules.base import MatrixRule
from ds_optforge.zero.plan import ExchangePlan, make_plan
from workload import Corpus, micro_batch_rows
from workload.gpt import GPT, GPTConfig

LENGTH = 16  # bytes of a sequence: short, so that the optimizer dominates
ADAMW = "AdamW"
GATHER = "gather"
SHARD_LOCAL = "shard_local"
EVERY_5 = "gather every 5"
BUILT_IN = "built-in, {}"
NS_METHODS = ("standard", "gram")
_BESIDE = {"lr": 0.003, "betas": [0.9, 0.95]}

Section = dict[str, Any]

# The built-in Muon is compiled by torch, anew for other shapes and offsets; with torch's limit of 8 it would run
# uncompiled in a process that holds several engines.
torch._dynamo.config.recompile_limit = 64


def adamw() -> Section:
    """The optimizer section of AdamW of ds_optforge, the baseline of every overhead."""
    return {"type": "OptForge", "params": {"name": "adamw", **_BESIDE}}


def torch_adamw() -> Section:
    """The optimizer section of DeepSpeed's AdamW on torch's kernel, which shows that the baseline is fair."""
    return {"type": "AdamW", "params": {**_BESIDE, "torch_adam": True}}


def muon(sharding: dict[str, Any] | None = None, **more: Any) -> Section:
    """The optimizer section of Muon of ds_optforge; ``sharding`` is the section of that name, ``more`` other fields."""
    params = {"name": "muon", "lr": 0.02, "momentum": 0.95, "adamw": _BESIDE, "sharding": sharding or {}, **more}
    return {"type": "OptForge", "params": params}


def built_in(method: str) -> Section:
    """The optimizer section of DeepSpeed's Muon with one of its `NS_METHODS`."""
    params = {"lr": 0.02, "momentum": 0.95, "muon_lr": 0.02, "adam_lr": 0.003, "betas": [0.9, 0.95], "ns_method": method}
    return {"type": "Muon", "params": params}


def sharded(**more: Any) -> dict[str, Section]:
    """Optimizer sections of Muon in each sharding mode; ``more`` goes into the sharding section."""
    return {
        GATHER: muon(more),
        SHARD_LOCAL: muon({"mode": "shard_local", **more}),
        EVERY_5: muon({"mode": "shard_local", "gather_every": 5, **more}),
    }


def network(width: int, layers: int) -> GPT:
    """Build a byte GPT with 12 * layers * width^2 elements in matrices, always with the same weights."""
    torch.manual_seed(0)
    return GPT(GPTConfig(layers=layers, width=width, heads=width // 64, sequence_length=LENGTH))


def engine_of(model: GPT, stage: int, optimizer: Section) -> Any:
    """Build a DeepSpeed engine that trains ``model`` with one sequence per rank and step."""
    ds_optforge.register(model)
    # On ZeRO-3 the built-in Muon asks for all-reduced gradients.
    zero = {"reduce_scatter": False} if stage == 3 and optimizer["type"] == "Muon" else {}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        # The default is a buffer of 2 GB, more than all else together in a model of this size.
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10**7, **zero},
        "optimizer": optimizer,
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def batch(corpus: Corpus, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's tokens and targets of a step, each (1, LENGTH), int64."""
    world = comm.get_world_size()
    return corpus.batch(step, 0, world, LENGTH, micro_batch_rows(0, comm.get_rank(), world, 1))


def plan_of(model: GPT, stage: int, world_size: int) -> ExchangePlan:
    """The plan that `muon()` makes for the model's matrices."""
    config = OptimizerConfig(muon()["params"])
    matrices = [route for route in routes_of(model, config) if route.matrices]
    rule = matrices[0].settings.build()
    assert isinstance(rule, MatrixRule)
    cost = rule.cost
    layout, _ = lay_out(matrices, world_size, stage)
    return make_plan(layout, lambda matrix: cost(matrix.rows, matrix.cols), config.common.sharding.bucket_numel)
