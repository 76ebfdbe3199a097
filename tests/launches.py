"""Counts, on the meta device, what an accelerator would do: kernel launches, waits of the host, copies, allocations, views.

The counts are those of CUDA by PyTorch's own rules (ATen/native/cuda: MultiTensorApply.cuh, ForeachUtils.h); no CUDA is needed,
and none has confirmed them yet. A tensor on ``meta`` stands for one on the accelerator, one on the CPU for itself.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACKAGE = "/ds_optforge/"

CHUNK = 65536  # elements that a block of a foreach kernel processes
BLOCKS = 320  # of one launch
TENSORS = (110, 64, 48, 36, 30)  # of one launch, by the number of lists; CUDA 13 has seven times as many of both

# These allocate and launch nothing.
ALLOCATING = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
# A stride or a device is asked for, or an operator does nothing but to call another one that is counted.
FREE = ("_reshape_alias", "detach", "alias", *ALLOCATING)


@dataclass(frozen=True)
class Op:
    """One operator on the accelerator.

    Attributes:
        name: of the operator, without namespace and overload.
        place: "file:line" of the package that called it.
        launches: kernels.
        waits: times that the host waits for the accelerator.
        copies: between the host and the accelerator.
        views: whether it only makes views; a call that makes many counts once, as it costs little more.
        tensors: views or new tensors that it makes.
        allocations: new storages.
        slow: whether it is a foreach operator that leaves the fast route, and launches for every tensor.
    """

    name: str
    place: str
    launches: int = 0
    waits: int = 0
    copies: int = 0
    views: bool = False
    tensors: int = 0
    allocations: int = 0
    slow: bool = False


class Launches(TorchDispatchMode):
    """Counter of what runs inside of it.

    Operators without a tensor on ``meta`` are the host's own and run as they are.

    Attributes:
        ops: the operators so far.

    Raises:
        AssertionError: an operator that mixes the devices in a way that CUDA refuses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self._made = _FromValues(self.ops)

    def __enter__(self) -> "Launches":
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    @property
    def launches(self) -> int:
        return sum(op.launches for op in self.ops)

    @property
    def waits(self) -> int:
        return sum(op.waits for op in self.ops)

    @property
    def copies(self) -> int:
        return sum(op.copies for op in self.ops)

    @property
    def views(self) -> int:
        return sum(op.views for op in self.ops)

    @property
    def allocations(self) -> int:
        return sum(op.allocations for op in self.ops)

    @property
    def slow(self) -> list[Op]:
        return [op for op in self.ops if op.slow]

    def places(self, what: str = "launches") -> Counter[str]:
        """By "operator file:line", how many ``launches`` (``waits``, ``views``, ...) there were."""
        found: Counter[str] = Counter()
        for op in self.ops:
            found[f"{op.name} {op.place}"] += int(getattr(op, what))
        return +found

    def clear(self) -> None:
        self.ops.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        onto = kwargs.get("device")
        if not any(map(_is_far, given)) and (onto is None or torch.device(onto).type != "meta"):
            return func(*args, **kwargs)
        name = func.name().rpartition("::")[2].partition(".")[0]
        call = _Call(func, name, args, kwargs, given)
        self.ops.append(call.counted(_place()))
        return call.run()


class _FromValues(TorchFunctionMode):
    """torch.tensor and its like, which copy values of the host to the accelerator without an operator that dispatches."""

    def __init__(self, ops: list[Op]) -> None:
        super().__init__()
        self._ops = ops

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and _is_far(made):
            self._ops.append(Op(func.__name__, _place(), waits=1, copies=1, allocations=1))
        return made


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _is_far(tensor: Tensor) -> bool:
    return tensor.device.type == "meta"


def _place() -> str:
    frame = sys._getframe(2)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if PACKAGE in file:
            return f"{file.rpartition(PACKAGE)[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


