"""Train a small byte-level GPT under DeepSpeed ZeRO with an optimizer of ds_optforge.

    deepspeed --num_gpus 2 train.py --ds_config ds_configs/muon_zero2.json
    torchrun --nproc-per-node 2 train.py --ds_config ds_configs/muon_zero3.json
    mpirun -np 2 python train.py                              # docs/launching.md has all the ways
    python train.py                                           # one rank

Leaves DIR/metrics.jsonl, DIR/summary.json, DIR/loss.png and DIR/model.safetensors (`--out DIR`). The extra `experiments`
brings what it needs (matplotlib, safetensors).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import platform
import resource
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
from matplotlib.figure import Figure
from safetensors.torch import save_file
from tqdm import tqdm

import ds_optforge
from ds_optforge.workload import PRESETS, Corpus, DataError, build_model, load_corpus, micro_batch_rows

VALIDATION_WINDOWS = 512
VALIDATION_BATCH = 16  # windows in one forward pass
USAGE_ERROR = 2  # the exit status, as argparse's
MPI_RANK = "OMPI_COMM_WORLD_RANK"  # set by mpirun, which sets neither RANK nor an address to meet at


class UsageError(ValueError):
    """What the user asked for cannot be run."""


@dataclass(frozen=True)
class Result:
    """What a run measured. Losses are in nats per byte; a row of `metrics` is one step."""

    metrics: list[dict[str, Any]]
    validation_loss: float
    seconds: float


def main() -> int:
    """Run the script and return its exit status."""
    args = parse_arguments()
    set_up_logging()
    try:
        return run(args)
    except (UsageError, DataError, ds_optforge.ConfigError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    finally:
        if comm.is_initialized():
            comm.destroy_process_group()


def run(args: argparse.Namespace) -> int:
    """Train and write the results. Input that can be wrong is read before the ranks meet, so that no rank waits."""
    config_path = Path(args.deepspeed_config or args.ds_config)
    config = read_config(config_path, args.steps)
    corpus = load_corpus(args.data)
    corpus.check_length(args.sequence_length)

    start_distributed()
    check_batch_size(config, comm.get_world_size())
    torch.manual_seed(args.seed)
    model = build_model(args.model, args.sequence_length)
    engine, *_ = ds_optforge.initialize(model=model, config=config)

    out = Path(args.out or Path("runs", config_path.stem))
    result = train(engine, corpus, args, out)
    if comm.get_rank() == 0:
        write_summary(out / "summary.json", result, args, config)
        plot_loss(out / "loss.png", result, title=f"{config_path.stem}, {args.model}")
        print(f"validation loss {result.validation_loss:.4f} nats per byte after {args.steps} steps; see {out}/")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; DeepSpeed's own options are accepted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ds_config", default="ds_configs/muon_zero2.json", help="DeepSpeed config file")
    parser.add_argument("--model", choices=tuple(PRESETS), default="tiny")
    parser.add_argument("--steps", type=positive_int, default=200, help="of the run and of its schedule")
    parser.add_argument("--sequence-length", type=positive_int, default=128, help="bytes in a sample")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the data")
    parser.add_argument("--out", help="folder for the results (default: runs/<name of the config file>)")
    parser.add_argument("--data", help="text file, folder or glob (default: the standard library's .py files)")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    return deepspeed.add_config_arguments(parser).parse_args()


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def set_up_logging() -> None:
    """Show ds_optforge's log on rank 0, and of everything else warnings only."""
    logging.basicConfig(format="%(name)s: %(message)s")
    if os.environ.get("RANK", os.environ.get(MPI_RANK, "0")) == "0":
        logging.getLogger("ds_optforge").setLevel(logging.INFO)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def read_config(path: Path, steps: int) -> dict[str, Any]:
    """Read a DeepSpeed config, with the length of its schedule replaced by that of this run, `steps`."""
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


def start_distributed() -> None:
    """Join the process group; without a launcher, make one of this process alone."""
    if "RANK" not in os.environ and MPI_RANK in os.environ:
        check_mpi4py()
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


def check_mpi4py() -> None:
    """Raise UsageError where mpi4py is missing: through it DeepSpeed learns from mpirun who the ranks are."""
    if importlib.util.find_spec("mpi4py") is None:
        raise UsageError("started by mpirun, but mpi4py is not installed; run: pip install 'ds-optforge[mpi]'")


