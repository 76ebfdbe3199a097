"""mpirun on one host, with and without launch/mpi.sh."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.commands import DEEPSPEED, ROOT, TORCHRUN, Launches, environment, on_this_machine

COMMANDS = {
    "mpirun": "mpirun -np 2 python train.py --ds_config ds_configs/muon_zero2.json",
    "mpi.sh": "launch/mpi.sh launch/hostfile.localhost train.py --ds_config ds_configs/muon_zero3_offload.json",
}


@pytest.fixture(autouse=True)
def root_may_run_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open MPI refuses root unless told twice; in a container there is nobody else."""
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")


@pytest.mark.promise("mpi")
def test_the_losses_of_mpirun_are_those_of_the_deepspeed_launcher(launched: Launches):
    assert launched(COMMANDS["mpirun"]).losses == pytest.approx(launched(DEEPSPEED).losses, rel=1e-5)


@pytest.mark.promise("mpi")
def test_the_losses_of_mpi_sh_are_those_of_torchrun(launched: Launches):
    """1e-3: ZeRO-3 with offload adds gradients up in another order, and rounding to bfloat16 makes more of it."""
    assert launched(COMMANDS["mpi.sh"]).losses == pytest.approx(launched(TORCHRUN).losses, rel=1e-3)


def test_both_ranks_take_part_and_one_of_them_speaks(launched: Launches):
    run = launched(COMMANDS["mpirun"])
    assert run.summary["world_size"] == 2
    assert run.process.stderr.count("ds_optforge: Muon") == 1


# ------------------------------------------------------------------------------------------- bad input


def test_missing_mpi4py_names_the_extra():
    without = "import runpy, sys; sys.modules['mpi4py'] = None; runpy.run_path('train.py', run_name='__main__')"
    process = on_this_machine(f"mpirun -np 1 python -c {shlex.quote(without)}")
    assert process.returncode != 0
    assert "mpi4py is not installed; run: pip install 'ds-optforge[mpi]'" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("hosts.txt", "needed: a hostfile, a script and its arguments; got: 'hosts.txt'"),
        ("no/such/file train.py", "hostfile 'no/such/file' is not a file that can be read"),
    ],
)
def test_mpi_sh_says_what_it_lacks(arguments: str, message: str):
    process = on_this_machine(f"launch/mpi.sh {arguments}")
    assert process.returncode == 2
    assert f"mpi.sh: error: {message}" in process.stderr


def test_missing_mpirun_names_the_extra(tmp_path: Path):
    for program in ("bash", "env"):
        (tmp_path / program).symlink_to(str(shutil.which(program)))
    command = ["launch/mpi.sh", "launch/hostfile.localhost", "train.py"]
    process = subprocess.run(command, cwd=ROOT, env=environment() | {"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert process.returncode == 2
    assert "mpirun is not on the path; run: pip install 'ds-optforge[mpi]'" in process.stderr
