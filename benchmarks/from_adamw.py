"""Compare AdamW, its learning rate tuned, with what `ds-optforge init` makes of it untuned: the evidence of docs/from_adamw.md.

    OMP_NUM_THREADS=1 python benchmarks/from_adamw.py [--parallel 2] [--only gpt] [--quick] [--out DIR]

Three workloads, all with train.py: its GPT; a Llama of transformers; and the GPT, pretrained here with AdamW on the standard
library, fine-tuned on torch's C++ headers. Each begins with the DeepSpeed file of an AdamW user, compare/adamw_deepspeed.json:

1. AdamW at each of `RATES` with `TUNING_SEEDS`; the best of them is the tuned one.
2. `ds-optforge init` from the file with the tuned rate, and from the file as it is, with 3e-4.
3. `ds-optforge compare` of these two and of AdamW at both rates, with all of `SEEDS`.

Prints a table, and writes DIR/from_adamw.json. A command that was interrupted goes on from where it was.
"""

import argparse
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from comparing import losses_of, run
from report import DEFAULT_OUT, Column, show, write

from ds_optforge.experiments.noise import beats, standard_error, threshold
from workload import HEADERS

USER = Path(__file__).parent / "compare" / "adamw_deepspeed.json"
UNTUNED = 3e-4  # the rate in that file
RATES = (UNTUNED, 1e-3, 2e-3, 4e-3)
SEEDS, TUNING_SEEDS, PRETRAINING_SEED = (0, 1, 2, 3, 4), (0, 1), 100
PRETRAINING_STEPS, PRETRAINING_RATE = 1000, 0.002
QUICK_STEPS = 12  # 10 of which are warm-up


@dataclass(frozen=True)
class Workload:
    """What is trained, by train.py with `options` (`{weights}` is the pretrained model), and for what `--purpose` of init."""

    title: str
    options: tuple[str, ...]
    purpose: str
    steps: int


GPT = ("--model", "tiny")
WORKLOADS = {
    "gpt": Workload("byte GPT", GPT, "pretrain", 200),
    "llama": Workload("Llama", ("--model", "llama"), "pretrain", 200),
    "finetune": Workload("fine-tuning", (*GPT, "--weights", "{weights}", "--data", HEADERS), "finetune", 100),
}
COLUMNS = (
    Column("title", "workload"),
    Column("optimizer", "optimizer"),
    Column("rate", "AdamW's rate", "g"),
    Column("loss", "validation loss", ".4f"),
    Column("error", "± standard error", ".4f"),
    Column("gain", "better than AdamW by", ".4f"),
    Column("threshold", "threshold", ".4f"),
    Column("beats", "more than noise"),
)


@dataclass(frozen=True)
class Bench:
    """Where and how small the runs are."""

    out: Path
    parallel: int
    quick: bool

    def launcher(self, workload: Workload) -> list[str]:
        """The command of a run, with the placeholders of `ds-optforge compare`."""
        weights = str(self.out / "pretrained" / "model.safetensors")
        options = [option.replace("{weights}", weights) for option in workload.options]
        command = ["python", "train.py", "--ds_config", "{config}", "--out", "{out}", "--seed", "{seed}"]
        return [*command, "--steps", "{steps}", *options, *(("--sequence-length", "16") if self.quick else ())]

    def pretrain(self) -> None:
        """Train the model that is fine-tuned, unless it is there."""
        out = self.out / "pretrained"
        if (out / "summary.json").is_file():
            return
        config = self.write("pretraining", with_adamw(self.migrated("pretraining", UNTUNED, "pretrain"), PRETRAINING_RATE))
        steps = QUICK_STEPS if self.quick else PRETRAINING_STEPS
        values = {"config": str(config), "out": str(out), "seed": str(PRETRAINING_SEED), "steps": str(steps)}
        run([argument.format(**values) for argument in self.launcher(WORKLOADS["gpt"])])

    def migrated(self, name: str, rate: float, purpose: str) -> Path:
        """Let `ds-optforge init` migrate the user's file with this rate; return the path of what it wrote."""
        user = json.loads(USER.read_text())
        user["optimizer"]["params"]["lr"] = rate
        before, after = self.write(f"{name}_adamw_{rate:g}", user), self.out / "configs" / f"{name}_init_{rate:g}.json"
        for path in (after, after.with_name(f"{after.name}.reasons.md")):
            path.unlink(missing_ok=True)  # init writes over nothing
        command = ["ds-optforge", "init", "--from", str(before), "--purpose", purpose, "--out", str(after)]
        run(command, stdout=subprocess.DEVNULL)  # the reasons are in a file beside
        return after

    def write(self, name: str, config: Mapping[str, Any]) -> Path:
        """Write a configuration."""
        path = self.out / "configs" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config, indent=2) + "\n")
        return path

    def compare(self, name: str, runs: Mapping[str, Path], seeds: Sequence[int]) -> dict[str, list[float]]:
        """Run `ds-optforge compare`; return the validation losses by run, one per seed."""
        workload, out = WORKLOADS[name], self.out / name
        content = {
            "out": str(out),
            "launcher": self.launcher(workload),
            "steps": QUICK_STEPS if self.quick else workload.steps,
            "seeds": list(seeds),
            "runs": {run: {"config": str(path), "lr": rate_of(path)} for run, path in runs.items()},
        }
        return losses_of(self.out / f"{name}.yaml", content, self.parallel)


