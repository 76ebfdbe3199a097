"""Compare every rule at a rate that one search chose for each: the figures of docs/choosing.md.

    OMP_NUM_THREADS=1 python benchmarks/choosing.py [--parallel 2] [--only gpt] [--rules muon normuon] [--rates FILE]
                                                    [--dtype float32] [--quick] [--out DIR]

Two workloads, both with train.py on two models over bytes: its GPT, and a Llama of transformers. For each rule:

1. `ds-optforge compare` at half, once and twice the rate in `CONTENDERS`, with `TUNING_SEEDS`; while the best rate is
   the lowest or the highest that was tried, the next one beyond it too, at most `FARTHEST` times twofold from the first.
   With --rates, the rates that an earlier choosing.json found for the byte GPT are taken in place of a search.
2. `ds-optforge compare` of all rules, each at its best rate, with all of `SEEDS`.
3. In one process, steps of all optimizers on a GPT of width 512 in turns: the time of a step over AdamW's, and the bytes of
   state. Bytes on the wire and FLOPs are those of `ds-optforge plan` for Llama-3 8B on ZeRO-3 and 64 GPUs.

Prints tables, and writes DIR/choosing.json. A command that was interrupted goes on from where it was.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
from comparing import losses_of
from report import DEFAULT_OUT, Column, show, write

from ds_optforge import OptForge, build_optimizer
from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.experiments.noise import standard_error, threshold
from ds_optforge.forecast.forecast import forecast
from ds_optforge.forecast.skeletons import load
from ds_optforge.forecast.topology import Topology
from workload import GPT, GPTConfig

BASE = Path("ds_configs/muon_zero2.json")
BATCH = 8
STEPS = 120
SEEDS, TUNING_SEEDS = (0, 1, 2, 3, 4), (0, 1)
FARTHEST = 3  # doublings
QUICK_STEPS = 12
WORKLOADS = {"gpt": ("byte GPT", "tiny", 128), "llama": ("Llama", "llama", 64)}  # title, model, bytes in a sample
WIDTH, LAYERS, ROUNDS = 512, 4, 15
PLANNED, RANKS = "llama3-8b", 64
BESIDE = {"adamw": {"lr": 0.003, "betas": [0.9, 0.95]}}  # of embeddings, output, norms and biases beside a matrix rule


@dataclass(frozen=True)
class Contender:
    """A rule: the rate in the middle of the search, and its other settings.

    Attributes:
        rate: learning rate of the matrices, or of everything for an elementwise rule.
        params: the optimizer's "params" without the rate.
    """

    rate: float
    params: Mapping[str, Any]

    def at(self, rate: float) -> dict[str, Any]:
        """The optimizer's "params" with this rate."""
        return {**self.params, "lr": rate}

    @property
    def orthogonalizes(self) -> bool:
        """Whether the rule is one of matrices."""
        return "adamw" in self.params

    @property
    def averages(self) -> bool:
        """Whether the rule is a schedule of its own."""
        return str(self.params["name"]).startswith("schedule_free")


def with_matrices(name: str, rate: float, **settings: Any) -> Contender:
    """A rule for matrices, with AdamW beside it."""
    return Contender(rate, {"name": name, **BESIDE, **settings})


CONTENDERS = {
    "adamw": Contender(0.002, {"name": "adamw", "betas": [0.9, 0.95]}),
    "lion": Contender(0.001, {"name": "lion"}),
    "schedule_free_adamw": Contender(0.005, {"name": "schedule_free_adamw", "warmup_steps": 10}),
    "muon": with_matrices("muon", 0.04),
    "normuon": with_matrices("normuon", 0.04),
    "muon+rows_after": with_matrices("muon", 0.04, normalize={"by": "rows", "when": "after"}),
    "muon+rows_before": with_matrices("muon", 0.04, normalize={"by": "rows", "when": "before"}),
    "muon_squared": with_matrices("muon_squared", 0.04),
    "adamuon": with_matrices("adamuon", 0.01),
    "aurora": with_matrices("aurora", 0.04),
    "muon_hyperball": with_matrices("muon_hyperball", 0.018),
    "muown": with_matrices("muown", 0.006),
    "soap_muon": with_matrices("soap_muon", 0.02),
    "muon+rows_0.25": with_matrices("muon", 0.04, nesterov=False, sharding={"rows": 0.25}),
    "muon+ema_nesterov": with_matrices("muon", 0.04, ema_nesterov={"start": 20}),
}
LOSSES = (
    Column("title", "workload"),
    Column("rule", "rule"),
    Column("rate", "rate", "g"),
    Column("loss", "validation loss", ".4f"),
    Column("error", "± standard error", ".4f"),
    Column("gain", "below Muon's by", ".4f"),
    Column("threshold", "threshold", ".4f"),
)
COSTS = (
    Column("rule", "rule"),
    Column("over_adamw", "step over AdamW's", ".2f"),
    Column("state_bytes", "state, bytes per parameter", ".2f"),
    Column("sent_mb", "sent, MB a step and rank", ",.0f"),
    Column("tflops", "TFLOPs, busiest rank", ",.2f"),
)


