"""Tries this checkout with several releases of DeepSpeed: `make test-versions`, or `python tests/versions.py 0.17.6 0.19.4`.

Each release is built into `.versions/` of the checkout, beside the environment and not in it, and runs what is in
tests/distributed/versions.py. At the end there is a table; the exit status is 1 if a cell is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".versions"
INSTALLED = version("deepspeed")
# The oldest of the range, one in the middle, and the newest, which constraints.txt pins.
CHOSEN = ("0.16.9", "0.17.6", INSTALLED)

Results = dict[str, dict[str, dict[str, Any]]]  # by release, then by cell


def built(release: str) -> Path | None:
    """The folder into which a release is built; None for the one of the environment.

    Nothing is compiled, and nothing that it needs is installed: the environment has that.
    """
    if release == INSTALLED:
        return None
    folder = FOLDER / f"deepspeed-{release}"
    if not (folder / "deepspeed").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "--no-deps"]
        environment = os.environ | {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
        subprocess.run([*command, "--no-build-isolation", f"deepspeed=={release}"], env=environment, check=True)
    return folder


def tried(release: str, wanted: str) -> dict[str, dict[str, Any]]:
    """The results of one release by cell, shown as they come."""
    folder = built(release)
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if folder is not None:  # operators that it compiles on first use are its own
        path.insert(0, str(folder))
        environment["TORCH_EXTENSIONS_DIR"] = str(FOLDER / f"extensions-{release}")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    command = [sys.executable, "-m", "tests.distributed.versions", wanted]
    results: dict[str, dict[str, Any]] = {}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                result = json.loads(line)
                results[result["cell"]] = result
                print(f"{time.strftime('%H:%M:%S')} DeepSpeed {release}, {result['cell']}: {text_of(result)}", flush=True)
    if process.returncode:
        raise SystemExit(f"DeepSpeed {release}: the selection ended with status {process.returncode}")
    return results


def text_of(result: dict[str, Any]) -> str:
    """A cell of the table."""
    if result["error"] is None:
        return "fails, AdamW too" if result["verdict"] == "DeepSpeed" else str(result["verdict"])
    number = f" ({result['error']:.0e})" if result["error"] else ""
    return f"{result['verdict']}{number}"


def table(results: Results) -> str:
    """A row per cell and a column per release, then every message once with where it came from."""
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    lines = ["| DeepSpeed | " + " | ".join(results) + " |", "| --- |" + " --- |" * len(results)]
    for name in names:
        lines.append(
            f"| {name} | " + " | ".join(text_of(found[name]) if name in found else "" for found in results.values()) + " |"
        )
    said: dict[str, list[str]] = {}
    for release, found in results.items():
        for name, result in found.items():
            if result["message"]:
                said.setdefault(result["message"].partition("\n")[0], []).append(f"{release}: {name}")
    return "\n".join(lines + [f"\n{message}\n  ({'; '.join(places)})" for message, places in said.items()])


def main() -> int:
    """Try the releases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("releases", nargs="*", default=CHOSEN, help=f"of DeepSpeed; {' '.join(CHOSEN)} without any")
    parser.add_argument("--cells", default="", help="only those whose name holds this text")
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    results = {release: tried(release, arguments.cells) for release in arguments.releases}
    (FOLDER / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"\ntorch {version('torch')}, Python {sys.version.partition(' ')[0]}\n\n{table(results)}")
    wrong = [(release, name) for release, found in results.items() for name, r in found.items() if r["verdict"] == "wrong"]
    for release, name in wrong:
        print(f"\nwrong: DeepSpeed {release}, {name}\n{results[release][name]['message']}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
