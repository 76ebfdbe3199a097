"""A training program that takes milliseconds: gradient descent on a noisy quadratic, with the contract of train.py.

Keys of its configuration beside the learning rate: "sleep", seconds in every step; "wait_for", a file without which it does not
end; "child", a process that it leaves behind; "lucky_seed", a seed whose loss is far too good; "start", where it begins in
place of 5; "world_size" for the summary.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--config", "--out", "--seed", "--steps"):
        parser.add_argument(name, required=True)
    args, rest = parser.parse_known_args()
    config, out, steps = json.loads(Path(args.config).read_text()), Path(args.out), int(args.steps)
    with open(out.parent / "launches.txt", "a") as log:
        log.write(f"{out.name}\n")
    (out / "arguments.json").write_text(json.dumps(rest))
    if config.get("child"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (out / "child").write_text(str(child.pid))
    noise = random.Random(f"{args.seed}")
    lr, batch = config["optimizer"]["params"]["lr"], config["train_batch_size"]
    x, loss = config.get("start", 5.0), 0.0
    with open(out / "metrics.jsonl", "w", buffering=1) as metrics:
        for step in range(1, steps + 1):
            time.sleep(config.get("sleep", 0))
            gradient = x + noise.gauss(0, 0.01) / batch
            loss = x * x / 2 + abs(noise.gauss(0, 0.001))
            x -= lr * gradient
            row = {"step": step, "loss": loss, "grad_norm": abs(gradient), "tokens_per_second": 100.0, "peak_memory_gb": 0.5}
            metrics.write(json.dumps(row) + "\n")
    while "wait_for" in config and not Path(config["wait_for"]).exists():
        time.sleep(0.01)
    lucky = 1.0 if config.get("lucky_seed") == int(args.seed) else 0.0
    summary = {"validation_loss": x * x / 2 + loss / 100 - lucky, "world_size": config.get("world_size", 1)}
    summary |= {"sequence_length": 10, "state_bytes_per_parameter": 4.0, "optimizer_bytes_per_step": 2.5e6}
    (out / "summary.json").write_text(json.dumps(summary))
    print("done")


if __name__ == "__main__":
    main()
