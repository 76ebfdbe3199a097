"""Launches of PyTorch's foreach and fused kernels on CUDA: ATen/native/cuda/MultiTensorApply.cuh."""

from collections.abc import Iterable

_BLOCK = 65536  # elements that a block processes
_BLOCKS = 320  # of one launch
_TENSORS = (110, 64, 48, 36, 30)  # of one launch, by the number of lists


def multi_tensor_launches(sizes: Iterable[int], lists: int) -> int:
    """Return the launches for tensors of these sizes, where all of a list are alike in dtype.

    Args:
        sizes: elements of each tensor; empty ones take no part.
        lists: of tensors that a kernel reads and writes.
    """
    launches = blocks = tensors = 0
    for numel in sizes:
        left = -(-numel // _BLOCK)
        tensors += left > 0
        while left:
            taken = min(left, _BLOCKS - blocks)
            left, blocks = left - taken, blocks + taken
            if blocks == _BLOCKS or (not left and tensors == _TENSORS[lists - 1]):
                launches, blocks, tensors = launches + 1, 0, int(left > 0)
    return launches + (blocks > 0)


def copy_launches(sizes: Iterable[int]) -> int:
    """Return the launches of a foreach copy."""
    return multi_tensor_launches(sizes, 2)
