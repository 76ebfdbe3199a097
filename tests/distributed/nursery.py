"""Where ranks come from: a process that has imported torch and DeepSpeed, of which each rank is a fork.

Starting a rank so takes the time of a fork. There is one such process for each number that a rank can have: the ranks of a
pool come from different ones, as under a launcher, and differ in what Python draws for a process, such as the order of sets.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import pickle
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

START_TIMEOUT_S = 600.0
UNKNOWN = -1  # the status of a rank whose nursery is gone
REQUEST_BYTES = 2**17
# What the first engines and checkpoints import. bitsandbytes is an extra.
IMPORTED = ("torch._dynamo", "torch.distributed.checkpoint", "bitsandbytes")


@dataclass
class Child:
    """A rank that was forked.

    Attributes:
        pid: of the process, and of the group that it leads with whatever it starts.
        returncode: as that of `subprocess.Popen`, once `wait` has been true.
    """

    pid: int
    _status: Connection
    returncode: int | None = field(default=None, init=False)

    def wait(self, timeout_s: float | None) -> bool:
        """Whether the process has ended, or does so within that time."""
        if self.returncode is None and self._status.poll(timeout_s):
            try:
                self.returncode = self._status.recv()
            except EOFError:
                self.returncode = UNKNOWN
            self._status.close()
        return self.returncode is not None


class Nursery:
    """The process of one rank number. It ends when this object, or the process that holds it, is gone."""

    def __init__(self, python: str, environment: Mapping[str, str], log: Path) -> None:
        self._socket, other_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(START_TIMEOUT_S)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [python, "-m", "tests.distributed.nursery", str(other_end.fileno())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[other_end.fileno()],
                start_new_session=True,  # Ctrl-C reaches the pool alone
            )
        other_end.close()

    @property
    def pid(self) -> int:
        """Of the process that is forked."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can have more children."""
        return self._process.poll() is None

    def bear(self, environment: Mapping[str, str], connection: Connection, log: Path) -> Child:
        """A new rank with this environment and connection. Raises OSError where the imports fail."""
        status, tell = Pipe(duplex=False)
        with log.open("ab") as output:
            given = [connection.fileno(), output.fileno(), tell.fileno()]
            socket.send_fds(self._socket, [pickle.dumps(dict(environment))], given)
        tell.close()
        pid = self._socket.recv(REQUEST_BYTES)
        if not pid:
            raise ConnectionResetError(f"the process that ranks are forked of has ended:\n{log.read_text(errors='replace')}")
        return Child(int(pid), status)


_NURSERIES: dict[tuple[str, int], Nursery] = {}


def nursery(python: str, rank: int, environment: Mapping[str, str], log: Path) -> Nursery:
    """The nursery of that Python and rank number: it starts when first asked for, and lasts as long as this process."""
    if (python, rank) not in _NURSERIES or not _NURSERIES[python, rank].alive:
        _NURSERIES[python, rank] = Nursery(python, environment, log)
    return _NURSERIES[python, rank]


def nursery_pids() -> list[int]:
    """All that have been started."""
    return [started.pid for started in _NURSERIES.values()]


# ------------------------------------------------------------------------------------------- the process itself


class _Server:
    """Forks on request, and tells how its children end."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._running: dict[int, Connection] = {}  # by the descriptor of the process: where its status is awaited
        self._ended: list[int] = []

    def serve(self) -> None:
        """Until the other end is closed."""
        while True:
            for ready in wait([self._requests, *self._running]):
                if ready is not self._requests:
                    self._tell(ready)  # type: ignore[arg-type]
                elif not self._fork():
                    return

    def _tell(self, process: int) -> None:
        """Report a child's end. Its number stays taken until the next fork: the pool may still signal the group."""
        ended = os.waitid(os.P_PIDFD, process, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        status = self._running.pop(process)
        status.send(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)
        status.close()
        self._ended.append(process)

    def _fork(self) -> bool:
        """False where nobody is left to ask."""
        for process in self._ended:
            os.waitid(os.P_PIDFD, process, os.WEXITED)
            os.close(process)
        self._ended.clear()
        request, descriptors, *_ = socket.recv_fds(self._requests, REQUEST_BYTES, 3)
        if not request:
            return False
        connection, log, status = descriptors
        pid = os.fork()
        if pid == 0:
            os.close(status)
            self._become_rank(pickle.loads(request), Connection(connection), log)
        os.close(connection)
        os.close(log)
        self._running[os.pidfd_open(pid)] = Connection(status, readable=False)
        self._requests.send(str(pid).encode())
        return True

    def _become_rank(self, environment: dict[str, str], connection: Connection, log: int) -> None:
        """Never returns."""
        try:
            self._requests.close()
            for process, status in self._running.items():
                os.close(process)
                status.close()
            os.setsid()  # what a rank starts ends with it
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            os.environ.clear()
            os.environ.update(environment)
            importlib.import_module("tests.distributed.worker").serve(connection)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(1)


def main() -> None:
    """Started with the number of an open file descriptor."""
    gc.disable()  # a fifth of the time that these imports take, and nothing of what they make is ever freed
    importlib.import_module("tests.distributed.worker")
    for name in IMPORTED:
        if importlib.util.find_spec(name):
            importlib.import_module(name)
    gc.enable()
    gc.freeze()
    _Server(socket.socket(fileno=int(sys.argv[1]))).serve()


if __name__ == "__main__":
    main()
