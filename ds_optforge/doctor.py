"""`ds-optforge doctor`: versions, compilers, backends and a small run on two ranks, as one report to paste."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch
import torch.distributed as dist

from ds_optforge import __version__
from ds_optforge.testing import check_rule
from ds_optforge.zero.versions import SUPPORTED_DEEPSPEED, found_deepspeed, is_supported

Verdict = Literal["ok", "problem", "-"]
_OPTIONAL = ("accelerate", "transformers", "peft", "trl", "bitsandbytes", "mpi4py", "safetensors", "numpy", "pydantic")
_SMOKE_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: versions, compilers, backends or run.
        name: what was looked at.
        found: what is there.
        verdict: "problem" if training needs something else; "-" if nothing depends on it.
    """

    topic: str
    name: str
    found: str
    verdict: Verdict = "-"

    def plain(self) -> dict[str, str]:
        """Return the fields by name."""
        return asdict(self)


def examine(run: bool = True) -> list[Finding]:
    """Look at this installation and machine.

    Args:
        run: whether to train a small model on ZeRO-1, 2 and 3 with two ranks, too; it takes a quarter of a minute.
    """
    findings = [*_versions(), *_compilers(), *_backends()]
    return [*findings, _smoke_test()] if run else findings


def report(findings: list[Finding]) -> str:
    """Return the findings as a table in Markdown."""
    rows = [f"| {each.topic} | {each.name} | {each.found} | {each.verdict} |" for each in findings]
    return "\n".join(["| | | found | |", "| --- | --- | --- | --- |", *rows]) + "\n"


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "ds_optforge", __version__)
    yield Finding("versions", "Python", platform.python_version())
    yield Finding("versions", "system", f"{platform.system()} {platform.release()}, {os.cpu_count()} cores")
    yield Finding("versions", "torch", torch.__version__, "ok")
    deepspeed = found_deepspeed()
    fits = is_supported(deepspeed)
    yield Finding("versions", "deepspeed", deepspeed + ("" if fits else f"; allowed: {SUPPORTED_DEEPSPEED}"), _verdict(fits))
    for package in _OPTIONAL:
        try:
            yield Finding("versions", package, version(package))
        except PackageNotFoundError:
            yield Finding("versions", package, "not installed")


def _compilers() -> Iterator[Finding]:
    """DeepSpeed builds operators of its own where there is no GPU: it needs both."""
    needed = not torch.cuda.is_available()
    beside_python = os.path.join(os.path.dirname(sys.executable), "ninja")
    for name, path in (("g++", shutil.which("g++")), ("ninja", shutil.which("ninja") or shutil.which(beside_python))):
        found = _line([path, "--version"]) if path else "not on the path"
        yield Finding("compilers", name, found, _verdict(path is not None) if needed else "-")
    nvcc = shutil.which("nvcc")
    yield Finding("compilers", "nvcc", _line([nvcc, "--version"], "release") if nvcc else "not on the path")


def _backends() -> Iterator[Finding]:
    available = [name for name in ("nccl", "gloo", "mpi") if getattr(dist, f"is_{name}_available")()]
    yield Finding("backends", "torch.distributed", ", ".join(available), _verdict(bool({"nccl", "gloo"} & {*available})))
    count = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
    yield Finding("backends", "CUDA devices", f"{count} ({names})" if count else "none")
    yield Finding("backends", "mpirun", shutil.which("mpirun") or "not on the path")


def _smoke_test() -> Finding:
    try:
        check_rule("muon", ranks=2, checks=["parity"], timeout_s=_SMOKE_TIMEOUT_S)
    except AssertionError as error:
        return Finding("run", "muon on two ranks", " ".join(str(error).split()), "problem")
    return Finding("run", "muon on two ranks", "ZeRO-0 to 3 train as one process", "ok")


def _verdict(fine: bool) -> Verdict:
    return "ok" if fine else "problem"


def _line(command: list[str], word: str = "") -> str:
    """The first line of what a command prints with this word in it."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return next((line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip() and word in line), "?")
