"""What ranks run under tensor parallelism: AutoTP on a small Llama of transformers, and layers in the manner of Megatron."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import ds_optforge
from tests.distributed.cases import engine_config

BATCH, LENGTH, VOCABULARY = 4, 8, 64


def llama() -> LlamaForCausalLM:
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
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def tokens_of(step: int) -> Tensor:
    """The global batch of a step, (BATCH, LENGTH)."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)


def one_process(params: Mapping[str, Any] | None, steps: int) -> dict[str, Tensor]:
    """The parameters after ``steps`` in plain PyTorch; ``params`` None for torch.optim.AdamW."""
    return trained_alone(llama(), params, steps, next_token_loss)


def next_token_loss(model: nn.Module, step: int) -> Tensor:
    """The loss of a language model of transformers on the global batch of a step."""
    loss: Tensor = model(tokens_of(step), labels=tokens_of(step)).loss
    return loss


def trained_alone(
    model: nn.Module, params: Mapping[str, Any] | None, steps: int, loss_of: Callable[[nn.Module, int], Tensor]
) -> dict[str, Tensor]:
    """The parameters of ``model`` after ``steps`` in plain PyTorch; ``params`` None for torch.optim.AdamW."""
    optimizer = control(model) if params is None else ds_optforge.build_optimizer(model, dict(params))
    train_alone(model, optimizer, steps, loss_of)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train_alone(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, loss_of: Callable[[nn.Module, int], Tensor]
) -> None:
    """Take ``steps`` in plain PyTorch."""
    for step in range(steps):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


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


def flops_of_a_step(tensor_ranks: int, stage: int, params: Mapping[str, Any]) -> int:
    """FLOPs of this rank in an optimizer's step under AutoTP."""
    engine = autotp_engine(autotp_config(tensor_ranks, stage, params), params)
    engine.backward(engine(tokens_of(0), labels=tokens_of(0)).loss)
    with FlopCounterMode(display=False) as counter:
        engine.step()
    engine.destroy()
    return counter.get_total_flops()


def without_optimizer(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "optimizer"} | {"zero_allow_untested_optimizer": True}


def train(engine: Any, steps: int, first: int = 0, batch: Callable[[int], Tensor] = tokens_of) -> None:
    """Each data rank takes its rows of the global batch of a step, on all its tensor ranks alike."""
    data_ranks, data_rank = groups._get_data_parallel_world_size(), groups._get_data_parallel_rank()
    for step in range(first, first + steps):
        tokens = batch(step).chunk(data_ranks)[data_rank]
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


class Mpu:
    """A model parallel unit as Megatron has it: tensor ranks next to each other, data ranks across."""

    def __init__(self, tensor_ranks: int) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        for first in range(0, world, tensor_ranks):
            ranks = list(range(first, first + tensor_ranks))
            group = dist.new_group(ranks)
            self._tensor_group = group if rank in ranks else getattr(self, "_tensor_group", None)
        for first in range(tensor_ranks):
            ranks = list(range(first, world, tensor_ranks))
            group = dist.new_group(ranks)
            self._data_group = group if rank in ranks else getattr(self, "_data_group", None)

    def get_tensor_model_parallel_group(self) -> Any:
        return self._tensor_group

    def get_tensor_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._tensor_group)

    def get_tensor_model_parallel_rank(self) -> int:
        return dist.get_rank(self._tensor_group)

    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_rank = get_tensor_model_parallel_rank

    def get_data_parallel_group(self) -> Any:
        return self._data_group

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._data_group)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._data_group)


class _SumForward(torch.autograd.Function):
    """All-reduce in the forward pass; the gradient goes to each tensor rank as it is."""

    @staticmethod
    def forward(context: Any, values: Tensor, group: Any) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class _SumBackward(torch.autograd.Function):
    """The input of a column-parallel layer: its gradient is the sum over the tensor ranks."""

    @staticmethod
    def forward(context: Any, values: Tensor, group: Any) -> Tensor:
        context.group = group
        return values

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = gradient.clone()
        dist.all_reduce(total, group=context.group)
        return total, None


