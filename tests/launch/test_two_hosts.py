"""Two hosts with their own addresses and hostnames: launch/mpi.sh, `deepspeed --hostfile`, and a host that does not answer.

The commands name node1 and node2 as launch/hostfile.example does; they run on node1, `--no_ssh` on each host.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.hosts import NAMED_FILES, SILENT_HOST, Host, two_hosts
from tests.launch.commands import DEEPSPEED, LAUNCH_LIMIT, ROOT, TORCHRUN, Launches, Process, environment

pytestmark = pytest.mark.two_hosts

HOSTFILE = "launch/hostfile.example"
COMMANDS = {
    "mpi.sh": f"launch/mpi.sh {HOSTFILE} train.py --ds_config ds_configs/muon_zero3.json",
    "deepspeed, Open MPI": f"deepspeed --hostfile {HOSTFILE} --launcher openmpi --no_ssh_check --master_addr node1 "
    '--launcher_args "--bind-to none -x PATH" train.py --ds_config ds_configs/muon_zero2_offload.json',
    "deepspeed, no ssh": f"deepspeed --hostfile {HOSTFILE} --no_ssh --node_rank 0 --master_addr node1 "
    "train.py --ds_config ds_configs/muon_zero2.json",
}
UNREACHABLE_LIMIT = 120  # seconds
MODEL_BYTES = 4 * 857_216  # the tiny GPT's weights in fp32

Hosts = tuple[Host, Host]


def on_node1(hosts: Hosts, command: str, limit: int = LAUNCH_LIMIT) -> Process:
    return hosts[0].run("bash", "-c", command, cwd=ROOT, env=environment(), timeout=limit)


def on_both(hosts: Hosts, command: str) -> Process:
    """Run the command on node1, and with the next --node_rank on node2."""
    second = command.replace("--node_rank 0", "--node_rank 1")
    with hosts[1].start("bash", "-c", second, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL) as other:
        process = on_node1(hosts, command)
        assert other.wait(LAUNCH_LIMIT) == 0
    return process


@pytest.mark.promise("mpi")
@pytest.mark.parametrize(
    ("command", "runner", "same"),
    [("mpi.sh", on_node1, TORCHRUN), ("deepspeed, Open MPI", on_node1, DEEPSPEED), ("deepspeed, no ssh", on_both, DEEPSPEED)],
    ids=COMMANDS,
)
def test_the_losses_are_those_of_one_host(hosts: Hosts, launched: Launches, command: str, runner, same: str):
    before = hosts[1].traffic()
    run = launched(COMMANDS[command], lambda line: runner(hosts, line))
    over_the_link = hosts[1].traffic() - before
    assert run.losses == pytest.approx(launched(same).losses, rel=1e-5)
    assert run.summary["world_size"] == 2
    assert min(over_the_link.sent, over_the_link.received) > MODEL_BYTES  # so the ranks really were on both hosts
    assert (hosts[0].processes(), hosts[1].processes()) == ({}, {})


@pytest.mark.skipif(shutil.which("ssh") is None, reason="needs an ssh client")
def test_a_host_that_does_not_answer_is_named_and_nothing_goes_on(hosts: Hosts, tmp_path: Path):
    """Through ssh itself, which left alone would wait for more than the limit."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(f"{hosts[0].name} slots=1\n{SILENT_HOST} slots=1\n")
    command = f"unset PRTE_MCA_plm_ssh_agent; launch/mpi.sh {shlex.quote(str(hostfile))} train.py"
    process = on_node1(hosts, command, UNREACHABLE_LIMIT)
    assert process.returncode != 0
    assert SILENT_HOST in process.stdout + process.stderr
    assert (hosts[0].processes(), hosts[1].processes()) == ({}, {})


def test_hosts_and_what_runs_on_them_are_gone_after_an_error():
    started: list[tuple[Host, subprocess.Popen[bytes]]] = []

    def fail() -> None:
        with two_hosts(rate="1gbit") as both:
            started.extend((host, host.start("sleep", "infinity")) for host in both)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    for host, process in started:
        assert process.wait(timeout=10) != 0
        assert host.namespace not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
        assert not (NAMED_FILES / host.namespace).exists()