@dataclass(frozen=True)
class Bench:
    """Where and how small the runs are."""

    out: Path
    parallel: int
    quick: bool
    dtype: str | None

    def config(self, rule: str, rate: float) -> Path:
        """Write the configuration of a rule at a rate."""
        contender, content = CONTENDERS[rule], json.loads(BASE.read_text())
        content["train_batch_size"] = BATCH
        content["optimizer"]["params"] = contender.at(rate)
        if self.dtype and contender.orthogonalizes:
            content["optimizer"]["params"]["orthogonalization"] = {"dtype": self.dtype}
        if contender.averages:
            content["scheduler"]["params"] = {"name": "none"}
        path = self.out / "configs" / f"{rule}_{rate:g}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
        return path

    def compare(self, workload: str, kind: str, rates: Sequence[tuple[str, float]], seeds: Sequence[int]) -> list[list[float]]:
        """Run `ds-optforge compare`; return the validation losses of each (rule, rate), one per seed."""
        command = ["python", "train.py", "--ds_config", "{config}", "--out", "{out}", "--seed", "{seed}", "--steps", "{steps}"]
        _, model, length = WORKLOADS[workload]
        content = {
            "out": str(self.out / workload),
            "launcher": [*command, "--model", model, "--sequence-length", str(16 if self.quick else length)],
            "steps": QUICK_STEPS if self.quick else STEPS,
            "seeds": list(seeds),
            "runs": {f"{rule}_{rate:g}": {"config": str(self.config(rule, rate)), "lr": rate} for rule, rate in rates},
        }
        found = losses_of(self.out / f"{workload}_{kind}.yaml", content, self.parallel)
        return [found[f"{rule}_{rate:g}"] for rule, rate in rates]


