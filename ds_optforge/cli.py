"""The ``ds-optforge`` command.

The parser is built without torch, which takes seconds to import: each command imports what does its work.

All commands name alike what several of them have: ``--model``, ``--config`` (of DeepSpeed), ``--out``, and ``--json`` for what
programs read. What a command alone works on, as a checkpoint or a file of experiments, has no option before it.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ds_optforge import __version__, shipped_configs
from ds_optforge.errors import CheckpointError, ConfigError
from ds_optforge.forecast.catalog import MODEL_SHAPES
from ds_optforge.forecast.hardware import DEVICES, LINKS, UTILISATION

_MODELS = f"{', '.join(MODEL_SHAPES)}; or the path of a Hugging Face config.json, or of its folder"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; 2 means that a configuration or a checkpoint cannot be used.

    Args:
        arguments: the command line without the program's name; None takes that of the process.
    """
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow, and wants no more
        import argcomplete

        argcomplete.autocomplete(parser)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains as it ends
        status = 1
    except (ConfigError, CheckpointError) as error:
        print(f"{options.config}:\n{error}" if options.config else error, file=sys.stderr)
        status = 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ds-optforge", description="Optimizers that know where ZeRO put each matrix.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("explain", help="print which rule each parameter of a model gets")
    command.add_argument("--config", required=True, help="a DeepSpeed configuration file")
    _complete_models(command.add_argument("--model", default="gpt2", help=f"{_MODELS}; default: gpt2"))
    command.add_argument("--full", action="store_true", help="a row for each parameter, also where layers are alike")
    _add_json(command)
    command.set_defaults(run=_explain)

    command = commands.add_parser("check", help="validate a DeepSpeed configuration file")
    _add_required(command, "config", metavar="FILE", help="a DeepSpeed configuration file")
    _add_json(command)
    command.set_defaults(run=_check)

    command = commands.add_parser("configs", help="list the configurations that are shipped, or write one into a folder")
    name = command.add_argument("name", metavar="NAME", nargs="?", help="one of those that are listed without it")
    _complete(name, lambda prefix, **_: shipped_configs.names())
    command.add_argument("--out", type=Path, metavar="FOLDER", help="for NAME.json; default: the current one")
    _add_json(command)
    command.set_defaults(run=_configs, config=None)
    command = commands.add_parser("doctor", help="report versions, compilers, backends and a small run on two ranks")
    command.add_argument("--no-run", dest="training", action="store_false", help="leave the small run out")
    _add_json(command)
    command.set_defaults(run=_doctor, config=None)
    _add_init(commands)
    _add_convert(commands)
    _add_experiments(commands)
    _add_plan(commands.add_parser("plan", help="predict what a step costs each rank of a run, and the best sharding mode"))
    return parser


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON, for programs")


def _add_required(command: argparse.ArgumentParser, name: str, **described: Any) -> argparse.Action:
    """Add the option --NAME, of text; its value may also stand alone, as it had to until version 0.1."""
    one = command.add_mutually_exclusive_group(required=True)
    one.add_argument(name, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return one.add_argument(f"--{name}", **described)


def _complete(action: argparse.Action, words: Callable[..., list[str]]) -> None:
    """Let shells complete ``action`` with these words, and with files where none of them fits."""
    action.completer = words  # type: ignore[attr-defined]  # where argcomplete looks


def _complete_models(action: argparse.Action) -> None:
    _complete(action, lambda prefix, **_: list(MODEL_SHAPES))


def _add_init(commands: Any) -> None:
    command = commands.add_parser("init", help="write the OptForge configuration that continues what you have")
    command.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        metavar="FILE",
        help="a DeepSpeed configuration, TrainingArguments (JSON or YAML), or the YAML of accelerate launch, Axolotl or "
        "LLaMA-Factory; which one is recognised by its content",
    )
    command.add_argument(
        "--purpose",
        choices=("pretrain", "finetune", "lora"),
        help="what the run is for: from scratch, all weights of a model that AdamW has trained, or LoRA on one; default: what "
        "FILE says, else pretrain",
    )
    command.add_argument("--rule", default="muon", help="of the model's matrices; default: muon")
    command.add_argument("--out", type=Path, help="the new file, and its reasons in OUT.reasons.md; default: print a diff")
    command.set_defaults(run=_init, config=None)


def _add_convert(commands: Any) -> None:
    command = commands.add_parser("convert", help="make a portable checkpoint of one that engine.save_checkpoint wrote")
    command.add_argument(
        "source", type=Path, help="its folder (of OptForge, Adam, AdamW, DeepSpeed's Muon); or a file of torch"
    )
    _add_required(command, "out", metavar="FOLDER", help="a new folder")
    command.set_defaults(run=_convert, config=None)

    command = commands.add_parser("export", help="write a checkpoint as the folder of a Hugging Face model")
    command.add_argument("source", type=Path, help="a folder of save_checkpoint or of 'convert', or what 'convert' takes")
    _add_required(command, "out", metavar="FOLDER", help="a new folder")
    command.add_argument(
        "--model",
        dest="model_folder",
        type=Path,
        metavar="FOLDER",
        help="with config.json and perhaps a tokenizer, to copy; default: the checkpoint's folder, or the one that it is in",
    )
    command.add_argument("--config", dest="model_folder", type=Path, help=argparse.SUPPRESS)  # --model until version 0.1
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the trained parameters")
    command.set_defaults(run=_export, config=None)


