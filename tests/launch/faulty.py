"""train.py, with a fault on one of its ranks: at a place, so that no test depends on a time.

STOP_AFTER=step_00000008   once that checkpoint is complete, rank 0 asks the launcher to stop, and is asked itself
DIE_IN=step_00000016       SIGKILL of rank 1 before that checkpoint is complete
DIE_IN=optimizer.py:step:9 SIGKILL of rank 1 at the ninth call of that function
NODE_DIES_IN=optimizer.py:step:9 SIGKILL of the launcher that has started this rank, and of all its ranks, at that call

DIE_IN may have several, with commas between: one for each time that torchrun has started the ranks.
"""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import psutil

from tests.processes import at_call, die_while_saving


def stop(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "os.rename" and str(arguments[1]).endswith("/" + os.environ["STOP_AFTER"]):
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell)  # gets a byte with each signal that arrives
        os.kill(os.getppid(), signal.SIGTERM)
        os.read(told, 1)


def die_in(fault: str) -> None:
    match fault.split(":"):
        case [file, function, count]:
            at_call(file, function, int(count), lambda: os.kill(os.getpid(), signal.SIGKILL))
        case [checkpoint] if checkpoint:
            die_while_saving(Path(checkpoint))


def node_dies() -> None:
    launcher = psutil.Process(os.getppid())
    for process in [launcher, *launcher.children()]:  # this one too
        process.kill()


if "STOP_AFTER" in os.environ and os.environ["RANK"] == "0":
    sys.addaudithook(stop)
if "DIE_IN" in os.environ and os.environ["RANK"] == "1":
    faults = dict(enumerate(os.environ["DIE_IN"].split(",")))
    die_in(faults.get(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), ""))
if "NODE_DIES_IN" in os.environ:
    file, function, count = os.environ["NODE_DIES_IN"].split(":")
    at_call(file, function, int(count), node_dies)
runpy.run_path("train.py", run_name="__main__")
