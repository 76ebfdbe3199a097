"""CUDA's roundings where they are others than the CPU's, put upon tensors of the CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CANONICAL = 0x7FFF  # what CUDA makes of every NaN that it rounds to bfloat16


class CanonicalNaNs(TorchDispatchMode):
    """``_foreach_copy_`` of bfloat16 goes through float32 on CUDA, which keeps the value and not the pattern of a NaN."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._foreach_copy_.default:
            for into, source in zip(*args[:2], strict=True):
                if into.dtype == source.dtype == torch.bfloat16:
                    into.view(torch.int16).masked_fill_(into.isnan(), CANONICAL)
        return result


class SplitSums(TorchDispatchMode):
    """Products of 16 bits whose sums are made in ``splits`` parts, each rounded to 16 bits, as cuBLAS may (split-K).

    PyTorch allows it by default: ``torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction``, and that of fp16.
    """

    def __init__(self, splits: int) -> None:
        super().__init__()
        self._splits = splits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        out = kwargs.pop("out", None)
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.bmm.out) and args[0].dtype.itemsize == 2:
            result = self._product(*args)
        elif func in (torch.ops.aten.baddbmm.default, torch.ops.aten.baddbmm.out) and args[0].dtype.itemsize == 2:
            product = self._product(*args[1:]).float() * kwargs.get("alpha", 1)
            result = (kwargs.get("beta", 1) * args[0].float() + product).to(args[0].dtype)
        else:
            return func(*args, **kwargs) if out is None else func(*args, out=out, **kwargs)
        return result if out is None else out.copy_(result)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        parts = zip(left.tensor_split(self._splits, dim=2), right.tensor_split(self._splits, dim=1), strict=True)
        first, *others = [torch.bmm(a.float(), b.float()).to(left.dtype) for a, b in parts]
        for other in others:
            first = first + other
        return first
