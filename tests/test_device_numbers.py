"""Numbers that hold on CUDA too, whose roundings are put upon the CPU's tensors."""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from ds_optforge import build_optimizer
from tests.device_numbers import CanonicalNaNs
from tests.layers import linears, matrix, set_gradients


def row_moments(rows: int, steps: int, mode: AbstractContextManager[object]) -> Tensor:
    model = linears(0.1 * matrix(rows, 24))
    optimizer = build_optimizer(model, {"name": "normuon", "lr": 0.02})
    for step in range(steps):
        set_gradients(model.parameters(), step)
        with mode:
            optimizer.step()
    return optimizer.state[model[0].weight]["row_second_moment"]


@pytest.mark.parametrize("steps", [1, 3])
def test_float32_statistics_travel_through_bfloat16_bit_by_bit(steps: int) -> None:
    """Half of a float32 may be a NaN of bfloat16: one in 256 of them, so that 4,096 rows have some."""
    expected, found = (row_moments(4096, steps, mode) for mode in (nullcontext(), CanonicalNaNs()))
    halves = expected.view(torch.bfloat16)
    assert halves.isnan().any()
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