def main() -> None:
    """Run the three comparisons and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", choices=tuple(WORKLOADS), help="one of the workloads")
    parser.add_argument("--quick", action="store_true", help="few steps, two rates and two seeds: to see that it runs")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT.with_name("from_adamw"))
    args = parser.parse_args()
    bench = Bench(args.out, args.parallel, args.quick)
    rows, tuning = [], {}
    for name in [args.only] if args.only else WORKLOADS:
        tuning[name], compared = evidence(bench, name)
        rows += compared
    title = "AdamW, and what ds-optforge init makes of it"
    show(title, COLUMNS, rows)
    print(write("from_adamw", title, rows, args.out, tuning=tuning))


def evidence(bench: Bench, name: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Tune AdamW, migrate and compare; return the losses by AdamW's rate, and the rows of the comparison."""
    workload = WORKLOADS[name]
    if "{weights}" in workload.options:
        bench.pretrain()
    untuned = bench.migrated(name, UNTUNED, workload.purpose)

    def adamw(rate: float) -> Path:
        return bench.write(f"{name}_optforge_adamw_{rate:g}", with_adamw(untuned, rate))

    rates = RATES[:2] if bench.quick else RATES
    tuning = bench.compare(name, {f"adamw_{rate:g}": adamw(rate) for rate in rates}, TUNING_SEEDS)
    tuned = min(rates, key=lambda rate: mean(tuning[f"adamw_{rate:g}"]))
    started = {rate: bench.migrated(name, rate, workload.purpose) for rate in dict.fromkeys((tuned, UNTUNED))}
    runs = {f"init_{rate:g}": path for rate, path in started.items()} | {f"adamw_{rate:g}": adamw(rate) for rate in started}
    losses = bench.compare(name, runs, TUNING_SEEDS if bench.quick else SEEDS)
    rows = [
        row(name, optimizer, rate, losses[f"{optimizer}_{rate:g}"], losses[f"adamw_{rate:g}"])
        for rate in started
        for optimizer in ("adamw", "init")
    ]
    return {f"{rate:g}": mean(tuning[f"adamw_{rate:g}"]) for rate in rates}, rows


def with_adamw(migrated: Path, rate: float) -> dict[str, Any]:
    """The migrated configuration with the user's AdamW, as OptForge's `adamw`, in place of its optimizer."""
    params = json.loads(USER.read_text())["optimizer"]["params"] | {"name": "adamw", "lr": rate}
    config: dict[str, Any] = json.loads(migrated.read_text())
    return config | {"optimizer": {"type": "OptForge", "params": params}}


def rate_of(path: Path) -> float:
    """The learning rate of a configuration."""
    return float(json.loads(path.read_text())["optimizer"]["params"]["lr"])


def row(name: str, optimizer: str, rate: float, losses: list[float], baseline: list[float]) -> dict[str, Any]:
    """Make a row; `baseline` are the losses of AdamW at the same rate."""
    found = {"workload": name, "title": WORKLOADS[name].title, "steps": WORKLOADS[name].steps, "optimizer": optimizer}
    found |= {"rate": rate, "losses": losses, "loss": mean(losses), "error": standard_error(losses)}
    if optimizer == "adamw":
        return found
    gain = mean(baseline) - mean(losses)
    return found | {"gain": gain, "threshold": threshold(baseline), "beats": beats(losses, baseline)}


if __name__ == "__main__":
    main()
