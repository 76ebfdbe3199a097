"""Train a small byte-level GPT under DeepSpeed ZeRO with an optimizer of ds_optforge.

    deepspeed --num_gpus 2 train.py --ds_config ds_configs/muon_zero2.json
    torchrun --nproc-per-node 2 train.py --ds_config ds_configs/muon_zero3.json
    mpirun -np 2 python train.py                              # docs/launching.md lists all the ways
    python train.py                                           # one rank
    torchrun --nproc-per-node 2 train.py --save-every 50 --resume     # resumes, also on other ranks
    python train.py --weights runs/muon_zero2/model.safetensors --data "torch headers"     # fine-tunes on another text

Writes DIR/metrics.jsonl, DIR/summary.json, DIR/loss.png and DIR/model.safetensors (`--out DIR`). The extra `experiments`
installs matplotlib and safetensors for it. SIGTERM saves DIR/checkpoints/step_<n> and ends the run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import platform
import resource
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import ds_optforge
from ds_optforge.experiments.run_files import read_rows, replace_text
from ds_optforge.forecast.wire import planned_bytes
from workload import HEADERS, PRESETS, Corpus, DataError, build_model, load_corpus, micro_batch_rows

VALIDATION_WINDOWS = 512
VALIDATION_BATCH = 16  # windows in one forward pass
USAGE_ERROR = 2  # the exit status, as argparse's
LLAMA = "llama"  # a model of --model, beside the presets of the GPT
MPI_RANK = "OMPI_COMM_WORLD_RANK"  # set by mpirun, which sets neither RANK nor an address to meet at


class UsageError(ValueError):
    """The arguments or files that the user gave cannot be used."""


@dataclass(frozen=True)
class Result:
    """The measurements of a run. Losses are in nats per byte; a row of `metrics` is one step."""

    metrics: list[dict[str, Any]]
    validation_loss: float
    seconds: float
    state_bytes_per_parameter: float


class Interrupted(Exception):
    """SIGTERM has ended the run; the message says how to resume it."""


class Checkpoints:
    """The checkpoints DIR/checkpoints/step_<n>, portable: a run may resume with other ranks or on another ZeRO stage."""

    def __init__(self, folder: Path, args: argparse.Namespace, config: dict[str, Any]) -> None:
        self.folder = folder
        self.every, self.keep, self.steps = args.save_every, args.keep_last, args.steps
        # The loss curve depends on these beside the checkpoint.
        self.run = {"model": args.model, "sequence_length": args.sequence_length, "seed": args.seed}
        self.run |= {"data": args.data or "standard library", "train_batch_size": config.get("train_batch_size")}
        self.asked_to_stop = False
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: Any) -> None:
        self.asked_to_stop = True  # takes effect at the end of the step, when all ranks know of it

    def complete(self) -> list[Path]:
        """Return the complete checkpoints, the newest last. Collective: every rank gets rank 0's list."""
        found = [[path.parent for path in sorted(self.folder.glob("step_" + "[0-9]" * 8 + "/checkpoint.json"))]]
        comm.broadcast_object_list(found, src=0)
        return found[0]

    def load(self, engine: Any, source: str, strict: bool) -> int:
        """Load a checkpoint, or the newest one if `source` is empty; return the steps that it had taken.

        Raises:
            UsageError: `strict`, and it was trained with another model, seed, data or batch.
            CheckpointError: see `ds_optforge.load_checkpoint`.
        """
        newest = Path(source) if source else next(reversed(self.complete()), None)
        if newest is None:
            return 0
        state = ds_optforge.load_checkpoint(engine, newest, strict)
        for key, value in self.run.items():
            if strict and state.get(key, value) != value:
                raise UsageError(f"--resume {newest}: it was trained with {key} {state[key]!r}, this run has {value!r}")
        return int(engine.global_steps)

    def refuse_later_ones(self, start: int) -> None:
        """Raise UsageError for checkpoints of another run, one of which `--resume` would take for this run's newest."""
        later = [path for path in self.complete() if int(path.name.removeprefix("step_")) > start]
        if later:
            raise UsageError(f"{later[-1]} is there already; allowed: --resume to go on from it, another --out, or removing it")

    def save(self, engine: Any, step: int) -> Path:
        """Save a checkpoint, then remove the oldest ones beyond `--keep-last`; return its folder."""
        path = self.folder / f"step_{step:08d}"
        if comm.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        comm.barrier()
        ds_optforge.save_checkpoint(engine, path, self.run)
        for old in self.complete()[: -self.keep]:
            if comm.get_rank() == 0:
                shutil.rmtree(old.rename(old.with_name(old.name + ".incomplete")))  # renamed, it counts no longer
        return path

    def after(self, engine: Any, step: int, stop: bool) -> None:
        """Save where a checkpoint is due. Raise Interrupted, after saving, if a rank was asked to stop."""
        if stop and step < self.steps:
            path = self.save(engine, step)
            raise Interrupted(f"stopped by SIGTERM after step {step}; go on with --resume {path}")
        if self.every and step % self.every == 0:
            self.save(engine, step)


