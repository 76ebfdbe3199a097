"""A number of nodes that may change: one of two is lost, and the other goes on alone, within a time that its user has set."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.launch.commands import LAUNCH_LIMIT, ROOT, environment, port_of_a_run
from tests.launch.test_faults import EVERY, STEPS, Job

# A node that is silent for 2 x 3 s is lost (5 x 3 s where nothing is said), and a round begins 3 s (30 s) after the last node
# has come. What remains of the time is that of a launch.
TIMES = "keep_alive_interval=2,keep_alive_max_attempt=3,last_call_timeout=3"
# As in test_faults.py, of a run on the same ranks; the ranks of one node add up the gradients in another order.
ACROSS_RANKS = 2e-2


@contextmanager
def agent(job: Job, port: str, log: Path, **fault: str) -> Iterator[subprocess.Popen[bytes]]:
    """One node: a torchrun with one rank, which takes a second node or goes on without."""
    rendezvous = f"--rdzv-backend=c10d --rdzv-endpoint=localhost:{port} --rdzv-id=soak --rdzv-conf={TIMES}"
    torchrun = f"torchrun --nnodes=1:2 --nproc-per-node=1 --max-restarts=1 {rendezvous}"
    command = f"exec {torchrun} -m tests.launch.faulty {job.small}"
    variables = environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **fault}
    with log.open("wb") as output:
        process = subprocess.Popen(["bash", "-c", command], cwd=ROOT, env=variables, stdout=output, stderr=output)
        try:
            yield process
        finally:
            process.terminate()  # torchrun passes it on to its ranks
            process.wait(LAUNCH_LIMIT)


def wait_until_open(port: str, process: subprocess.Popen[bytes]) -> None:
    """Until the first node keeps the rendezvous, which would end with it."""
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", int(port))) == 0:
                return
        time.sleep(0.1)


@pytest.mark.slow
def test_when_a_node_is_lost_the_other_goes_on_from_the_newest_checkpoint(tmp_path: Path, text: Path) -> None:
    """The node that does not keep the rendezvous loses its launcher and its rank in the tenth step.

    (With the one that keeps it the store is lost, and with it the job: torchrun then ends on the other node too.)
    """
    both, job = Job(tmp_path / "both", text), Job(tmp_path / "job", text)
    undisturbed = both.launch()
    assert undisturbed.returncode == 0, undisturbed.stderr

    logs = [tmp_path / "kept.log", tmp_path / "lost.log"]
    with port_of_a_run() as port, ExitStack() as stack:
        kept = stack.enter_context(agent(job, port, logs[0]))
        wait_until_open(port, kept)
        lost = stack.enter_context(
            agent(job, port, logs[1], NODE_DIES_IN=f"runtime/engine.py:_take_model_step:{2 * EVERY + 2}")
        )
        assert lost.wait(LAUNCH_LIMIT) == -9, logs[1].read_text()
        assert job.checkpoints == [EVERY, 2 * EVERY]
        assert kept.wait(LAUNCH_LIMIT) == 0, logs[0].read_text()

    assert len(job.losses) == STEPS
    assert job.losses[: 2 * EVERY] == both.losses[: 2 * EVERY]
    assert job.losses == pytest.approx(both.losses, rel=ACROSS_RANKS)
    log = logs[0].read_text()
    assert "by peer [127.0.0.1]" in log  # all that the rank which is left can know of the other one
    assert "failed (exitcode: 1) local_rank: 0" in log