def main() -> None:
    """Tune, compare and measure all rules, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", choices=(*WORKLOADS, "costs"), help="one of the workloads, or the costs alone")
    parser.add_argument("--rules", nargs="+", choices=tuple(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--rates", type=Path, help="a choosing.json whose best rates on the byte GPT are taken: no search")
    parser.add_argument("--dtype", help="of the products of the orthogonalization: float32 for a processor without bfloat16")
    parser.add_argument("--quick", action="store_true", help="few steps, no search and two seeds: to see that it runs")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT.with_name("choosing"))
    args = parser.parse_args()
    bench = Bench(args.out, args.parallel, args.quick, args.dtype)
    rows: list[dict[str, Any]] = []
    tuning = {}
    for workload in wanted_workloads(args.only):
        if not args.rates:
            tuning[workload] = tune(bench, workload, args.rules)
        rows += compared(bench, workload, read_rates(args.rates, args.rules) if args.rates else tuning[workload])
    spent = costs(args.rules, args.quick) if args.only in (None, "costs") else []
    title = "Every rule at its best rate"
    show(title, LOSSES, rows)
    show("Cost of a step", COSTS, spent)
    print(write("choosing", title, rows, args.out, tuning=tuning, costs=spent, steps=STEPS))


def wanted_workloads(only: str | None) -> list[str]:
    """The workloads that ``--only`` leaves."""
    return [name for name in WORKLOADS if only in (None, name)]


def read_rates(path: Path, rules: Sequence[str]) -> dict[str, dict[float, float]]:
    """The losses at the rates that were tried on the byte GPT, by rule, from a choosing.json."""
    found = json.loads(path.read_text())["tuning"]["gpt"]
    return {rule: {float(rate): loss for rate, loss in found[rule].items()} for rule in rules}


def tune(bench: Bench, workload: str, rules: Sequence[str]) -> dict[str, dict[float, float]]:
    """Search the rate of each rule; return the losses at the rates that were tried, by rule."""
    found: dict[str, dict[float, float]] = {rule: {} for rule in rules}
    wanted = [(rule, CONTENDERS[rule].rate * 2.0**power) for rule in rules for power in ((0, 1) if bench.quick else (-1, 0, 1))]
    while wanted:
        for (rule, rate), losses in zip(wanted, bench.compare(workload, "tuning", wanted, TUNING_SEEDS), strict=True):
            found[rule][rate] = mean(losses)
        beyond = [] if bench.quick else [(rule, next_rate(CONTENDERS[rule].rate, found[rule])) for rule in rules]
        wanted = [(rule, rate) for rule, rate in beyond if rate]
        if len(wanted) == 1:  # a comparison is of two
            wanted.append((rules[0], min(found[rules[0]])))
    return {rule: dict(sorted(losses.items())) for rule, losses in found.items()}


def next_rate(middle: float, losses: Mapping[float, float]) -> float | None:
    """The rate to try after those in ``losses``, if the best is the lowest or the highest of them."""
    best = best_of(losses)
    beyond = best * 2 if best == max(losses) else best / 2 if best == min(losses) else None
    return beyond if beyond and 2.0**-FARTHEST <= beyond / middle <= 2.0**FARTHEST else None


def best_of(losses: Mapping[float, float]) -> float:
    """The rate with the lowest loss."""
    return min(losses, key=lambda rate: losses[rate])


def compared(bench: Bench, workload: str, tuning: Mapping[str, Mapping[float, float]]) -> list[dict[str, Any]]:
    """Compare all rules at their best rates; return a row for each, the best first."""
    chosen = [(rule, best_of(found)) for rule, found in tuning.items()]
    seeds = SEEDS[:2] if bench.quick else SEEDS
    losses = dict(zip((rule for rule, _ in chosen), bench.compare(workload, "final", chosen, seeds), strict=True))
    rows = []
    for rule, rate in chosen:
        own = losses[rule]
        row = {"workload": workload, "title": WORKLOADS[workload][0], "rule": rule, "rate": rate, "losses": own}
        row |= {"loss": mean(own), "error": standard_error(own)}
        if "muon" in losses and rule != "muon":
            row |= {"gain": mean(losses["muon"]) - mean(own), "threshold": threshold(losses["muon"])}
        rows.append(row)
    return sorted(rows, key=lambda row: row["loss"])


def costs(rules: Sequence[str], quick: bool) -> list[dict[str, Any]]:
    """Measure a step of each optimizer and what it keeps, and plan what it would send; return a row for each."""
    width = 64 if quick else WIDTH
    optimizers = {rule: on_a_gpt(rule, width) for rule in dict.fromkeys(("adamw", *rules))}
    seconds: dict[str, list[float]] = {rule: [] for rule in optimizers}
    for turn in range(3 if quick else ROUNDS):
        for rule, optimizer in optimizers.items():
            start = perf_counter()
            optimizer.step()
            if turn:  # the first step allocates and plans
                seconds[rule].append(perf_counter() - start)
    model = load("gpt2" if quick else PLANNED)
    rows = []
    for rule in rules:
        ratio = median(own / base for own, base in zip(seconds[rule], seconds["adamw"], strict=True))
        config = OptimizerConfig(CONTENDERS[rule].at(CONTENDERS[rule].rate))
        ranks = forecast(model, config, Topology(RANKS, 3, device="cuda")).ranks
        rows.append(
            {
                "rule": rule,
                "over_adamw": ratio,
                "state_bytes": state_bytes(optimizers[rule]),
                "sent_mb": max(rank.sent_bytes for rank in ranks) / 1e6,
                "tflops": max(rank.flops for rank in ranks) / 1e12,
            }
        )
    return rows


def on_a_gpt(rule: str, width: int) -> OptForge:
    """An optimizer of a GPT of its own, with gradients."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=LAYERS, width=width, heads=width // 64, sequence_length=128))
    optimizer = build_optimizer(model, CONTENDERS[rule].at(CONTENDERS[rule].rate))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 0.01
    return optimizer


def state_bytes(optimizer: OptForge) -> float:
    """Bytes of state, all of it, per parameter."""
    parameters = sum(tensor.numel() for group in optimizer.param_groups for tensor in group["params"])
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(value.numel() * value.element_size() for value in kept) / parameters


if __name__ == "__main__":
    main()
