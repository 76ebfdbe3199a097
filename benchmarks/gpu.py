"""Measure on GPUs what docs/performance.md counts: step time over fused AdamW, tokens per second, memory and launches.

    torchrun --nproc-per-node gpu benchmarks/gpu.py [--size auto] [--stages 2 3] [--steps 20] [--out DIR]
    torchrun --nproc-per-node 2 benchmarks/gpu.py --device cpu --size tiny          # a dry run, whose times mean nothing

A Llama of the largest size that fits (by `ds-optforge plan`'s memory; a smaller one where it does not after all) is trained in
bfloat16 with activation checkpointing on random tokens, with each candidate in turn: torch's fused AdamW before and after
all others, so that a drift shows; Muon of ds_optforge in two sharding modes, and NorMuon; DeepSpeed's Muon. A step lasts
until the slowest rank is done; times are medians. "planned" is what `ds-optforge plan` says of the same run on this device.
Launches, waits of the host and the time of NCCL's kernels are those of one engine.step, from a trace of torch's profiler.

Without ZeRO, each rank for itself, one step of torch.optim.Muon and of ds_optforge on the matrices of one layer is timed too.
Prints tables; writes gpu.json, and a trace of each candidate on the first rank.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import deepspeed
import torch
import transformers
from deepspeed import comm
from report import DEFAULT_OUT, Column, show, write
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import ds_optforge
from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.forecast.forecast import forecast_routes
from ds_optforge.forecast.hardware import DEVICES, hardware
from ds_optforge.forecast.memory import adamw_memory
from ds_optforge.forecast.model_flops import flops_per_token, geometry_of
from ds_optforge.forecast.plan import ADAMW, INCUMBENT, StagePlan, plan_stage
from ds_optforge.forecast.step_time import Workload
from ds_optforge.forecast.topology import Topology
from ds_optforge.routing.roles import routes_of

# Layers, width, heads, heads of keys and values, width of the MLP: as Llama 3's where it has the size.
SIZES: Mapping[str, tuple[int, int, int, int, int]] = {
    "13b": (40, 5120, 40, 8, 13824),
    "8b": (32, 4096, 32, 8, 14336),
    "3b": (28, 3072, 24, 8, 8192),
    "1b": (16, 2048, 32, 8, 8192),
    "400m": (24, 1024, 16, 8, 2816),
    "tiny": (2, 64, 4, 2, 128),
}
VOCABULARY = {"tiny": 256}  # elsewhere 32,000
FREE_SHARE = 0.6  # of the device's memory: the rest is for activations, ZeRO's buckets and NCCL
WARM_UP = 3
GATHER, SHARD_LOCAL, NORMUON = "gather", "shard_local", "gather, normuon"
AGAIN = f"{ADAMW}, again"
BESIDE = {"lr": 3e-4, "betas": [0.9, 0.95]}
COLUMNS = [
    Column("stage", "ZeRO"),
    Column("optimizer", "optimizer"),
    Column("step_ms", "step, ms", ",.1f"),
    Column("over_adamw", "over AdamW", "+.1%"),
    Column("planned_over_adamw", "planned", "+.1%"),
    Column("in_step_ms", "of it engine.step", ",.1f"),
    Column("tokens_per_second", "tokens/s", ",.0f"),
    Column("held_gb", "held, GB", ",.2f"),
    Column("peak_gb", "peak, GB", ",.2f"),
    Column("launches", "launches"),
    Column("waits", "host waits"),
    Column("nccl_ms", "NCCL, ms", ",.1f"),
]
ALONE = [Column("optimizer", "one layer, one rank"), Column("step_ms", "step, ms", ",.2f"), Column("launches", "launches")]


class OutOfMemory(RuntimeError):
    """A size did not fit on some rank."""


@dataclass(frozen=True)
class Setting:
    """What all candidates share."""

    size: str
    sequence: int
    accumulation: int
    steps: int
    device: torch.device
    out: Path

    @property
    def tokens(self) -> int:
        """Of a step, on all ranks."""
        return self.sequence * self.accumulation * comm.get_world_size()


def main() -> None:
    """Measure each stage at the largest size that fits, and one layer alone, and report."""
    args = arguments()
    deepspeed.init_distributed("nccl" if args.device == "cuda" else "gloo")
    deepspeed.utils.logger.setLevel("WARNING")
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    rows = []
    for stage in args.stages:
        for size in sizes(args, stage, device):
            setting = Setting(size, args.sequence, args.accumulation, args.steps, device, args.out)
            try:
                rows += measure(setting, stage)
                break
            except OutOfMemory:
                continue
    alone = one_layer(Setting(args.size, 1, 1, args.steps, device, args.out))
    if comm.get_rank() == 0:
        title = f"{name_of(device)} x {comm.get_world_size()}, {args.device}; torch {torch.__version__}"
        show(title, COLUMNS, rows)
        show(title, ALONE, alone)
        print(write("gpu", title, rows, args.out, alone=alone, device=name_of(device)))


def arguments() -> argparse.Namespace:
    """Read the command line. Ends with a sentence where there is no such device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("auto", *SIZES), default="auto", help="default: the largest that fits")
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2, 3), default=[2, 3])
    parser.add_argument("--sequence", type=int, default=4096, help="tokens of a sequence, one of which is a micro-batch")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, f"--device: got cuda, and torch {torch.__version__} finds none here; allowed: cpu, for a dry run\n")
    if args.device == "cpu" and args.size == "auto":
        parser.exit(2, "--size: got auto on a cpu; allowed: tiny, or another size by name\n")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def name_of(device: torch.device) -> str:
    """The device's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def llama(size: str) -> nn.Module:
    """A Llama, on torch's default device."""
    layers, width, heads, key_value, inner = SIZES[size]
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY.get(size, 32000),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value,
        max_position_embeddings=131072,
        use_cache=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert isinstance(model, nn.Module)
    return model