def main() -> int:
    """Run the script and return its exit status."""
    args = parse_arguments()
    set_up_logging()
    try:
        return run(args)
    except (UsageError, DataError, ds_optforge.ConfigError, ds_optforge.CheckpointError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except Interrupted as notice:
        if comm.get_rank() == 0:
            print(f"train.py: {notice}", file=sys.stderr)
        return 0
    finally:
        if comm.is_initialized():
            comm.destroy_process_group()


def run(args: argparse.Namespace) -> int:
    """Train and write the results; return the exit status. Files are read before the ranks meet, so that no rank waits."""
    require_installed("matplotlib", extra="experiments", why="the loss is drawn")
    if args.model == LLAMA:
        require_installed("transformers", extra="hf", why=f"--model {LLAMA} is that of transformers")
    config_path = Path(args.deepspeed_config or args.ds_config)
    config = read_config(config_path, args.steps)
    corpus = load_corpus(args.data)
    corpus.check_length(args.sequence_length)
    weights = read_weights(args.weights)

    start_distributed()
    check_batch_size(config, comm.get_world_size())
    torch.manual_seed(args.seed)
    model = build(args, weights)
    engine, *_ = ds_optforge.initialize(model=model, config=config)

    out = Path(args.out or Path("runs", config_path.stem))
    checkpoints = Checkpoints(out / "checkpoints", args, config)
    start = 0 if args.resume is None else checkpoints.load(engine, args.resume, strict=not args.switch_optimizer)
    checkpoints.refuse_later_ones(start)
    result = train(engine, corpus, args, out, checkpoints, start)
    if comm.get_rank() == 0:
        device = get_accelerator().device_name()
        planned = planned_bytes(base_optimizer(engine), config, comm.get_world_size(), device)
        write_summary(out / "summary.json", result, args, config, planned)
        if result.metrics:  # none where a checkpoint of another run had taken all the steps
            plot_loss(out / "loss.png", result, title=f"{config_path.stem}, {args.model}")
        print(f"validation loss {result.validation_loss:.4f} nats per byte after {args.steps} steps; see {out}/")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Parse the command line, DeepSpeed's own options included."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ds_config", default="ds_configs/muon_zero2.json", help="DeepSpeed config file")
    parser.add_argument("--model", choices=(*PRESETS, LLAMA), default="tiny")
    parser.add_argument("--weights", metavar="FILE", help="fine-tune the model.safetensors of an earlier run")
    parser.add_argument("--steps", type=positive_int, default=200, help="of the run and of its schedule")
    parser.add_argument("--sequence-length", type=positive_int, default=128, help="bytes in a sample")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the data")
    parser.add_argument("--out", help="folder for the results (default: runs/<name of the config file>)")
    parser.add_argument("--data", help=f"text file, folder, glob or {HEADERS!r} (default: the standard library's .py files)")
    parser.add_argument("--save-every", type=positive_int, metavar="N", help="steps from one checkpoint to the next")
    parser.add_argument("--keep-last", type=positive_int, metavar="N", default=2, help="checkpoints that stay (default: 2)")
    parser.add_argument("--resume", nargs="?", const="", help="a checkpoint; alone: the newest of --out, if there is any")
    parser.add_argument("--switch-optimizer", action="store_true", help="resume with another optimizer, with what fits it")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    return deepspeed.add_config_arguments(parser).parse_args()


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1. Raises ValueError."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def set_up_logging() -> None:
    """Show ds_optforge's log on rank 0; show only warnings elsewhere."""
    logging.basicConfig(format="%(name)s: %(message)s")
    if os.environ.get("RANK", os.environ.get(MPI_RANK, "0")) == "0":
        logging.getLogger("ds_optforge").setLevel(logging.INFO)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def read_config(path: Path, steps: int) -> dict[str, Any]:
    """Read a DeepSpeed config and replace the length of its schedule by `steps`.

    Raises:
        UsageError: the file cannot be read or holds no JSON object.
    """
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--ds_config {str(path)!r} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"--ds_config {str(path)!r} holds a {type(config).__name__}; needed: a JSON object")
    match config:
        case {"scheduler": {"params": {"total_num_steps": _} as schedule}}:
            schedule["total_num_steps"] = steps
    return config