class MegatronBlock(nn.Module):
    """Two linear layers, the first cut by rows (column-parallel), the second by columns; ``mpu`` None for whole ones."""

    def __init__(self, width: int, hidden: int, mpu: Mpu | None) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.mpu = mpu
        if mpu is not None:
            for parameter, dim in ((self.fc1.weight, 0), (self.fc1.bias, 0), (self.fc2.weight, 1)):
                shards = parameter.data.chunk(mpu.get_tensor_model_parallel_world_size(), dim)
                parameter.data = shards[mpu.get_tensor_model_parallel_rank()].contiguous()
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
                parameter.partition_dim, parameter.partition_stride = dim, 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if self.mpu is None:
            return x + self.fc2(F.gelu(self.fc1(x)))
        group = self.mpu.get_tensor_model_parallel_group()
        inner = F.gelu(self.fc1(_SumBackward.apply(x, group)))
        return x + _SumForward.apply(F.linear(inner, self.fc2.weight), group) + self.fc2.bias


class MegatronNet(nn.Module):
    def __init__(self, mpu: Mpu | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.blocks = nn.ModuleList(MegatronBlock(24, 36, mpu) for _ in range(2))
        self.gate = nn.Linear(24, 24, bias=False)  # whole on every tensor rank
        self.lm_head = nn.Linear(24, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.lm_head(x + self.gate(x)).flatten(0, 1), (tokens.flatten() * 7 + 3) % VOCABULARY)


def megatron(tensor_ranks: int, stage: int, params: Mapping[str, Any] | None, steps: int, **extra: Any) -> dict[str, Tensor]:
    """Train `MegatronNet` with an mpu and return whole parameters; ``params`` None for torch.optim.AdamW."""
    config = engine_config(stage, params or {}, train_batch_size=BATCH, **extra)
    mpu = Mpu(tensor_ranks)
    torch.manual_seed(0)
    model = MegatronNet(mpu)
    if params is None:
        engine = deepspeed.initialize(model=model, config=without_optimizer(config), optimizer=control(model), mpu=mpu)[0]
    else:
        engine = ds_optforge.initialize(model=model, config=config, mpu=mpu)[0]
    try:
        rows = BATCH // mpu.get_data_parallel_world_size()
        first = mpu.get_data_parallel_rank() * rows
        for step in range(steps):
            engine.backward(engine(tokens_of(step)[first : first + rows]))
            engine.step()
        return whole_parameters(engine.module)
    finally:
        engine.destroy()


def megatron_in_one_process(params: Mapping[str, Any] | None, steps: int) -> dict[str, Tensor]:
    """The parameters of `MegatronNet` after ``steps`` in plain PyTorch."""
    torch.manual_seed(0)
    return trained_alone(MegatronNet(), params, steps, lambda model, step: model(tokens_of(step)))


def save_portable(tensor_ranks: int, stage: int, params: Mapping[str, Any], folder: str, **extra: Any) -> dict[str, Tensor]:
    """Take 2 steps, save, and return the parameters after 3 more."""
    engine = autotp_engine(autotp_config(tensor_ranks, stage, params, **extra), params)
    train(engine, 2)
    ds_optforge.save_checkpoint(engine, folder)
    train(engine, 3, first=2)
    found = whole_parameters(engine.module)
    engine.destroy()
    return found


def load_portable(tensor_ranks: int, stage: int, params: Mapping[str, Any], folder: str, **extra: Any) -> dict[str, Tensor]:
    """Resume what `save_portable` saved and return the parameters after its last 3 steps."""
    engine = autotp_engine(autotp_config(tensor_ranks, stage, params, **extra), params)
    ds_optforge.load_checkpoint(engine, folder)
    train(engine, 3, first=2)
    found = whole_parameters(engine.module)
    engine.destroy()
    return found


def save_again(tensor_ranks: int, stage: int, params: Mapping[str, Any], folder: str, again: str) -> None:
    """Load what `save_portable` saved, and save it."""
    engine = autotp_engine(autotp_config(tensor_ranks, stage, params), params)
    ds_optforge.load_checkpoint(engine, folder)
    ds_optforge.save_checkpoint(engine, again)
    engine.destroy()


def save_and_load(tensor_ranks: int, stage: int, params: Mapping[str, Any], folder: str) -> tuple[Any, Any]:
    """The parameters after 5 steps, uninterrupted, and resumed from engine.save_checkpoint after 2."""
    config = autotp_config(tensor_ranks, stage, params)
    engine = autotp_engine(config, params)
    train(engine, 2)
    engine.save_checkpoint(folder)
    train(engine, 3, first=2)
    uninterrupted = whole_parameters(engine.module)
    engine.destroy()
    engine = autotp_engine(config, params)
    engine.load_checkpoint(folder)
    train(engine, 3, first=2)
    resumed = whole_parameters(engine.module)
    engine.destroy()
    return uninterrupted, resumed


def records(tensor_ranks: int, stage: int, params: Mapping[str, Any], steps: int = 3) -> dict[str, Any]:
    """The last record of telemetry."""
    engine = autotp_engine(autotp_config(tensor_ranks, stage, params), params)
    train(engine, steps)
    optimizer = engine.optimizer if isinstance(engine.optimizer, ds_optforge.OptForge) else engine.optimizer.optimizer
    record: dict[str, Any] = optimizer.telemetry["groups"]
    engine.destroy()
    return record


def train_with_nan(stage: int, params: Mapping[str, Any]) -> None:
    """The first tensor rank alone gets a gradient that is not finite."""
    engine = autotp_engine(autotp_config(2, stage, params), params)
    tokens = tokens_of(0)
    engine.backward(engine(tokens, labels=tokens).loss)
    if dist.get_rank() == 0:
        engine.module.model.layers[0].self_attn.q_proj.weight.grad.fill_(float("nan"))
    engine.step()


WIDTH = 27  # odd, so that ZeRO cuts a shard of down_proj within a row


class FusedNet(nn.Module):
    """A gated layer whose gate and up projections are one weight, which AutoTP cuts part by part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.gate_up_proj = nn.Linear(WIDTH, 72, bias=False)
        self.down_proj = nn.Linear(36, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.to_words = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        x = self.norm(x + self.down_proj(F.silu(gate) * up))
        return F.cross_entropy(self.to_words(x).flatten(0, 1), (tokens.flatten() * 7 + 3) % VOCABULARY)


FUSED = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*gate_up_proj\.weight$"], "partition_type": "column", "shape": [2, -1], "partition_dim": 0},
        {"patterns": [r".*down_proj\.weight$"], "partition_type": "row"},
    ],
}


def fused_engine(stage: int, params: Mapping[str, Any]) -> Any:
    config = autotp_config(2, stage, params, tensor_parallel={"autotp_size": 2, "partition_config": FUSED})
    torch.manual_seed(0)
    return ds_optforge.initialize(model=FusedNet(), config=config)[0]


def fused_refused(stage: int, params: Mapping[str, Any], folder: str) -> str:
    """What a portable checkpoint of `FusedNet` says after a step."""
    engine = fused_engine(stage, params)
    engine.backward(engine(tokens_of(0)))
    engine.step()
    try:
        ds_optforge.save_checkpoint(engine, folder)
    except ds_optforge.CheckpointError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def fused(stage: int, params: Mapping[str, Any], steps: int, folder: str = "") -> dict[str, Tensor]:
    """Train `FusedNet` under AutoTP on two tensor ranks, and return its parameters, put together part by part.

    Args:
        folder: where a portable checkpoint is saved at the end, if anywhere.
    """
    engine = fused_engine(stage, params)
    for step in range(steps):
        engine.backward(engine(tokens_of(step)))
        engine.step()
    if folder:
        ds_optforge.save_checkpoint(engine, folder)
    found = whole_parameters(engine.module)
    name = next(name for name in found if "gate_up_proj" in name)
    gate, up, other_gate, other_up = found[name].chunk(4)  # of the first tensor rank, then of the second
    found[name] = torch.cat([gate, other_gate, up, other_up])
    engine.destroy()
    return found


def fused_in_one_process(params: Mapping[str, Any], steps: int) -> dict[str, Tensor]:
    """The parameters of `FusedNet` after ``steps`` in plain PyTorch."""
    torch.manual_seed(0)
    return trained_alone(FusedNet(), params, steps, fused_loss)


def fused_rows_in_one_process(params: Mapping[str, Any], steps: int) -> Tensor:
    """What NorMuon keeps for the rows of gate_up_proj after ``steps`` in plain PyTorch."""
    torch.manual_seed(0)
    model = FusedNet()
    optimizer = ds_optforge.build_optimizer(model, dict(params))
    train_alone(model, optimizer, steps, fused_loss)
    found: Tensor = optimizer.state[model.gate_up_proj.weight]["row_second_moment"]
    return found


def fused_loss(model: nn.Module, step: int) -> Tensor:
    """The loss of `FusedNet` on the global batch of a step."""
    loss: Tensor = model(tokens_of(step))
    return loss


def fused_again(stage: int, params: Mapping[str, Any], folder: str, again: str) -> None:
    """Load what `fused` saved, and save it."""
    engine = fused_engine(stage, params)
    ds_optforge.load_checkpoint(engine, folder)
    ds_optforge.save_checkpoint(engine, again)
    engine.destroy()
