"""Processes that tests have started, by their process ids; and how they are made to die at a place."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any


def wait_until_gone(pids: Iterable[int], timeout_s: float = 60.0) -> set[int]:
    """The processes still running when the time is up; the dead may await their parent's notice."""
    deadline = time.monotonic() + timeout_s
    running = set(pids)
    while running and time.monotonic() < deadline:
        running = {pid for pid in running if _runs(pid)}
        time.sleep(0.05)
    return running


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def die_while_saving(checkpoint: Path) -> None:
    """Prepare this process for SIGKILL between writing its file of that checkpoint and saying so.

    That is when it opens the file again, for its checksum.
    """

    def die(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and f"{checkpoint}.incomplete/" in str(arguments[0]) and arguments[1] == "r":
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)


def at_call(file: str, function: str, count: int, act: Callable[[], object]) -> None:
    """Act at a call of a function, the first one being 1, in this thread."""
    left = count

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal left
        code = frame.f_code
        if event == "call" and code.co_name == function and code.co_filename.endswith("/" + file):
            left -= 1
            if not left:
                act()

    sys.setprofile(watch)
