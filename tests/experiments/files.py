"""Files of the two commands, for the quick program."""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

PROGRAM = Path(__file__).with_name("program.py")
ROOT = PROGRAM.parents[2]
LAUNCHER = [sys.executable, str(PROGRAM)]
LAUNCHER += ["--config", "{config}", "--out", "{out}", "--seed", "{seed}", "--steps", "{steps}"]


def config(lr: float = 0.1, **more: Any) -> dict[str, Any]:
    return {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": lr}}, **more}


def write_config(folder: Path, name: str = "config.json", **more: Any) -> str:
    path = folder / name
    path.write_text(json.dumps(config(**more)))
    return str(path)


def write_yaml(folder: Path, content: Any, name: str = "file.yaml") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def common(folder: Path, **more: Any) -> dict[str, Any]:
    return {"out": str(folder / "out"), "launcher": LAUNCHER, "steps": 10, "seeds": [0, 1, 2]} | more


def lr(value: float, **more: Any) -> dict[str, Any]:
    """An experiment of a sweep."""
    return {"changes": {"optimizer.params.lr": value}} | more


def sweep(folder: Path, phases: list[Any], lr: float = 0.1, **more: Any) -> Path:
    """A sweep file for the quick program; its best learning rate is 1."""
    return write_yaml(folder, common(folder, config=write_config(folder, lr=lr), phases=phases) | more)


def phase(name: str, **experiments: Any) -> dict[str, Any]:
    return {"name": name, "experiments": experiments}


def launches(folder: Path) -> list[str]:
    """The folders of all launches so far, in order."""
    log = folder / "out" / "runs" / "launches.txt"
    return log.read_text().split() if log.exists() else []


def results(folder: Path) -> list[dict[str, str]]:
    """The rows of results.tsv."""
    header, *lines = (folder / "out" / "results.tsv").read_text().splitlines()
    return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]
