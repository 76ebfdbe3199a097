"""What the ranks of a pool run to test DeepSpeed's PipelineModule, and the same model in one process to compare with."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn
from torch.nn import functional as F

import ds_optforge
from ds_optforge.optimizer import OptForge
from tests import models
from tests.distributed import cases

WIDTH = 88  # so that state of matrices and of the embedding is kept in 8 bits where that is asked for
SEED = 1234  # of the first layer; each has its own
BATCH = 8
MICRO_BATCH = 2


class Block(nn.Module):
    """A residual layer with a matrix and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.lin(x))


class Frozen(nn.Linear):
    """A projection that is not trained."""

    def __init__(self, size: int) -> None:
        super().__init__(WIDTH, size)
        self.requires_grad_(False)


def as_head(embedding: nn.Embedding, x: Tensor) -> Tensor:
    """The embedding's other place."""
    return F.linear(x, embedding.weight)


def specs(kind: str = "plain") -> list[Any]:
    """The layers: two stages of three, or three of two, of which each has other roles.

    ``kind``: "plain", "tied" (the embedding is the head too), "tied_block" (two places have the same matrix),
    "frozen" (the last two layers), "untied_bias" (a layer of which only the weight is tied).
    """
    blocks = [LayerSpec(Block) for _ in range(3)]
    if kind == "tied":
        embed = TiedLayerSpec("embed", nn.Embedding, models.VOCABULARY, WIDTH)
        head = TiedLayerSpec("embed", nn.Embedding, models.VOCABULARY, WIDTH, forward_fn=as_head)
        return [embed, *blocks, LayerSpec(nn.LayerNorm, WIDTH), head]
    if kind == "frozen":
        return [LayerSpec(nn.Embedding, models.VOCABULARY, WIDTH), *blocks, *(LayerSpec(Frozen, size) for size in (WIDTH, 50))]
    ends = [LayerSpec(nn.LayerNorm, WIDTH), LayerSpec(nn.Linear, WIDTH, models.VOCABULARY, bias=False)]
    if kind == "untied_bias":
        norms = [TiedLayerSpec("norm", nn.LayerNorm, WIDTH) for _ in range(2)]
        return [LayerSpec(nn.Embedding, models.VOCABULARY, WIDTH), norms[0], *blocks[:2], norms[1], ends[1]]
    if kind == "tied_block":
        tied = [TiedLayerSpec("block", nn.Linear, WIDTH, WIDTH) for _ in range(2)]
        return [LayerSpec(nn.Embedding, models.VOCABULARY, WIDTH), tied[0], blocks[0], tied[1], *ends]
    return [LayerSpec(nn.Embedding, models.VOCABULARY, WIDTH), *blocks, *ends]


class Chain(nn.Module):
    """The same layers in one process, with the names that a PipelineModule gives to them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.tied_modules = nn.ModuleDict()
        self.calls: list[Any] = []
        for index, spec in enumerate(specs(kind)):
            torch.manual_seed(SEED + index)
            if not isinstance(spec, TiedLayerSpec):
                self.add_module(str(index), layer := spec.build())
                self.calls.append(layer)
                continue
            if spec.key not in self.tied_modules:
                self.tied_modules[spec.key] = spec.build()
            function, module = spec.forward_fn, self.tied_modules[spec.key]
            self.calls.append((lambda x, f=function, m=module: f(m, x)) if function else module)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = tokens
        for layer in self.calls:
            x = layer(x)
        return F.cross_entropy(x.float(), targets)


class Sequential(nn.Sequential):
    """The plain layers in a row, with the same names too."""

    def __init__(self) -> None:
        layers = []
        for index, spec in enumerate(specs()):
            torch.manual_seed(SEED + index)
            layers.append(spec.build())
        super().__init__(*layers)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(super().forward(tokens).float(), targets)


def whole(kind: str = "plain") -> nn.Module:
    """The model in one process."""
    return Sequential() if kind == "plain" else Chain(kind)


def module(stages: int, kind: str = "plain") -> PipelineModule:
    """This rank's stage of the model."""
    return PipelineModule(
        specs(kind),
        num_stages=stages,
        loss_fn=lambda x, targets: F.cross_entropy(x.float(), targets),
        seed_layers=True,
        base_seed=SEED,
        partition_method="uniform",
    )