def sizes(args: argparse.Namespace, stage: int, device: torch.device) -> Iterator[str]:
    """Yield the sizes to try, the largest first that AdamW's memory leaves room for."""
    if args.size != "auto":
        yield args.size
        return
    for size in SIZES:
        with torch.device("meta"):
            routes = routes_of(llama(size), OptimizerConfig({"name": "muon"}))
        predicted = forecast_routes(routes, OptimizerConfig({"name": "muon"}).common.sharding, topology(stage, device))
        if adamw_memory(predicted, 2).total < FREE_SHARE * torch.cuda.get_device_properties(device).total_memory:
            yield size


def topology(stage: int, device: torch.device) -> Topology:
    """All ranks, on this stage; the sizes of buckets and batches are those of the device."""
    return Topology(comm.get_world_size(), stage, device=device.type)


Section = dict[str, Any]


def candidates(stage: int) -> dict[str, tuple[Section | None, Section]]:
    """(optimizer section, or None for torch's fused AdamW; zero_optimization section) of each candidate."""

    def ours(name: str, **sharding: Any) -> tuple[Section, Section]:
        return {"type": "OptForge", "params": {"name": name, "lr": 0.02, "adamw": BESIDE, "sharding": sharding}}, {}

    built_in = {"lr": 0.02, "momentum": 0.95, "muon_lr": 0.02, "adam_lr": 3e-4, "betas": [0.9, 0.95]}
    return {
        ADAMW: (None, {}),
        GATHER: ours("muon"),
        SHARD_LOCAL: ours("muon", mode="shard_local"),
        NORMUON: ours("normuon"),
        INCUMBENT: ({"type": "Muon", "params": built_in}, {"reduce_scatter": False} if stage == 3 else {}),
        AGAIN: (None, {}),
    }