@dataclass
class _Call:
    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: list[Tensor]

    def run(self) -> Any:
        """Run on ``meta``; what the host would have to wait for is made up."""
        if self.name == "_local_scalar_dense":
            return 0
        if self.name == "equal":
            return True
        if self.name == "nonzero":
            return torch.empty(0, self.args[0].ndim, dtype=torch.long, device="meta")
        if self.name == "_to_copy" and self._crosses:
            towards = torch.device(self.kwargs["device"])
            dtype = self.kwargs.get("dtype") or self.args[0].dtype
            return torch.zeros(self.args[0].shape, dtype=dtype, device=towards)
        if self.name == "copy_" and self._crosses:
            return self.args[0] if _is_far(self.args[0]) else self.args[0].zero_()
        if self.name == "_foreach_copy_" and self._crosses:
            return None
        return self.func(*self.args, **self.kwargs)

    def counted(self, place: str) -> Op:
        if self._crosses:
            return self._crossing(place)
        name = self.name
        if name in ("_local_scalar_dense", "equal", "nonzero") or self._is_masked:
            return Op(name, place, launches=int(name != "_local_scalar_dense"), waits=1)
        made = self._made
        if name in FREE or made.views:
            allocations = 0 if made.views else made.tensors
            return Op(name, place, views=made.views, tensors=made.tensors, allocations=allocations)
        allocations = 0 if made.written else made.tensors
        if name.startswith(("_foreach_", "_fused_")):
            launches, slow = self._multi_tensor()
            return Op(name, place, launches, tensors=made.tensors, allocations=allocations, slow=slow)
        far = [tensor for tensor in self.given if _is_far(tensor)]
        if far and not any(tensor.numel() for tensor in far):
            return Op(name, place, tensors=made.tensors, allocations=allocations)
        return Op(name, place, 1 + self._copies_summand, tensors=made.tensors, allocations=allocations)

    @property
    def _crosses(self) -> bool:
        """Whether it copies between the host and the accelerator."""
        if self.name == "_to_copy":
            onto = self.kwargs.get("device")
            return onto is not None and (torch.device(onto).type == "meta") != _is_far(self.args[0])
        if self.name == "copy_":
            return _is_far(self.args[0]) != _is_far(self.args[1])
        if self.name == "_foreach_copy_":
            return any(_is_far(into) != _is_far(source) for into, source in zip(*self.args[:2], strict=True))
        return False

    def _crossing(self, place: str) -> Op:
        """A pageable copy waits; one that is not to block is from or to pinned memory (`staged` in the package sees to it)."""
        blocks = not (self.kwargs.get("non_blocking") or (self.name != "_to_copy" and True in self.args[2:]))
        if self.name == "_foreach_copy_":
            copies = sum(_is_far(into) != _is_far(source) for into, source in zip(*self.args[:2], strict=True))
            return Op(self.name, place, waits=copies if blocks else 0, copies=copies, slow=True)
        return Op(self.name, place, waits=int(blocks), copies=1, allocations=int(self.name == "_to_copy"))

    @property
    def _is_masked(self) -> bool:
        """Whether elements are chosen by a mask, or repeated by a tensor: the size of the result is read from the device."""
        if self.name in ("index", "index_put_", "index_put"):
            return any(index is not None and index.dtype == torch.bool for index in self.args[1])
        return self.name == "masked_select" or (self.name == "repeat_interleave" and self.kwargs.get("output_size") is None)

    @property
    def _made(self) -> "_Made":
        schema = self.func._schema
        aliases = [found.alias_info for found in schema.returns]
        written = any(alias is not None and alias.is_write for alias in aliases) or not schema.returns
        views = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
        many = len(self.args[0]) if self.args and isinstance(self.args[0], list | tuple) else 1
        if views and self.name in ("split", "split_with_sizes", "unbind", "chunk"):
            many = len(_sizes(self.name, self.args))
        self._refuse_mixed(views)
        return _Made(views, written, many)

    def _refuse_mixed(self, views: bool) -> None:
        if not views and self.name not in ("_to_copy", "copy_", "_foreach_copy_"):
            near = [tensor for tensor in self.given if not _is_far(tensor) and tensor.ndim > 0]
            assert not near or not any(map(_is_far, self.given)), f"{self.name} at {_place()}: tensors on two devices"

    @property
    def _copies_summand(self) -> bool:
        if self.name not in ("baddbmm", "addmm") or self.kwargs.get("beta", 1) == 0:
            return False
        return self.kwargs.get("out") is not self.args[0]

    def _multi_tensor(self) -> tuple[int, bool]:
        """Launches of a foreach or fused operator, and whether it leaves the fast route."""
        lists = [[t for t in item if isinstance(t, Tensor)] for item in self.args if isinstance(item, list | tuple)]
        lists = [tensors for tensors in lists if tensors]
        if self.name.startswith("_fused_"):
            return launches_of([tensor.numel() for tensor in lists[0]], depth=4), False
        if not _is_fast(lists, self.name):
            return sum(tensor.numel() > 0 for tensor in lists[0]) * _slow_kernels(self.name, self.kwargs), True
        if self.name.startswith("_foreach_norm"):
            return launches_of([tensor.numel() for tensor in lists[0]], depth=1) + 2, False
        depth = len(lists) + (not self.name.endswith("_"))
        return launches_of([tensor.numel() for tensor in lists[0]], depth), False


@dataclass(frozen=True)
class _Made:
    views: bool
    written: bool
    tensors: int


def _sizes(name: str, args: Sequence[Any]) -> Sequence[int]:
    if name == "split_with_sizes":
        return list(args[1])
    dim = args[2] if name == "split" and len(args) > 2 else (args[1] if name == "unbind" and len(args) > 1 else 0)
    step = args[1] if name == "split" else 1
    return range(0, args[0].shape[dim], step)


def _is_fast(lists: Sequence[Sequence[Tensor]], name: str) -> bool:
    """Whether torch gives all tensors to one kernel (`can_use_fast_route`): one dtype, alike in shape and stride."""
    if name == "_foreach_copy_":  # whose two lists may have a dtype each
        return all(_is_fast([tensors], "") for tensors in lists) and _alike(lists)
    first = lists[0][0]
    return _alike(lists) and all(t.dtype == first.dtype and _dense(t) for tensors in lists for t in tensors)


def _alike(lists: Sequence[Sequence[Tensor]]) -> bool:
    return all(len({(t.shape, t.stride()) for t in place}) == 1 for place in zip(*lists, strict=True))


def _dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or sum((s - 1) * st for s, st in zip(tensor.shape, tensor.stride(), strict=True)) + 1 == prod(
        tensor.shape
    )


def _slow_kernels(name: str, kwargs: dict[str, Any]) -> int:
    return 1 + name.startswith("_foreach_norm")  # what it calls for each tensor; a norm has two stages


def launches_of(sizes: Iterable[int], depth: int) -> int:
    """Launches of ``multi_tensor_apply`` for tensors of these sizes in ``depth`` lists."""
    launches = blocks = tensors = 0
    for numel in sizes:
        if numel == 0:
            continue
        tensors += 1
        for last in _last_flags(-(-numel // CHUNK)):
            blocks += 1
            if blocks == BLOCKS or (last and tensors == TENSORS[depth - 1]):
                launches += 1
                blocks, tensors = 0, 0 if last else 1
    return launches + (blocks > 0)


def _last_flags(count: int) -> Iterator[bool]:
    for index in range(count):
        yield index + 1 == count
