"""What the calls of an optimizer's ``step()`` run and hold: operators and bytes, never times."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PATIENCE_S = 5.0


class StepTrace(TorchDispatchMode):
    """One call.

    (torch.profiler counts the same bytes, but for the buffers of collectives: a thread of the process group frees them,
    which it does not see.)

    That thread may come to free a buffer only some time after its collective was waited for. So the first time that more
    than ``allowed`` bytes are alive, they get time to become fewer.

    Attributes:
        operators: the names of the operators that ran.
        peak: the most bytes of new tensors that were alive at a time.
    """

    def __init__(self, allowed: int) -> None:
        super().__init__()
        self._allowed = allowed
        self.operators: list[str] = []
        self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        self.operators.append(func.name().removeprefix("aten::").partition(".")[0])
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if (reference := StorageWeakRef(storage)) not in given:
                self._alive[reference] = storage.nbytes()
        alive = self._count_alive()
        deadline = time.monotonic() + (PATIENCE_S if self.peak <= self._allowed else 0)
        while alive > self._allowed and time.monotonic() < deadline:
            time.sleep(0.001)
            alive = self._count_alive()
        self.peak = max(self.peak, alive)
        return result

    def _count_alive(self) -> int:
        self._alive = {reference: size for reference, size in self._alive.items() if not reference.expired()}
        return sum(self._alive.values())


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@contextmanager
def traced(optimizer: torch.optim.Optimizer, allowed: int) -> Iterator[list[StepTrace]]:
    """A list that gets a trace of each call of ``optimizer.step()``, and of nothing around it.

    Args:
        allowed: see `StepTrace`.
    """
    traces: list[StepTrace] = []
    call = ExitStack()
    before = optimizer.register_step_pre_hook(lambda *_: traces.append(call.enter_context(StepTrace(allowed))))
    after = optimizer.register_step_post_hook(lambda *_: call.close())
    try:
        yield traces
    finally:
        before.remove()
        after.remove()