def measure(setting: Setting, stage: int) -> list[dict[str, Any]]:
    """Train with every candidate in turn; return a row for each.

    Raises:
        OutOfMemory: on all ranks, where AdamW or a mode of ours does not fit on one of them.
    """
    planned = plan_of(setting, stage)
    rows = []
    for name, (section, zero) in candidates(stage).items():
        row = {"stage": stage, "size": setting.size, "tokens": setting.tokens, "optimizer": name}
        try:
            rows.append(row | measured(setting, stage, name, section, zero))
        except OutOfMemory:
            if name != INCUMBENT:
                raise
            rows.append(row)
    first, last = (next(row["step_ms"] for row in rows if row["optimizer"] == name) for name in (ADAMW, AGAIN))
    for row in rows:
        if "step_ms" in row:
            row["over_adamw"] = 2 * row["step_ms"] / (first + last) - 1
        found = next((each for each in planned.candidates if each.name == row["optimizer"]), None)
        if found is not None:
            row["planned_over_adamw"] = planned.over_adamw(found)
    return rows


def measured(setting: Setting, stage: int, name: str, section: Section | None, zero: Section) -> dict[str, Any]:
    """Build an engine, train, and return its numbers.

    Raises:
        OutOfMemory: on all ranks, which have equal shares and so run out of memory in the same place.
    """
    engine, failed, result = None, None, {}
    try:
        engine = engine_of(setting, stage, section, zero)
        result = trained(engine, setting, f"zero{stage}_{name}")
    except torch.OutOfMemoryError as error:
        failed = str(error)
    count = torch.tensor(float(failed is not None), device=setting.device)
    comm.all_reduce(count)
    if engine is not None:
        engine.destroy()
    del engine
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    if count.item():
        raise OutOfMemory(failed or "another rank has no memory left")
    return result


def engine_of(setting: Setting, stage: int, section: Section | None, zero: Section) -> Any:
    """An engine on the Llama, always with the same weights."""
    torch.manual_seed(0)
    with setting.device:
        model = llama(setting.size).to(torch.bfloat16)
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    ds_optforge.register(model)
    config: Section = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": setting.accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, **zero},
    }
    optimizer = None
    if section is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)
    else:
        config["optimizer"] = section
    given = {"model": model, "config": config, "optimizer": optimizer}
    return deepspeed.initialize(**given, model_parameters=model.parameters())[0]


def trained(engine: Any, setting: Setting, title: str) -> dict[str, Any]:
    """Warm up, time the steps, and trace one more engine.step."""
    for step in range(WARM_UP):
        iterate(engine, setting, step)
    on_gpu = setting.device.type == "cuda"
    held = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    samples = [iterate(engine, setting, WARM_UP + step) for step in range(setting.steps)]
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    passes(engine, setting, 0)
    with traced(setting, title) as counts:
        engine.step()
        wait(setting.device)
    whole, in_step = (median(each) for each in zip(*samples, strict=True))
    slowest = torch.tensor([whole, in_step, held, peak], dtype=torch.float64, device=setting.device)
    comm.all_reduce(slowest, op=comm.ReduceOp.MAX)
    whole, in_step, held, peak = slowest.tolist()
    times = {"step_ms": 1e3 * whole, "in_step_ms": 1e3 * in_step, "tokens_per_second": setting.tokens / whole}
    return {**times, "held_gb": held / 1e9, "peak_gb": peak / 1e9, **counts}


def iterate(engine: Any, setting: Setting, step: int) -> tuple[float, float]:
    """One step on all ranks together: seconds of it, and of engine.step at its end."""
    comm.barrier()
    wait(setting.device)
    start = perf_counter()
    passes(engine, setting, step)
    wait(setting.device)
    before = perf_counter()
    engine.step()
    wait(setting.device)
    end = perf_counter()
    return end - start, end - before


