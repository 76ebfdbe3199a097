"""Jobs whose exchanges are carried out as late as NCCL may, within ``wait()``; or go through buffers as with CPU offload."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from ds_optforge.zero import exchange
from tests.distributed import cases


class Deferred:
    """In place of ``all_to_all_single``: what is to arrive is NaN until it is waited for, and what is sent must not change."""

    def __init__(self) -> None:
        self.waiting: list[_Work] = []
        self.most = self.done = 0

    def all_to_all_single(
        self, out: Tensor, into: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], group: Any, async_op: bool
    ) -> "_Work":
        assert async_op
        out.fill_(float("nan"))
        self.waiting.append(_Work(self, (out, into, out_splits, in_splits), group, into.clone()))
        self.most = max(self.most, len(self.waiting))
        return self.waiting[-1]


class _Work:
    def __init__(self, deferred: Deferred, arguments: tuple[Any, ...], group: Any, sent: Tensor) -> None:
        self._deferred, self._arguments, self._group, self._sent = deferred, arguments, group, sent

    def wait(self) -> None:
        while self in self._deferred.waiting:
            self._deferred.waiting.pop(0).run()

    def run(self) -> None:
        into = self._arguments[1]
        assert torch.equal(into.view(torch.uint8), self._sent.view(torch.uint8))
        dist.all_to_all_single(*self._arguments, group=self._group)
        self._deferred.done += 1


@contextmanager
def deferring() -> Iterator[Deferred]:
    deferred = Deferred()
    names = {name: getattr(dist, name) for name in ("all_reduce", "all_gather_object", "ReduceOp", "Work", "ProcessGroup")}
    with mock.patch.object(exchange, "dist", SimpleNamespace(all_to_all_single=deferred.all_to_all_single, **names)):
        yield deferred


def train_deferred(config: dict[str, Any]) -> tuple[dict[str, Any], int, int]:
    """`cases.train`, the most exchanges that were under way, and how many there were."""
    with deferring() as deferred:
        return cases.train(config), deferred.most, deferred.done


def train_staged(config: dict[str, Any]) -> dict[str, Any]:
    """`cases.train` as if the slices were on another device than the weights."""
    with mock.patch.object(exchange, "is_staged", return_value=True):
        found: dict[str, Any] = cases.train(config)
    return found
