"""Train the model of train.py on its data through Accelerate, with the same losses for the same seed.

    accelerate launch --config_file launch/accelerate_zero2.yaml examples/accelerate_gpt.py

Needs `pip install 'ds-optforge[hf]'`. Writes DIR/metrics.jsonl (`--out DIR`).
"""

import argparse
import json
from pathlib import Path

import torch

from ds_optforge.integrations.accelerate import make_accelerator, optimizer_and_scheduler
from workload import build_model, load_corpus, micro_batch_rows


def main() -> None:
    """Train, and write the loss of each step."""
    args = parse_arguments()
    config = json.loads(Path(args.ds_config).read_text())
    config["scheduler"]["params"]["total_num_steps"] = "auto"  # total_steps below fills it
    accelerator = make_accelerator(config)

    torch.manual_seed(0)
    model = build_model("tiny", args.sequence_length)
    optimizer, scheduler = optimizer_and_scheduler(accelerator, model, total_steps=args.steps)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    corpus = load_corpus(args.data)
    global_batch = config["train_batch_size"]
    rows = micro_batch_rows(0, accelerator.process_index, accelerator.num_processes, global_batch // accelerator.num_processes)
    metrics = []
    for step in range(args.steps):
        tokens, targets = corpus.batch(step, 0, global_batch, args.sequence_length, rows)
        loss = model(tokens.to(accelerator.device), targets.to(accelerator.device))
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        metrics.append({"step": step + 1, "loss": accelerator.reduce(loss.detach(), "mean").item()})
        accelerator.print(metrics[-1])
    if accelerator.is_main_process:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    accelerator.end_training()


def parse_arguments() -> argparse.Namespace:
    """Parse the command line, whose options are named as in train.py."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ds_config", default="ds_configs/muon_zero2.json", help="DeepSpeed config file")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sequence-length", type=int, default=128, help="bytes in a sample")
    parser.add_argument("--data", help="text file, folder or glob (default: the standard library's .py files)")
    parser.add_argument("--out", default="runs/accelerate_gpt", help="folder for the results")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    return parser.parse_args()


if __name__ == "__main__":
    main()