def read_weights(path: str | None) -> dict[str, torch.Tensor] | None:
    """Read the weights of `--weights`; None where there are none.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        return load_file(path) if path else None
    except (OSError, SafetensorError) as error:
        raise UsageError(f"--weights {path!r} cannot be read: {error}") from error


def build(args: argparse.Namespace, weights: dict[str, torch.Tensor] | None) -> torch.nn.Module:
    """Build the model of `--model`, random or with the given weights.

    Raises:
        UsageError: the weights are those of another model.
    """
    model: torch.nn.Module
    if args.model == LLAMA:
        from workload.llama import Llama  # imports transformers

        model = Llama(args.sequence_length)
    else:
        model = build_model(args.model, args.sequence_length)
    if weights is not None:
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise UsageError(f"--weights {args.weights!r} are not those of --model {args.model}: {error}") from error
    return model


def start_distributed() -> None:
    """Join the process group, or make one of this process alone where no launcher started it."""
    if "RANK" not in os.environ and MPI_RANK in os.environ:
        # Through it DeepSpeed learns from mpirun who the ranks are.
        require_installed("mpi4py", extra="mpi", why="started by mpirun")
    elif "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            free_port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=str(free_port))
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    backend = "gloo" if on_cpu else accelerator.communication_backend_name()
    mpi_port = int(os.environ.get("MASTER_PORT", TORCH_DISTRIBUTED_DEFAULT_PORT))  # two jobs on a host need two
    deepspeed.init_distributed(backend, distributed_port=mpi_port)


def require_installed(module: str, extra: str, why: str) -> None:
    """Raise UsageError where a module that an extra brings is missing."""
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"{why}, but {module} is not installed; run: pip install 'ds-optforge[{extra}]'")


def check_batch_size(config: dict[str, Any], world_size: int) -> None:
    """Raise UsageError where the ranks cannot share the batch equally, for which DeepSpeed has a bare assertion."""
    batch, accumulation = config.get("train_batch_size"), config.get("gradient_accumulation_steps", 1)
    if not (isinstance(batch, int) and isinstance(accumulation, int) and accumulation > 0):
        return  # DeepSpeed infers the batch size from the micro-batch, or says what is wrong
    if batch % (world_size * accumulation):
        raise UsageError(
            f"train_batch_size {batch} cannot be shared equally by {world_size} ranks x {accumulation} "
            f"gradient_accumulation_steps; it must be a multiple of {world_size * accumulation}"
        )


def train(engine: Any, corpus: Corpus, args: argparse.Namespace, out: Path, checkpoints: Checkpoints, first: int) -> Result:
    """Train from step `first` to `args.steps`, write a row per step to metrics.jsonl, and measure the validation loss."""
    is_first = comm.get_rank() == 0
    out.mkdir(parents=True, exist_ok=True)
    metrics = [row for row in read_rows(out) if row["step"] <= first]
    if is_first:
        replace_text(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in metrics))
    start = time.perf_counter()
    with (
        open(out / "metrics.jsonl" if is_first else os.devnull, "a", buffering=1) as file,
        tqdm(range(first, args.steps), disable=not is_first, unit="step", mininterval=1.0) as progress,
    ):
        for step in progress:
            measured, stop = train_step(engine, corpus, step, args, checkpoints.asked_to_stop)
            row = {"step": step + 1} | measured
            metrics.append(row)
            file.write(json.dumps(row) + "\n")
            checkpoints.after(engine, step + 1, stop)
            rates = dict.fromkeys(f"{rate:.1e}" for rate in row["learning_rate"].values())  # equal ones once
            progress.set_postfix_str(f"loss {row['loss']:.3f}, lr {' '.join(rates)}", refresh=False)
    with ds_optforge.evaluation_weights(engine):  # Schedule-Free's average
        validation_loss = evaluate(engine, corpus, args.sequence_length)
        export_weights(engine, out / "model.safetensors")
    return Result(metrics, validation_loss, time.perf_counter() - start, state_bytes_per_parameter(engine))


def state_bytes_per_parameter(engine: Any) -> float:
    """Return the bytes of optimizer state on all ranks over the number of elements that the optimizer steps."""
    optimizer = base_optimizer(engine)
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    sizes = (sum(tensor.nbytes for tensor in states), sum(stepped.numel() for stepped in optimizer.state))
    totals = torch.tensor(sizes, dtype=torch.float64, device=engine.device)
    comm.all_reduce(totals)
    return float(totals[0] / totals[1])


def train_step(engine: Any, corpus: Corpus, step: int, args: argparse.Namespace, stop: bool) -> tuple[dict[str, Any], bool]:
    """Take one optimizer step; return its metrics, and whether any rank was asked to stop.

    The loss is the mean over the global batch.
    """
    start = time.perf_counter()
    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    global_batch = engine.train_batch_size()
    learning_rate = learning_rates(engine)  # before the step moves the schedule on
    recorded = telemetry(engine)
    loss_sum = torch.zeros((), device=engine.device)
    for index in range(accumulation):
        rows = micro_batch_rows(index, comm.get_rank(), comm.get_world_size(), micro_batch)
        tokens, targets = corpus.batch(step, args.seed, global_batch, args.sequence_length, rows)
        loss = engine(tokens.to(engine.device), targets.to(engine.device))
        engine.backward(loss)
        engine.step()
        loss_sum += loss.detach()
    totals = torch.stack([loss_sum, torch.full_like(loss_sum, stop)])
    comm.all_reduce(totals)
    loss_total, stops = totals.tolist()
    grad_norm = engine.get_global_grad_norm()
    metrics = {
        "loss": loss_total / (accumulation * comm.get_world_size()),
        "learning_rate": learning_rate,
        "grad_norm": None if grad_norm is None else float(grad_norm),
        "tokens_per_second": global_batch * args.sequence_length / (time.perf_counter() - start),
        "peak_memory_gb": peak_memory_gb(),
    }
    if telemetry(engine) != recorded:  # every k-th step
        metrics["telemetry"] = telemetry(engine)["groups"]
    return metrics, stops > 0


def learning_rates(engine: Any) -> dict[str, float]:
    """Return the learning rate of each group, by role and rule ("matrix.muon")."""
    return {group["optforge_group"]: group["lr"] for group in engine.optimizer.param_groups}


def telemetry(engine: Any) -> dict[str, Any]:
    """Return the optimizer's last record of a step; empty where its configuration has no "telemetry"."""
    return base_optimizer(engine).telemetry


