"""Two hosts on one machine: network namespaces joined by a bridge, each with its own address and hostname.

    with two_hosts(rate="1gbit") as (node1, node2):
        node1.run("mpirun", ...)       # reaches node2 by name; the hosts' `environment` holds what mpirun needs for it
        node2.traffic().received       # bytes that came over the link

Needs root and Debian's iproute2; `missing()` says what the machine lacks. When the block ends, processes that still run on
the hosts are killed and the hosts are removed. Their names are random, so that several users do not collide; their
addresses are fixed, because they are not in the machine's own network: only these two hosts can be reached from them.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INTERFACE = "eth0"  # the one that DeepSpeed's Open MPI launcher takes unasked
SUBNET = "10.77.0"
ADDRESSES = {"node1": f"{SUBNET}.1", "node2": f"{SUBNET}.2"}
SILENT_HOST, SILENT_ADDRESS = "node9", f"{SUBNET}.9"  # packets to it vanish
PROGRAMS = ("ip", "tc", "unshare", "bash")
NAMED_FILES = Path("/etc/netns")  # `ip netns exec NAME` shows the files of the folder NAME in /etc

# Stands in for ssh between the hosts: fails where ssh would, because the host does not answer on the network (a refused
# connection is an answer), and like ssh carries no environment over and starts in the home folder.
AGENT = """#!/usr/bin/env bash
while [[ ${1-} == -* ]]; do [[ $1 == -[op] ]] && shift; shift; done
host=$1; shift
answer=$(timeout 10 bash -c "exec 3<>/dev/tcp/$host/22" 2>&1)
[[ $answer == *"Connection refused"* ]] || { echo "connect to host $host: no answer" >&2; exit 255; }
address=$(getent ahostsv4 "$host" | head -n1 | cut -d' ' -f1)
cd
case $address in
%s
esac
"""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a network interface has counted since it was made, headers included."""

    received: int
    sent: int

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(self.received - earlier.received, self.sent - earlier.sent)


def traffic(interface: str = INTERFACE) -> Traffic:
    """Read the counters of `interface` on the host where this process runs.

    Raises:
        RuntimeError: the host has no such interface.
    """
    return _counted(Path("/proc/self/net/dev").read_text(), interface)


def _counted(table: str, interface: str) -> Traffic:
    for line in table.splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            fields = counters.split()
            return Traffic(received=int(fields[0]), sent=int(fields[8]))
    raise RuntimeError(f"no network interface {interface!r} here; there are:\n{table}")


@dataclass(frozen=True)
class Host:
    """One of the hosts. A command given to it runs in its network, under its hostname, with `environment` added."""

    name: str
    address: str
    namespace: str
    environment: Mapping[str, str]
    _started: list[subprocess.Popen[Any]] = field(default_factory=list)

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `command` to its end and return its output as text. `options` are those of subprocess.run."""
        return subprocess.run(self.command(*command), **{"capture_output": True, "text": True} | self._with_env(options))

    def start(self, *command: str, **options: Any) -> subprocess.Popen[Any]:
        """Start `command` and return at once. `options` are those of subprocess.Popen."""
        process = subprocess.Popen(self.command(*command), **self._with_env(options))
        self._started.append(process)
        return process

    def end(self) -> None:
        """Kill the processes of `start`, which may be too young to be in the network, where `_kill` looks."""
        for process in self._started:
            process.kill()

    def command(self, *command: str) -> list[str]:
        """The command line that runs `command` on this host."""
        return [*_enter(self.namespace, self.name), *command]

    def _with_env(self, options: dict[str, Any]) -> dict[str, Any]:
        return options | {"env": {**(options.get("env") or os.environ), **self.environment}}

    def traffic(self) -> Traffic:
        """Read the counters of this host's link."""
        return _counted(self.run("cat", "/proc/self/net/dev", check=True).stdout, INTERFACE)

    def processes(self) -> dict[int, str]:
        """List the processes on this host: process id and command line."""
        return _processes(self.namespace)