def configuration(stage: int, params: Mapping[str, Any] | None, **extra: Any) -> dict[str, Any]:
    """A DeepSpeed configuration with global batch 8 in micro-batches of 2; without ``params``, for an optimizer object."""
    config = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        **extra,
    }
    return config if params is None else {**config, "optimizer": {"type": "OptForge", "params": dict(params)}}


def build(config: dict[str, Any], stages: int, kind: str = "plain", door: str = "initialize") -> Any:
    """An engine on the pipeline.

    ``door``: "initialize", "register", "object", "callable", "groups" (KellerJordan's), or "control" (torch's AdamW).
    """
    model = module(stages, kind)
    given = {key: value for key, value in config.items() if key != "optimizer"}
    if door == "initialize":
        return ds_optforge.initialize(model=model, config=config)[0]
    if door == "object":
        optimizer = ds_optforge.build_optimizer(model, config)
        return ds_optforge.initialize(model=model, config=given, optimizer=optimizer)[0]
    if door.startswith("groups"):
        if door == "groups":
            ds_optforge.register(model)
        named = list(model.named_parameters())
        matrices = [parameter for name, parameter in named if name.endswith("lin.weight")]
        rest = [parameter for name, parameter in named if not name.endswith("lin.weight")]
        groups = [{"params": matrices, "use_muon": True}, {"params": rest, "use_muon": False, "eps": 1e-5}]
        return ds_optforge.initialize(model=model, config=given, optimizer=ds_optforge.MuonWithAuxAdam(groups))[0]
    if door == "callable":
        params = config["optimizer"]["params"]
        return ds_optforge.initialize(model=model, config=given, optimizer=lambda p: OptForge(p, **params))[0]
    if door == "control":
        given["zero_allow_untested_optimizer"] = True
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-5, weight_decay=0.0)
        return deepspeed.initialize(model=model, config=given, optimizer=optimizer)[0]
    ds_optforge.register(model)
    return deepspeed.initialize(model=model, config=config)[0]