def base_optimizer(engine: Any) -> ds_optforge.OptForge:
    """Return the OptForge under DeepSpeed's wrappers."""
    optimizer = engine.optimizer
    while not isinstance(optimizer, ds_optforge.OptForge):
        optimizer = optimizer.optimizer
    return optimizer


def peak_memory_gb() -> float:
    """Return the peak memory of this rank in 1e9 bytes: of the accelerator, or of the process on a CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        return float(accelerator.max_memory_allocated() / 1e9)
    unit = 1 if platform.system() == "Darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@torch.no_grad()
def evaluate(engine: Any, corpus: Corpus, sequence_length: int) -> float:
    """Return the mean loss over the validation windows, in nats per byte, the same on every rank.

    All ranks make the same number of forward passes, because under ZeRO-3 each pass gathers weights from all of them:
    a rank that has run out of windows repeats the first ones and does not count them.
    """
    engine.eval()
    tokens, targets = corpus.validation_windows(sequence_length, VALIDATION_WINDOWS)
    chunks = [slice(first, first + VALIDATION_BATCH) for first in range(0, len(tokens), VALIDATION_BATCH)]
    loss_sum = torch.zeros((), device=engine.device)
    for first in range(0, len(chunks), comm.get_world_size()):
        mine = first + comm.get_rank()
        chunk = chunks[mine] if mine < len(chunks) else chunks[0]
        loss = engine(tokens[chunk].to(engine.device), targets[chunk].to(engine.device))
        if mine < len(chunks):
            loss_sum += loss * len(tokens[chunk])
    comm.all_reduce(loss_sum)
    return loss_sum.item() / len(tokens)


@torch.no_grad()
def export_weights(engine: Any, path: Path) -> None:
    """Write the model's present weights under their names. Collective, because ZeRO-3 gathers from all ranks."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, enabled=hasattr(parameter, "ds_id")):
            weights[name] = parameter.detach().cpu().clone()
    if comm.get_rank() == 0:
        save_file(weights, path)