def _add_plan(command: argparse.ArgumentParser) -> None:
    _complete_models(_add_required(command, "model", help=_MODELS))
    command.add_argument("--world-size", type=int, required=True, help="ranks that ZeRO cuts the parameters over")
    command.add_argument("--stage", type=int, help="of ZeRO: 1, 2 or 3; default: CONFIG's, or else all of them")
    command.add_argument("--config", help="a DeepSpeed configuration file; default: muon as it is by default, in bfloat16")
    command.add_argument("--device", choices=DEVICES, default="h100", help="default: h100")
    command.add_argument("--link", choices=LINKS, help="default: nvlink (the device's own links) up to 8 ranks, else ib400")
    command.add_argument(
        "--tokens-per-step",
        "--batch-tokens",
        dest="tokens",
        type=int,
        metavar="TOKENS",
        help="of all ranks together; default: 524288, or a sequence a rank if that is more",
    )
    command.add_argument("--sequence-length", type=int, default=4096, metavar="TOKENS", help="default: 4096")
    command.add_argument(
        "--utilisation", type=float, default=UTILISATION, help="share of the device's peak in training; default: 0.4"
    )
    command.add_argument(
        "--saving",
        type=float,
        default=0.05,
        help="share of the step for which a less exact mode is recommended; default: 0.05",
    )
    command.add_argument("--link-gbps", type=float, help="Gbit/s that a rank's link reaches each way, in place of --link's")
    command.add_argument("--tflops", type=float, help="TFLOP/s that products of the optimizer reach, in place of --device's")
    command.add_argument(
        "--expert-parallel",
        type=int,
        default=1,
        metavar="E",
        help="E ranks share out each bank of experts (named 'experts', three dimensions), and ZeRO cuts a share over "
        "world size / E ranks; default: 1, ZeRO cuts experts as everything else",
    )
    _add_json(command)
    command.set_defaults(run=_plan)


def _add_experiments(commands: Any) -> None:
    compare = commands.add_parser("compare", help="several optimizers on one workload: fair runs, a table, plots, a report")
    sweep = commands.add_parser("sweep", help="named experiments in phases; each phase's winner is the next one's baseline")
    sweep.add_argument("--dry-run", action="store_true", help="print the order of the experiments and launch nothing")
    for command in (compare, sweep):
        command.add_argument("file", type=Path, help="a YAML file; docs/comparison.md says what is in it")
        command.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at a time; default: 1")
        command.add_argument("--steps", type=int, help="of each run, in place of the file's: for a first look")
        command.add_argument("--out", metavar="FOLDER", help="for the results, in place of the file's")
        command.add_argument("--retry", action="store_true", help="launch again what crashed, diverged or timed out")
        _add_json(command)
        command.set_defaults(run=_experiments, config=None, sweep=command is sweep, dry_run=False)


def _experiments(options: argparse.Namespace) -> int:
    try:
        from ds_optforge.experiments import commands
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error}; run: pip install 'ds-optforge[experiments]'") from None
    if options.parallel < 1 or (options.steps or 1) < 1:
        raise ConfigError("--parallel and --steps: allowed: whole numbers of at least 1")
    status: int = commands.sweep(options) if options.sweep else commands.compare(options)
    return status


def _configs(options: argparse.Namespace) -> int:
    if options.name is not None:
        print(f"{shipped_configs.write(options.name, options.out or Path())}: written")
    elif options.out is not None:
        raise ConfigError(f"--out: got '{options.out}' without a NAME; allowed: ds-optforge configs NAME --out FOLDER")
    elif options.json:
        print(json.dumps(shipped_configs.summaries(), indent=2))
    else:
        print(shipped_configs.listing(), end="")
    return 0


def _explain(options: argparse.Namespace) -> int:
    from ds_optforge.forecast.skeletons import load
    from ds_optforge.integrations.explanation import explained, table_of

    rows, warnings = explained(load(options.model), options.config, options.full)
    if options.json:
        print(json.dumps({"parameters": [row.plain() for row in rows], "warnings": warnings}, indent=2))
    else:
        print(table_of(rows, warnings), end="")
    return 0


def _check(options: argparse.Namespace) -> int:
    from ds_optforge.config.deepspeed import check, load_config
    from ds_optforge.config.deepspeed_values import autos_of

    try:
        config = load_config(options.config)
        check(config, filled=False)
    except ConfigError as error:
        if not options.json:
            raise
        print(json.dumps({"config": options.config, "valid": False, "problems": str(error).splitlines()}, indent=2))
        return 2
    left_open = list(autos_of(config))
    if options.json:
        print(json.dumps({"config": options.config, "valid": True, "problems": [], "auto": left_open}, indent=2))
    else:
        filled = f", once Accelerate or the HF Trainer has filled {', '.join(left_open)}" if left_open else ""
        print(f"{options.config}: valid{filled}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    with redirect_stdout(sys.stderr):  # where DeepSpeed warns while it is imported
        from ds_optforge.doctor import examine, report

        findings = examine(options.training)
    print(json.dumps([each.plain() for each in findings], indent=2) if options.json else report(findings), end="")
    return int(any(each.verdict == "problem" for each in findings))


def _init(options: argparse.Namespace) -> int:
    from ds_optforge.migrate.command import init

    print(init(options.source, options.purpose, options.rule, options.out), end="")
    return 0


def _convert(options: argparse.Namespace) -> int:
    from ds_optforge.checkpoint.convert import convert

    convert(options.source, Path(options.out))
    print(f"{options.out}: written")
    return 0


def _export(options: argparse.Namespace) -> int:
    import torch

    from ds_optforge.checkpoint.export import export

    dtype = getattr(torch, options.dtype) if options.dtype else None
    export(options.source, Path(options.out), dtype, options.model_folder)
    print(f"{options.out}: written")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from ds_optforge.forecast.command import Question, answer, text_of

    asked = {key: value for key, value in vars(options).items() if key not in ("run", "json")}
    print(text_of(answer(Question(**asked)), options.json), end="")
    return 0