def passes(engine: Any, setting: Setting, step: int) -> None:
    """Forward and backward of all micro-batches; the last one's engine.step is left to the caller."""
    generator = torch.Generator().manual_seed(1000 * step + comm.get_rank())
    vocabulary = VOCABULARY.get(setting.size, 32000)
    for micro in range(setting.accumulation):
        tokens = torch.randint(vocabulary, (1, setting.sequence), generator=generator).to(setting.device)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        if micro + 1 < setting.accumulation:
            engine.step()


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def traced(setting: Setting, title: str) -> Iterator[dict[str, float]]:
    """Counts of what runs inside, filled in at the end; the first rank writes its trace."""
    on_gpu = setting.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    counts: dict[str, float] = {}
    with profile(activities=activities) as found:
        yield counts
    events = found.events()
    kernels = [each for each in events if each.device_type == torch.autograd.DeviceType.CUDA and is_kernel(each.name)]
    if on_gpu:
        waits = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")  # the profiler waits for the whole device
        nccl = [each for each in kernels if "nccl" in each.name.lower()]
        counts["launches"] = len(kernels)
        counts["waits"] = sum(each.name in waits for each in events)
        counts["nccl_ms"] = sum(each.time_range.elapsed_us() for each in nccl) / 1e3
    else:  # of a dry run: operators, so that the columns are filled
        counts.update(launches=sum(each.name.startswith("aten::") for each in events), waits=0, nccl_ms=0.0)
    if comm.get_rank() == 0:
        safe = "".join(letter if letter.isalnum() else "_" for letter in title)
        found.export_chrome_trace(str(setting.out / f"gpu_{safe}.json"))


def is_kernel(name: str) -> bool:
    """Whether an event on the device is a launch, rather than a copy, a fill or a marker of the profiler."""
    return not name.startswith(("Memcpy", "Memset", "ProfilerStep", "gpu_user_annotation"))


def plan_of(setting: Setting, stage: int) -> StagePlan:
    """What `ds-optforge plan` says of the same run; of a device that it does not know, as of an H100."""
    config = OptimizerConfig({"name": "muon"})
    with torch.device("meta"):
        model = llama(setting.size)
    routes = routes_of(model, config)
    own = name_of(setting.device).lower()
    known = next((name for name in DEVICES if name in own), "h100")
    per_token = flops_per_token(routes, geometry_of("", model), setting.sequence)
    speeds = hardware(known, None, comm.get_world_size())
    ranks, work = topology(stage, setting.device), Workload(setting.tokens, per_token)
    return plan_stage(routes, config.common.sharding, ranks, speeds, work)


def one_layer(setting: Setting) -> list[dict[str, Any]]:
    """A step of torch.optim.Muon and of ds_optforge in plain PyTorch, on the matrices of one layer, each rank for itself."""
    size = "8b" if setting.size == "auto" else setting.size
    _, width, heads, key_value, inner = SIZES[size]
    narrow = width * key_value // heads
    shapes = [(width, width)] * 2 + [(narrow, width)] * 2 + [(inner, width)] * 2 + [(width, inner)]
    rows = []
    for name, make in plain_optimizers().items():
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(into, out, bias=False, device=setting.device) for out, into in shapes))
        optimizer = make(model)
        seconds = [one_step(model, optimizer, setting) for _ in range(WARM_UP + setting.steps)][WARM_UP:]
        with traced(setting, f"one_layer_{name}") as counts:
            optimizer.step()
            wait(setting.device)
        rows.append({"optimizer": name, "step_ms": 1e3 * median(seconds), **counts})
    return rows


def plain_optimizers() -> Mapping[str, Callable[[nn.Module], torch.optim.Optimizer]]:
    """By name, what makes an optimizer of a model of matrices."""

    def parameters(model: nn.Module) -> Sequence[Tensor]:
        return list(model.parameters())

    return {
        "torch.optim.AdamW, fused": lambda model: torch.optim.AdamW(parameters(model), lr=3e-4, fused=True),
        "torch.optim.Muon": lambda model: torch.optim.Muon(parameters(model), lr=0.02),  # type: ignore[attr-defined]
        "ds_optforge muon": lambda model: ds_optforge.build_optimizer(model, {"name": "muon", "lr": 0.02}),
    }


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, setting: Setting) -> float:
    """Seconds of a step on random gradients."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    wait(setting.device)
    start = perf_counter()
    optimizer.step()
    wait(setting.device)
    return perf_counter() - start


if __name__ == "__main__":
    main()
    comm.destroy_process_group()  # a rank that leaves it open sometimes aborts at its end
