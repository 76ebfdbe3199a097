"""Steps in which the host must never wait for the device. A program for torchrun, and for tests/gpu/test_on_a_device.py.

    torchrun --nproc-per-node 1 tests/gpu/steady_steps.py --device cuda
    torchrun --nproc-per-node 2 tests/gpu/steady_steps.py --device cpu          # a dry run, which cannot find a wait

Trains each rule on each ZeRO stage. After its first two steps, in which state is made and plans are agreed on, a call of the
optimizer's ``step()`` that waits is an error, by torch.cuda.set_sync_debug_mode. Prints a line for each run, with the losses.
"""

import argparse
import json
import os
from typing import Any

import deepspeed
import torch

import ds_optforge
from ds_optforge.rules import rule_names
from workload import build_model

STEPS, FIRST = 5, 2
LENGTH = 16


def main() -> None:
    """Train everything; raise where a step waits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rules", nargs="+", default=list(rule_names()))
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2, 3])
    args = parser.parse_args()
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    deepspeed.init_distributed("nccl" if args.device == "cuda" else "gloo")
    for stage in args.stages:
        for rule in args.rules:
            losses = train(stage, rule, device)
            if torch.distributed.get_rank() == 0:
                print(json.dumps({"stage": stage, "rule": rule, "losses": losses}), flush=True)
    torch.distributed.destroy_process_group()


def train(stage: int, rule: str, device: torch.device) -> list[float]:
    """Losses of a run on fixed tokens."""
    torch.manual_seed(0)
    model = build_model("tiny", LENGTH)
    ds_optforge.register(model)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "OptForge", "params": {"name": rule, "lr": 1e-3}},
        "zero_optimization": {"stage": stage},
    }
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    tokens = (torch.arange(LENGTH + 1) % 7).view(1, -1).to(device)
    losses = []
    for step in range(STEPS):
        if step == FIRST:
            forbid_waiting(engine, device)
        loss = engine(tokens[:, :-1], tokens[:, 1:])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return losses


def forbid_waiting(engine: Any, device: torch.device) -> None:
    """From now on a wait within the optimizer's ``step()`` raises."""
    optimizer = engine.optimizer.optimizer
    if device.type == "cuda":
        optimizer.register_step_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
        optimizer.register_step_post_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))


if __name__ == "__main__":
    main()