@functools.cache
def missing() -> str | None:
    """Return the reason why this machine cannot hold two hosts, or None where it can."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"two hosts need {', '.join(absent)} (Debian: iproute2, util-linux)"
    if os.geteuid() != 0:
        return "two hosts need root, for network namespaces"
    try:
        with two_hosts(rate="1gbit") as (node1, _):
            node1.run("true", check=True)
    except subprocess.CalledProcessError as error:
        return f"two hosts need network namespaces: `{' '.join(error.cmd)}` said {error.stderr.strip()!r}"
    return None


@contextmanager
def two_hosts(rate: str | None = None) -> Iterator[tuple[Host, Host]]:
    """Make node1 and node2, and remove them at the end. They know each other and SILENT_HOST by name.

    Args:
        rate: the speed of each direction of the link as `tc` writes it ("1gbit"); None leaves it as fast as memory.

    Raises:
        subprocess.CalledProcessError: a namespace cannot be made; ask `missing` first.
    """
    own = f"optforge-{uuid.uuid4().hex[:8]}"
    namespaces = {name: f"{own}-{name}" for name in ADDRESSES}
    with ExitStack() as cleanup:
        agent = _write_agent(Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix=own))), namespaces)
        _add_namespace(switch := f"{own}-switch", cleanup)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for name, namespace in namespaces.items():
            _add_namespace(namespace, cleanup)
            _write_names(namespace, cleanup)
            _connect(namespace, ADDRESSES[name], switch, port=name)
            if rate is not None:
                limit = ("rate", rate, "burst", "1mbit", "latency", "50ms")
                _ip("netns", "exec", namespace, "tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", *limit)
        node1, node2 = (Host(name, ADDRESSES[name], namespace, _environment(agent)) for name, namespace in namespaces.items())
        cleanup.callback(node1.end)
        cleanup.callback(node2.end)
        yield node1, node2


def _environment(agent: Path) -> dict[str, str]:
    """Variables for Open MPI and gloo on these hosts: how to log in, and which interface joins them."""
    return {
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_plm_ssh_agent": str(agent),
        "PRTE_MCA_prte_if_include": INTERFACE,
        "OMPI_MCA_pml": "ob1",
        "OMPI_MCA_btl": "tcp,self",
        "OMPI_MCA_btl_tcp_if_include": INTERFACE,
    }


def _enter(namespace: str, hostname: str) -> list[str]:
    set_name = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'
    return ["ip", "netns", "exec", namespace, "unshare", "--uts", "sh", "-c", set_name, hostname]


def _write_agent(folder: Path, namespaces: Mapping[str, str]) -> Path:
    login = 'env -i HOME="$HOME" PATH=/usr/local/bin:/usr/bin:/bin bash -c "$*"'
    cases = [
        f"{ADDRESSES[name]}) exec {shlex.join(_enter(namespace, name))} {login} ;;" for name, namespace in namespaces.items()
    ]
    agent = folder / "agent"
    agent.write_text(AGENT % "\n".join(cases))
    agent.chmod(0o755)
    return agent


def _add_namespace(namespace: str, cleanup: ExitStack) -> None:
    _ip("netns", "add", namespace)
    cleanup.callback(_ip, "netns", "delete", namespace)
    cleanup.callback(_kill, namespace)
    _ip("-n", namespace, "link", "set", "lo", "up")


def _write_names(namespace: str, cleanup: ExitStack) -> None:
    folder = NAMED_FILES / namespace
    folder.mkdir(parents=True)
    cleanup.callback(shutil.rmtree, folder)
    known = {"localhost": "127.0.0.1", **ADDRESSES, SILENT_HOST: SILENT_ADDRESS}
    (folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in known.items()))


def _connect(namespace: str, address: str, switch: str, port: str) -> None:
    """Connect the host's interface to the bridge and give it its address."""
    _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", namespace)
    _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
    _ip("-n", namespace, "address", "add", f"{address}/24", "dev", INTERFACE)
    _ip("-n", namespace, "link", "set", INTERFACE, "up")
    _ip("-n", namespace, "neighbour", "add", SILENT_ADDRESS, "lladdr", "02:00:00:00:00:09", "dev", INTERFACE)


def _processes(namespace: str) -> dict[int, str]:
    found = {}
    for process in _ip("netns", "pids", namespace).split():
        with suppress(OSError):  # gone meanwhile
            command = Path(f"/proc/{process}/cmdline").read_text()
            if command:  # a zombie has none
                found[int(process)] = command.replace("\0", " ").strip()
    return found


def _kill(namespace: str) -> None:
    """End all processes of the namespace, which exists as long as one of them."""
    while processes := _processes(namespace):
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
