"""Measure the cost of compact state: losses after the same steps with float32, bfloat16 and 8-bit state, and its bytes.

    python benchmarks/state_formats.py [--steps 200] [--rules muon adamw] [--lr LR] [--out DIR]

One process, the tiny byte GPT; the same weights, batches and learning rates for every format. Prints a table; writes
state_formats.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import ds_optforge
from ds_optforge.rules import rule_names, rule_settings
from workload import Corpus, build_model, load_corpus

BATCH, LENGTH, WINDOWS = 16, 128, 256
FORMATS = ("float32", "bfloat16", "8bit")


def main() -> None:
    """Train every rule with every format, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rules", nargs="+", choices=rule_names(), default=["muon", "adamw"])
    parser.add_argument("--lr", type=float, help="learning rate; default: each rule's own")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args()
    corpus = load_corpus(None)
    rate = {} if args.lr is None else {"lr": args.lr}
    rows = []
    for rule in args.rules:
        runs = [measure({"name": rule, "state_dtype": form, **rate}, corpus, args.steps) for form in FORMATS]
        rows += [{**run, "against_float32": run["validation_loss"] / runs[0]["validation_loss"] - 1} for run in runs]
    table = Table("rule", "state", "validation loss", "against float32", "state bytes per parameter")
    for row in rows:
        loss, change, size = row["validation_loss"], row["against_float32"], row["bytes_per_parameter"]
        table.add_row(row["rule"], row["state_dtype"], f"{loss:.4f}", f"{100 * change:+.2f}%", f"{size:.2f}")
    Console(width=120).print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "state_formats.json").write_text(json.dumps({"steps": args.steps, "rows": rows}, indent=2))


def measure(params: dict[str, Any], corpus: Corpus, steps: int) -> dict[str, Any]:
    """Train from scratch with an optimizer of ``params``; return its row of the table.

    AdamW's parameters beside a matrix rule have a learning rate of their own.
    """
    rule, form = params["name"], params["state_dtype"]
    settings = rule_settings(rule)
    beside = {"adamw": {"lr": 0.003}} if settings and settings.needs_matrix() else {}
    torch.manual_seed(0)
    model = build_model("tiny", LENGTH)
    optimizer = ds_optforge.build_optimizer(model, {**beside, **params})
    for step in tqdm(range(steps), desc=f"{rule}, {form}"):
        loss = model(*corpus.batch(step, 0, BATCH, LENGTH))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()
    with torch.no_grad():
        tokens, targets = corpus.validation_windows(LENGTH, WINDOWS)
        validation = model(tokens, targets).item()
    size = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    numel = sum(parameter.numel() for parameter in model.parameters())
    return {"rule": rule, "state_dtype": form, "validation_loss": validation, "bytes_per_parameter": size / numel}


if __name__ == "__main__":
    main()