def micro_batches(engine: Any, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of a global batch."""
    tokens, targets = models.batch(step, BATCH)
    data = engine.grid.get_data_parallel_rank(), engine.grid.get_data_parallel_world_size()
    for part in range(engine.gradient_accumulation_steps()):
        first = (part * data[1] + data[0]) * MICRO_BATCH
        yield tokens[first : first + MICRO_BATCH], targets[first : first + MICRO_BATCH]


def run_steps(engine: Any, first: int, steps: int) -> list[float]:
    """The mean loss of every step."""
    return [engine.train_batch(micro_batches(engine, step)).item() for step in range(first, first + steps)]


def parameters(engine: Any) -> dict[str, Tensor]:
    """This stage's parameters, in float32."""
    named = engine.module.named_parameters()
    return {name: p.detach().float().clone() for name, p in named if not name.startswith("optforge_placeholders")}


def train(config: dict[str, Any], stages: int, steps: int = 6, kind: str = "plain", door: str = "initialize") -> dict[str, Any]:
    """Train, and return losses, this stage's parameters, and what tells how the engine was built."""
    engine = build(config, stages, kind, door)
    try:
        losses = run_steps(engine, 0, steps)
        base = engine.optimizer if isinstance(engine.optimizer, torch.optim.Optimizer) else engine.optimizer.optimizer
        return {
            "losses": losses,
            "parameters": parameters(engine),
            "wrapper": type(engine.optimizer).__name__,
            "groups": [
                {key: value for key, value in group.items() if key != "params"} for group in getattr(base, "param_groups", [])
            ],
            "telemetry": getattr(base, "telemetry", {}),
            "norm": engine.get_global_grad_norm(),
        }
    finally:
        engine.destroy()


def train_each(runs: Sequence[tuple[dict[str, Any], dict[str, Any]]], stages: int) -> list[dict[str, Any]]:
    """Several trainings, each of (configuration, other arguments of `train`)."""
    return [train(config, stages, **options) for config, options in runs]


def averages(config: dict[str, Any], stages: int) -> dict[str, tuple[Tensor, Tensor]]:
    """This stage's parameters inside and after `evaluation_weights`."""
    engine = build(config, stages)
    try:
        run_steps(engine, 0, HALF)
        with ds_optforge.evaluation_weights(engine):
            inside = parameters(engine)
        after = parameters(engine)
        return {name: (value, after[name]) for name, value in inside.items()}
    finally:
        engine.destroy()


def refusal(config: dict[str, Any], stages: int, **options: Any) -> str:
    """The error of a run that must not begin: its type and message."""
    try:
        train(config, stages, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def one_process(optimizer: Any, model: nn.Module, steps: int = 6, clip: float = 0.0) -> tuple[list[float], dict[str, Tensor]]:
    """Plain PyTorch: losses and parameters."""
    losses = []
    for step in range(steps):
        tokens, targets = models.batch(step, BATCH)
        loss = model(tokens, targets)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


HALF = 3  # steps before a checkpoint, and after it


def build_any(config: dict[str, Any], stages: int, kind: str) -> Any:
    """An engine on the pipeline, or without ``stages`` on the same model without one."""
    if stages:
        return build(config, stages, kind)
    return ds_optforge.initialize(model=whole(kind), config=config)[0]


def advance(engine: Any, first: int, steps: int) -> list[float]:
    """`run_steps`, of a pipeline or not."""
    if hasattr(engine, "grid"):
        return run_steps(engine, first, steps)
    return cases.run_steps(engine, first, steps, engine.gradient_accumulation_steps())


def save(config: dict[str, Any], stages: int, kind: str, folder: str) -> dict[str, Any]:
    """Half of the steps, a checkpoint of both kinds, the other half: losses and parameters of the latter."""
    engine = build_any(config, stages, kind)
    try:
        advance(engine, 0, HALF)
        ds_optforge.save_checkpoint(engine, f"{folder}/portable", {"next": HALF})
        engine.save_checkpoint(f"{folder}/engine", client_state={"next": HALF})
        return {"losses": advance(engine, HALF, HALF), "parameters": parameters(engine)}
    finally:
        engine.destroy()


def resume(
    config: dict[str, Any], stages: int, kind: str, folder: str, how: str = "portable", strict: bool = True
) -> dict[str, Any]:
    """Load into a fresh engine, and take the other half of the steps."""
    engine = build_any(config, stages, kind)
    try:
        if how == "portable":
            assert ds_optforge.load_checkpoint(engine, folder, strict) in ({"next": HALF}, {})
        else:
            engine.load_checkpoint(folder)
        rates = [group["lr"] for group in cases.base_optimizer(engine).param_groups]
        found = {"losses": advance(engine, HALF, HALF), "parameters": parameters(engine)}
        return {**found, "steps": engine.global_steps, "rates": rates}
    finally:
        engine.destroy()


def resume_each(configs: Sequence[dict[str, Any]], stages: int, kind: str, folder: str) -> list[dict[str, Any]]:
    """Several engines, one after the other, from one checkpoint."""
    return [resume(config, stages, kind, folder) for config in configs]


def save_untied(config: dict[str, Any], folder: str) -> str:
    """What a portable checkpoint says of a layer that is tied in part, which DeepSpeed saves."""
    engine = build(config, 2, "untied_bias")
    try:
        run_steps(engine, 0, HALF)
        engine.save_checkpoint(f"{folder}/engine")
        try:
            ds_optforge.save_checkpoint(engine, f"{folder}/portable")
        except ds_optforge.CheckpointError as error:
            return str(error)
        return ""
    finally:
        engine.destroy()
