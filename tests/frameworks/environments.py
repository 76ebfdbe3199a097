"""A virtual environment for each framework, in `.frameworks/` of the checkout, and launches in it.

A framework's own pins differ from those of constraints.txt. So its environment holds what `requirements-NAME.txt` lists, and
takes everything else, torch and DeepSpeed above all, from the environment that runs the tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.launch.commands import PORT_OPTIONS, port_of_a_run

ROOT = Path(__file__).resolve().parents[2]
LISTS = Path(__file__).parent
FOLDER = ROOT / ".frameworks"
LIMIT = 900  # seconds of a launch; the first one on a machine also compiles a DeepSpeed operator
LAUNCHERS = ("torchrun", "accelerate", "deepspeed")


def environment_of(name: str) -> Path:
    """The environment of a framework, made where it is missing or its list of packages has changed.

    pip installs the list as it stands (``--no-deps``): each of these frameworks asks for things that no training needs, such
    as web interfaces, and some for another torch.
    """
    wanted = f"{sys.prefix}\n{(LISTS / f'requirements-{name}.txt').read_text(encoding='utf-8')}"
    folder = FOLDER / name
    stamp = folder / "installed"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = folder / "bin" / "python"
        (packages,) = folder.glob("lib/python*/site-packages")
        # After its own packages on the path, so that those win.
        (packages / "below.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "-r", LISTS / f"requirements-{name}.txt"]
        subprocess.run(install, check=True)
        for launcher in LAUNCHERS:
            _copy_script(launcher, python)
        stamp.write_text(wanted, encoding="utf-8")
    return folder


def _copy_script(name: str, python: Path) -> None:
    """Give the environment a launcher of the one below, which starts this one's Python."""
    script = Path(sysconfig.get_path("scripts"), name)
    copy = python.with_name(name)
    if script.exists() and not copy.exists():
        copy.write_text(f"#!{python}\n{script.read_text(encoding='utf-8').partition(chr(10))[2]}", encoding="utf-8")
        copy.chmod(0o755)


def launch(name: str, command: str, folder: Path, **variables: str) -> str:
    """Run a command line in a framework's environment; return what it printed.

    Args:
        name: of the framework.
        command: for a shell; torchrun and its like get a port of their own.
        folder: in which it runs.
        variables: of its environment.

    Raises:
        AssertionError: it failed; with what it printed.
    """
    scripts = [environment_of(name) / "bin", sysconfig.get_path("scripts")]
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    quiet |= {"PYTHONFAULTHANDLER": "1"}  # a rank that aborts shows where
    path = {"PATH": os.pathsep.join([*map(str, scripts), os.environ.get("PATH", "")]), "PYTHONPATH": str(ROOT)}
    with port_of_a_run() as port:
        for program, option in PORT_OPTIONS.items():
            if command.startswith(program):
                command = command.replace(program, f"{program}{option}={port} ", 1)
        environment = inherited | quiet | path | {"MASTER_PORT": port} | variables
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
    assert done.returncode == 0, f"{command}\n{done.stdout[-10_000:]}\n{done.stderr[-20_000:]}"
    return done.stdout + done.stderr


def page(name: str) -> str:
    """The text of docs/frameworks/NAME.md."""
    return (ROOT / "docs" / "frameworks" / f"{name}.md").read_text(encoding="utf-8")


def blocks(name: str) -> dict[str, str]:
    """The blocks of code of a page that tests run, by the name in the comment above each."""
    return dict(re.findall(r"<!-- run: (\S+) -->\n```\w+\n(.*?)```", page(name), re.DOTALL))
