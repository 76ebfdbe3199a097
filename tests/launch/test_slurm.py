"""launch/slurm.sbatch on a SLURM cluster of two nodes that the test starts: real daemons, real jobs."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.hosts import Host
from tests.launch.commands import DEEPSPEED, LAUNCH_LIMIT, ROOT, TORCHRUN, Launches, Process, environment

pytestmark = [pytest.mark.two_hosts, pytest.mark.slurm]

COMMANDS = {
    "two nodes": "sbatch --nodes=2 launch/slurm.sbatch train.py --ds_config ds_configs/muon_zero2.json",
    "one node": "sbatch --cpus-per-task=2 launch/slurm.sbatch train.py --ds_config ds_configs/muon_zero3.json",
}

UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")

# No authentication and no cgroups: this cluster has one user, and lives in namespaces that hide the machine's cgroups.
CLUSTER = """
ClusterName=test
SlurmctldHost=node1
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
StateSaveLocation={folder}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmdLogFile={folder}/%n/slurmd.log
NodeName=node1,node2 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES
"""


class Cluster:
    """A running SLURM: `submit` takes an sbatch command line and waits for its job."""

    def __init__(self, hosts: tuple[Host, Host], folder: Path) -> None:
        self._head, self._output = hosts[0], folder / "job.log"
        self._environment = environment() | {"SLURM_CONF": str(folder / "slurm.conf"), "SBATCH_OUTPUT": str(self._output)}
        (folder / "slurm.conf").write_text(CLUSTER.format(folder=folder))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for host in hosts:
            (folder / host.name).mkdir()
        self.daemons = [self._start(hosts[0], "slurmctld"), *(self._start(host, "slurmd") for host in hosts)]
        self._await_controller()

    def _await_controller(self) -> None:
        """sbatch itself would give up after some seconds."""
        deadline = time.monotonic() + LAUNCH_LIMIT
        while " is UP" not in self._head.run("scontrol", "ping", env=self._environment).stdout:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def submit(self, command: str) -> Process:
        """Run the job to its end; the result has its exit status and all it wrote."""
        number = self._run(command).split()[-1]  # "Submitted batch job 1"
        deadline = time.monotonic() + LAUNCH_LIMIT
        while (state := self._state(number)) in UNFINISHED:
            assert time.monotonic() < deadline, state
            time.sleep(0.2)
        return subprocess.CompletedProcess(command, int(state != "COMPLETED"), state, self._output.read_text())

    def _state(self, number: str) -> str:
        return self._run(f"scontrol show job {number}").partition("JobState=")[2].split()[0]

    def _start(self, host: Host, daemon: str) -> subprocess.Popen[bytes]:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return host.start(daemon, "-D", cwd=ROOT, env=self._environment, **quiet)

    def _run(self, command: str) -> str:
        return self._head.run("bash", "-c", command, cwd=ROOT, env=self._environment, check=True).stdout


@pytest.fixture(scope="module")
def cluster(hosts: tuple[Host, Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    running = Cluster(hosts, tmp_path_factory.mktemp("slurm"))
    yield running
    for daemon in reversed(running.daemons):
        daemon.kill()
        daemon.wait()


@pytest.mark.parametrize(("command", "same"), [("two nodes", DEEPSPEED), ("one node", TORCHRUN)], ids=COMMANDS)
def test_the_losses_are_those_of_the_other_launchers(cluster: Cluster, launched: Launches, command: str, same: str):
    run = launched(COMMANDS[command], cluster.submit)
    assert run.losses == pytest.approx(launched(same).losses, rel=1e-5)
    assert run.summary["world_size"] == 2