def write_summary(path: Path, result: Result, args: argparse.Namespace, config: dict[str, Any], planned: float) -> None:
    """Write settings, versions and results of the run as JSON; `planned` is what the optimizer sends in a step, in bytes."""
    summary = {
        "validation_loss": result.validation_loss,
        "training_loss": result.metrics[-1]["loss"] if result.metrics else None,
        "model": args.model,
        "weights": args.weights,
        "sequence_length": args.sequence_length,
        "steps": args.steps,
        "seed": args.seed,
        "data": args.data or "standard library",
        "world_size": comm.get_world_size(),
        "seconds": round(result.seconds, 2),
        "state_bytes_per_parameter": round(result.state_bytes_per_parameter, 4),
        "optimizer_bytes_per_step": planned,
        "config": config,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "ds_optforge": ds_optforge.__version__,
        },
    }
    path.write_text(json.dumps(summary, indent=2) + "\n")


def plot_loss(path: Path, result: Result, title: str) -> None:
    """Draw the training loss, raw and smoothed, and the validation loss at the end."""
    from matplotlib.figure import Figure  # takes half a second, for which no other rank need wait

    from ds_optforge.experiments.plots import smoothed

    steps = [row["step"] for row in result.metrics]
    losses = [row["loss"] for row in result.metrics]
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#2a6f97", alpha=0.3, linewidth=0.8, label="training, each step")
    axes.plot(steps, smoothed(losses), color="#2a6f97", linewidth=2.0, label="training, smoothed")
    axes.plot(steps[-1], result.validation_loss, "o", color="#d1495b", markersize=7, label="validation", clip_on=False)
    axes.annotate(
        f"{result.validation_loss:.3f}",
        (steps[-1], result.validation_loss),
        xytext=(-6, 10),
        textcoords="offset points",
        horizontalalignment="right",
        color="#d1495b",
    )
    axes.set(title=title, xlabel="step", ylabel="loss (nats per byte)", xlim=(0, steps[-1]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
