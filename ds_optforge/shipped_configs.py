"""The DeepSpeed configurations that come with the package, to start from. Files and JSON only: no torch."""

import json
from pathlib import Path
from typing import Any

from ds_optforge.errors import ConfigError, did_you_mean

# In the repository a link to ds_configs/; in an installed package a folder with copies of its files.
FOLDER = Path(__file__).parent / "configs"


def names() -> list[str]:
    """Return the names of all configurations, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def summaries() -> list[dict[str, Any]]:
    """Return the name, rule, format of state, ZeRO stage and optimizer offload of each configuration."""
    return [_summary(name, json.loads(_path(name).read_text())) for name in names()]


def listing() -> str:
    """Return a table with a line about each configuration: its name, rule, ZeRO stage and optimizer offload."""
    rows = [("name", "rule", "ZeRO stage", "optimizer offload")]
    for each in summaries():
        rule = f"{each['rule']}, state {each['state_dtype']}" if each["state_dtype"] else each["rule"]
        rows.append((each["name"], rule, str(each["stage"]), each["offload"] or "none"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in lines)


def _summary(name: str, config: dict[str, Any]) -> dict[str, Any]:
    params, zero = config["optimizer"]["params"], config["zero_optimization"]
    offload = zero.get("offload_optimizer", {}).get("device")
    rule = {"rule": params["name"], "state_dtype": params.get("state_dtype")}
    return {"name": name, **rule, "stage": zero["stage"], "offload": offload}


def _path(name: str) -> Path:
    return FOLDER / f"{name}.json"


def write(name: str, folder: Path) -> Path:
    """Write a configuration into a folder, which is made where it is missing, and return the path of the file.

    Args:
        name: one of `names`, with or without ".json".
        folder: to write to.

    Raises:
        ConfigError: an unknown name, a folder that cannot be written to, or a file of that name in it.
    """
    name = name.removesuffix(".json")
    if name not in names():
        raise ConfigError(f"configuration: got '{name}'; {did_you_mean(name, names(), 0.6)}allowed: {', '.join(names())}")
    path = folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("x") as file:
            file.write(_path(name).read_text())
    except OSError as error:
        if isinstance(error, FileExistsError) and folder.is_dir():
            raise ConfigError(f"{path}: is there already; allowed: a folder without a file of that name") from None
        raise ConfigError(f"--out: got '{folder}' ({error.strerror}); allowed: a folder that can be written to") from None
    return path
