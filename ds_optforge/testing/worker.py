"""One rank of `check_rule`: joins the others, runs the checks one after the other, and writes down what it finds.

Its folder holds ``job.json``; the rank appends lines to ``rank<n>.jsonl``: {"begun": check}, {"failed": [...]}, and
{"broken": traceback} before it ends with status 1.
"""

import faulthandler
import importlib
import importlib.util
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from ds_optforge.rules import rule_settings
from ds_optforge.testing.launch import IN_RANK
from ds_optforge.testing.suite import CheckFailure, run_check

_COLLECTIVE_TIMEOUT = timedelta(seconds=120)
_SCRIPT = "ds_optforge_testing_script"  # the name of a script that is imported


def main() -> int:
    """The rank's exit status."""
    faulthandler.enable()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = Path(os.environ[IN_RANK])
    rank = int(os.environ["RANK"])
    with (folder / f"rank{rank}.jsonl").open("a") as file:

        def tell(**line: Any) -> None:
            print(json.dumps(line), file=file, flush=True)

        try:
            job = json.loads((folder / "job.json").read_text())
            load_rule(job)
            _join(folder, rank, int(os.environ["WORLD_SIZE"]))
            for check in job["checks"]:
                tell(begun=check)
                try:
                    run_check(check, job["rule"], job["params"])
                except CheckFailure as failure:
                    tell(failed=str(failure).splitlines())
            dist.barrier()
        except BaseException:
            tell(broken=traceback.format_exc().rstrip())
            return 1
    return 0


def load_rule(job: Mapping[str, Any]) -> None:
    """Import what registers the rule, if nothing has. Raises RuntimeError where that does not register it."""
    if rule_settings(job["rule"]) is None and job["module"]:
        try:
            importlib.import_module(job["module"])
        except ModuleNotFoundError as error:
            if not f"{job['module']}.".startswith(f"{error.name}."):
                raise
    if rule_settings(job["rule"]) is None and job["file"]:
        _import_file(job["module"] or _SCRIPT, job["file"])
    if rule_settings(job["rule"]) is None:
        raise RuntimeError(
            f"importing {job['module'] or job['file']} in a rank registers no rule '{job['rule']}'; allowed: @register_rule at "
            "the top level of a module"
        )


def _import_file(name: str, file: str) -> None:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except SystemExit:  # a script's end
        traceback.print_exc()


def _join(folder: Path, rank: int, world: int) -> None:
    """A process group on the devices that there are: gloo where ranks have none, or share one."""
    accelerator = deepspeed.get_accelerator()
    backend = "gloo"
    if accelerator.device_name() != "cpu":
        devices = accelerator.device_count()
        backend = accelerator.communication_backend_name() if devices >= world else "gloo"
        os.environ["LOCAL_RANK"] = str(rank % devices)
        accelerator.set_device(rank % devices)
        torch.backends.cudnn.deterministic = True
    torch.set_num_threads(1)
    # Only tensor-parallel inference uses this operator, which takes half a minute to build.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    store = f"file://{folder}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world, timeout=_COLLECTIVE_TIMEOUT)
    deepspeed.init_distributed(backend, timeout=_COLLECTIVE_TIMEOUT)


def _end_with_parent() -> None:
    """End, whatever the main thread hangs in, once the process that started this one is gone."""
    sys.stdin.buffer.read()
    os.killpg(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a collective that another rank has left would keep its thread waiting
