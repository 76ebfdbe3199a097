"""The ``ds-optforge`` command."""

import argparse
import logging
import sys
from collections.abc import Sequence

import torch

from ds_optforge.integrations.deepspeed import check, load_config
from ds_optforge.integrations.plain import explain
from ds_optforge.validation import ConfigError
from ds_optforge.workload.gpt import PRESETS, build_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (2: a configuration that cannot be used)."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        status: int = options.run(options)
    except ConfigError as error:
        print(f"{options.config}:\n{error}", file=sys.stderr)
        status = 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ds-optforge", description="Optimizers that know where ZeRO put each matrix.")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("explain", help="print which rule each parameter of a model gets")
    command.add_argument("--config", required=True, help="a DeepSpeed configuration file")
    command.add_argument("--model", choices=sorted(PRESETS), default="tiny", help="a model of the shipped workload")
    command.set_defaults(run=_explain)

    command = commands.add_parser("check", help="validate a DeepSpeed configuration file")
    command.add_argument("config", help="a DeepSpeed configuration file")
    command.set_defaults(run=_check)
    return parser


def _explain(options: argparse.Namespace) -> int:
    with torch.device("meta"):
        model = build_model(options.model, sequence_length=1024)
    print(explain(model, options.config))
    return 0


def _check(options: argparse.Namespace) -> int:
    config = load_config(options.config)
    check(config, filled=False)
    print(f"{options.config}: valid")
    return 0