def check_batch_size(config: dict[str, Any], world_size: int) -> None:
    """Raise UsageError where DeepSpeed would stop at a bare assertion."""
    batch, accumulation = config.get("train_batch_size"), config.get("gradient_accumulation_steps", 1)
    if not (isinstance(batch, int) and isinstance(accumulation, int) and accumulation > 0):
        return  # DeepSpeed infers the batch size from the micro-batch, or says what is wrong
    if batch % (world_size * accumulation):
        raise UsageError(
            f"train_batch_size {batch} cannot be shared equally by {world_size} ranks x {accumulation} "
            f"gradient_accumulation_steps; it must be a multiple of {world_size * accumulation}"
        )


def train(engine: Any, corpus: Corpus, args: argparse.Namespace, out: Path) -> Result:
    """Train for `args.steps` steps, writing a row to metrics.jsonl after each, then measure the validation loss."""
    is_first = comm.get_rank() == 0
    out.mkdir(parents=True, exist_ok=True)
    metrics = []
    start = time.perf_counter()
    with (
        open(out / "metrics.jsonl" if is_first else os.devnull, "w", buffering=1) as file,
        tqdm(range(args.steps), disable=not is_first, unit="step", mininterval=1.0) as progress,
    ):
        for step in progress:
            row = {"step": step + 1} | train_step(engine, corpus, step, args)
            metrics.append(row)
            file.write(json.dumps(row) + "\n")
            rates = dict.fromkeys(f"{rate:.1e}" for rate in row["learning_rate"].values())  # equal ones once
            progress.set_postfix_str(f"loss {row['loss']:.3f}, lr {' '.join(rates)}", refresh=False)
    with ds_optforge.evaluation_weights(engine):  # the average, where the optimizer keeps one
        validation_loss = evaluate(engine, corpus, args.sequence_length)
        export_weights(engine, out / "model.safetensors")
    return Result(metrics, validation_loss, seconds=time.perf_counter() - start)


def train_step(engine: Any, corpus: Corpus, step: int, args: argparse.Namespace) -> dict[str, Any]:
    """Take one optimizer step and return its metrics; the loss is the mean over the global batch."""
    start = time.perf_counter()
    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    global_batch = engine.train_batch_size()
    learning_rate = learning_rates(engine)  # before the step moves the schedule on
    loss_sum = torch.zeros((), device=engine.device)
    for index in range(accumulation):
        rows = micro_batch_rows(index, comm.get_rank(), comm.get_world_size(), micro_batch)
        tokens, targets = corpus.batch(step, args.seed, global_batch, args.sequence_length, rows)
        loss = engine(tokens.to(engine.device), targets.to(engine.device))
        engine.backward(loss)
        engine.step()
        loss_sum += loss.detach()
    comm.all_reduce(loss_sum)
    grad_norm = engine.get_global_grad_norm()
    return {
        "loss": loss_sum.item() / (accumulation * comm.get_world_size()),
        "learning_rate": learning_rate,
        "grad_norm": None if grad_norm is None else float(grad_norm),
        "tokens_per_second": global_batch * args.sequence_length / (time.perf_counter() - start),
        "peak_memory_gb": peak_memory_gb(),
    }


def learning_rates(engine: Any) -> dict[str, float]:
    """Return the learning rate of each group, by role and rule ("matrix.muon")."""
    return {group["optforge_group"]: group["lr"] for group in engine.optimizer.param_groups}


def peak_memory_gb() -> float:
    """Return the most memory that this rank held, in 1e9 bytes: the accelerator's, or the process's on a CPU."""
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
    """Write the model's weights as they are, under their names. All ranks take part: ZeRO-3 gathers from them."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, enabled=hasattr(parameter, "ds_id")):
            weights[name] = parameter.detach().cpu().clone()
    if comm.get_rank() == 0:
        save_file(weights, path)


def write_summary(path: Path, result: Result, args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Write what was run, on what, and how it ended."""
    summary = {
        "validation_loss": result.validation_loss,
        "training_loss": result.metrics[-1]["loss"],
        "model": args.model,
        "sequence_length": args.sequence_length,
        "steps": args.steps,
        "seed": args.seed,
        "data": args.data or "standard library",
        "world_size": comm.get_world_size(),
        "seconds": round(result.seconds, 2),
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


def smoothed(values: list[float], reach: int = 5) -> list[float]:
    """Return the mean over up to `reach` neighbours on each side, as many on the one as on the other: no lag."""
    out = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        window = values[index - near : index + near + 1]
        out.append(sum(window) / len(window))
    return out


if __name__ == "__main__":
    sys.exit(main())
