"""One rank of a warm pool: runs the jobs that its pool sends, until the pool is gone.

Every job starts from the same ground: a process group of its own, the same seeds, and a process in which DeepSpeed has
forgotten the job before (see ``CleanSlate``). A case function therefore builds its engine and just returns or raises.
"""

from __future__ import annotations

import copy
import faulthandler
import functools
import gc
import os
import queue
import random
import signal
import sys
import threading
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import deepspeed
import deepspeed.comm
import deepspeed.runtime.zero.parameter_offload as zero3_hooks
import deepspeed.runtime.zero.partition_parameters as zero_init
import numpy
import torch
from deepspeed.utils import groups
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from tests.distributed.channel import READY, RESET, Failed, Returned, dump, load

COLLECTIVE_TIMEOUT = timedelta(seconds=float(os.environ.get("POOL_COLLECTIVES_S", 60)))


class CleanSlate:
    """The state of the process before the first job, and the way back to it.

    DeepSpeed is made for one engine per process. What outlives an engine, and would reach the next case:

    - ZeRO's hooks on parameters form cycles through autograd, unseen by the garbage collector: only
      ``engine.destroy()`` cuts them. It is called here for every engine that a case has left, most often by raising.
      It leaves some: of parameters that DeepSpeed has replaced, or that were frozen, and of the losses that a pipeline's
      last stage keeps. The attributes of parameters and engines hold the other end, and process groups, each with a thread
      that wakes a hundred times a second.
    - Each ZeRO-3 engine leaves its model in ``FWD_MODULE_STACK`` and, after its second step, itself in an
      ``lru_cache`` of its parameter coordinator, destroyed or not.
    - A ``zero.Init`` that was entered and never left keeps ``torch`` constructors and every ``Module.__init__`` patched.
    - Every ``zero.Init`` replaces ``torch.nn.functional.linear`` for good, and leaves settings and counts on its class.
    - DeepSpeed before 0.19 keeps the process groups that it made, and finds them in place of those of the next job.
    - Accelerate's state is shared by all accelerators of a process.

    Kept on purpose: what an import or ``register`` adds to libraries, as a module is imported only once.
    """

    def __init__(self) -> None:
        self.caches: list[functools._lru_cache_wrapper[Any]] = []
        self.modules = 0
        gc.unfreeze()  # what the process that was forked has frozen
        self._find_caches()
        self._freeze()
        self.environment = dict(os.environ)
        self.directory = os.getcwd()
        self.linear = torch.nn.functional.linear
        settings = {name: value for name, value in vars(groups).items() if not name.startswith("__")}
        self.groups = {name: copy.copy(value) for name, value in settings.items() if isinstance(value, dict | int | None)}
        self.init_settings = {name: value for name, value in vars(zero_init.Init).items() if isinstance(value, bool | int)}

    def restore(self) -> None:
        """Undo what a job left behind. The process group must still be there, and is not touched."""
        imported = len(sys.modules) > self.modules
        if imported:
            self._find_caches()
        self._close_zero_init()
        zero3_hooks.FWD_MODULE_STACK.clear()
        for cache in self.caches:
            cache.cache_clear()
        self._destroy_engines()
        vars(groups).update({name: copy.copy(value) for name, value in self.groups.items()})
        if "accelerate.state" in sys.modules:
            sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
            sys.modules["accelerate.state"].GradientState._reset_state()
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.directory)
        torch.set_default_dtype(torch.float32)
        if imported:
            self._freeze()

    def _find_caches(self) -> None:
        """Add DeepSpeed's caches in the modules that the last job imported; what is frozen is in no list of objects."""
        self.caches += [
            thing
            for thing in gc.get_objects()
            if type(thing) is functools._lru_cache_wrapper and thing.__module__.startswith("deepspeed.")
        ]

    def _freeze(self) -> None:
        """Spare every later collection the objects of imported modules: 200,000 after the first engine.

        Only after a job's engine has gone: one that is frozen is never found again, and its process groups' threads
        never rest.
        """
        gc.collect()
        gc.freeze()
        self.modules = len(sys.modules)

    def _close_zero_init(self) -> None:
        if zero_init.top_level_context is not None:
            zero_init.top_level_context.unpatch_init_and_builtins()
        zero_init.top_level_context = None
        zero_init.zero_init_context = 0
        torch.nn.functional.linear = self.linear
        for name, value in self.init_settings.items():
            setattr(zero_init.Init, name, value)

    def _destroy_engines(self) -> None:
        gc.collect()
        for thing in gc.get_objects():
            if issubclass(type(thing), deepspeed.DeepSpeedEngine):
                try:
                    thing.destroy()
                except Exception:  # an engine whose construction failed may lack anything
                    traceback.print_exc()
                vars(thing).clear()
            elif issubclass(type(thing), torch.Tensor) and isinstance(thing, torch.nn.Parameter):  # the latter alone is slow
                vars(thing).clear()
        thing = None
        gc.collect()


class Rank:
    """The loop of one rank: join a process group, run one job, answer, clean up, say ready."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.rank = int(os.environ["RANK"])
        self.world_size = int(os.environ["WORLD_SIZE"])
        self.store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=COLLECTIVE_TIMEOUT)
        self.clean_slate = CleanSlate()
        threading.Thread(target=self._read, name="pool-reader", daemon=True).start()

    def _read(self) -> None:
        """Pass messages on; end with the pool, whatever the main thread hangs in."""
        try:
            while True:
                self.inbox.put(self.connection.recv_bytes())
        except (EOFError, OSError):
            os.killpg(os.getpid(), signal.SIGKILL)

    def work(self) -> None:
        """Serve jobs for ever."""
        number = 0
        while True:
            self._join_process_group(number)
            self.connection.send_bytes(READY)
            self.connection.send_bytes(self._answer(self.inbox.get()))
            assert self.inbox.get() == RESET
            self.clean_slate.restore()
            deepspeed.comm.destroy_process_group()
            number += 1

    def _join_process_group(self, number: int) -> None:
        """A process group for one job: no collective of a failed job can meet one of the next."""
        torch.distributed.init_process_group(
            "gloo",
            store=PrefixStore(f"job{number}", self.store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
        deepspeed.init_distributed("gloo", timeout=COLLECTIVE_TIMEOUT)
        torch.distributed.barrier()

    def _answer(self, job: bytes) -> bytes:
        try:
            function, arguments, keywords = load(job)
            random.seed(0)
            numpy.random.seed(0)
            torch.manual_seed(0)
            return dump(Returned(function(*arguments, **keywords)))
        except BaseException as error:  # also SystemExit: a rank outlives its jobs
            return dump(Failed(type(error).__name__, str(error), traceback.format_exc()))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def serve(connection: Connection) -> None:
    """Be a rank of the pool at the other end, in a process that was forked for it."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    # Only tensor-parallel inference uses this operator. Building it takes half a minute on first use, and a rank that
    # is killed while it builds leaves a lock behind that blocks every later process.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    Rank(connection).work()
