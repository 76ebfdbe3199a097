"""Elementwise steps that rules have in common, on numbers that a reader can follow."""

import pytest
import torch
from torch import Tensor

from ds_optforge.rules.flat import combine, decay, descend, products, side_by_side


def tensors(*rows: list[float], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Each in memory of its own."""
    return [torch.tensor(row, dtype=dtype) for row in rows]


def in_a_row(*rows: list[float]) -> list[Tensor]:
    """Side by side in memory."""
    return list(torch.tensor([value for row in rows for value in row]).split([len(row) for row in rows]))


def values(found: list[Tensor]) -> list[list[float]]:
    return [tensor.tolist() for tensor in found]


@pytest.mark.parametrize("made", [tensors, in_a_row])
class TestDecay:
    def test_plain_it_is_a_factor_of_all(self, made: object) -> None:
        weights = made([1.0, -2.0], [3.0, 4.0])  # type: ignore[operator]
        decay(weights, [], 0.25, cautious=False)
        assert values(weights) == [[0.75, -1.5], [2.25, 3.0]]

    def test_plain_it_leaves_what_is_not_active(self, made: object) -> None:
        weights = made([1.0, -2.0], [3.0, 4.0], [8.0, 8.0])  # type: ignore[operator]
        decay(weights, [], 0.25, cautious=False, active=torch.tensor([1.0, 0.0, 1.0]))
        assert values(weights) == [[0.75, -1.5], [3.0, 4.0], [6.0, 6.0]]

    def test_cautious_it_is_where_the_update_has_the_weights_sign_or_is_zero(self, made: object) -> None:
        weights = made([4.0, -4.0, 4.0, -4.0], [8.0, 8.0, -8.0, 0.0])  # type: ignore[operator]
        updates = made([1.0, 1.0, 0.0, 0.0], [-1.0, 2.0, -1.0, 1.0])  # type: ignore[operator]
        decay(weights, updates, 0.25, cautious=True)
        assert values(weights) == [[3.0, -4.0, 3.0, -3.0], [8.0, 6.0, -6.0, 0.0]]

    def test_cautious_it_leaves_what_is_not_active(self, made: object) -> None:
        weights, updates = made([4.0, -4.0], [4.0, -4.0]), made([1.0, 1.0], [1.0, 1.0])  # type: ignore[operator]
        decay(weights, updates, 0.25, cautious=True, active=torch.tensor([0.0, 1.0]))
        assert values(weights) == [[4.0, -4.0], [3.0, -4.0]]


@pytest.mark.parametrize("made", [tensors, in_a_row])
def test_descend_subtracts(made: object) -> None:
    weights = made([1.0, 2.0], [3.0, 4.0])  # type: ignore[operator]
    descend(weights, made([1.0, -1.0], [2.0, 0.0]), 0.5)  # type: ignore[operator]
    assert values(weights) == [[0.5, 2.5], [2.0, 4.0]]


@pytest.mark.parametrize("made", [tensors, in_a_row])
def test_combine_has_a_factor_of_each_weight_and_one_of_its_update(made: object) -> None:
    weights = made([2.0, 4.0], [8.0, 8.0])  # type: ignore[operator]
    combine(weights, made([1.0, -1.0], [1.0, 2.0]), torch.tensor([0.5, 1.0]), torch.tensor([3.0, 0.0]))  # type: ignore[operator]
    assert values(weights) == [[-2.0, 5.0], [8.0, 8.0]]


def test_combine_rounds_weights_of_bfloat16_once() -> None:
    """1 + 0.75 / 256 - 1 / 256 is nearest to 1. Rounded before the update it would be 1, and then 1 - 1 / 256."""
    weights, updates = tensors([1.0], dtype=torch.bfloat16), tensors([1.0], dtype=torch.bfloat16)
    combine(weights, updates, torch.tensor([1 + 0.75 / 256]), torch.tensor([1 / 256]))
    assert values(weights) == [[1.0]]


def test_products_are_wide() -> None:
    """(1 + 1/128)^2 has more bits than bfloat16."""
    one = 1 + 1 / 128
    found = products(tensors([one, 2.0], dtype=torch.bfloat16), tensors([one, -3.0]))
    assert values(list(found)) == [[one * one, -6.0]]
    assert products(tensors([1.0], dtype=torch.float64), tensors([1.0], dtype=torch.float64))[0].dtype == torch.float64


class TestSideBySide:
    def test_neighbours_of_one_size_are_one_block(self) -> None:
        memory, other = torch.arange(12.0), torch.arange(12.0) + 100
        places = [slice(0, 2), slice(2, 4), slice(6, 8), slice(8, 11)]
        found = side_by_side([memory[place] for place in places], [other[place] for place in places])
        assert [first.tolist() for first, _ in found] == [[[0.0, 1.0], [2.0, 3.0]], [[6.0, 7.0]], [[8.0, 9.0, 10.0]]]
        assert [second.tolist() for _, second in found] == [
            [[100.0, 101.0], [102.0, 103.0]],
            [[106.0, 107.0]],
            [[108.0, 109.0, 110.0]],
        ]

    def test_both_have_to_be_neighbours(self) -> None:
        memory = torch.arange(4.0)
        first, apart = [memory[:2], memory[2:]], [torch.zeros(2), torch.zeros(2)]
        assert [len(block) for block, _ in side_by_side(first, apart)] == [1, 1]
        assert [len(block) for block, _ in side_by_side(apart, first)] == [1, 1]
        assert [len(block) for block, _ in side_by_side(first, [memory[2:], memory[:2]])] == [1, 1]

    def test_blocks_are_the_tensors_themselves(self) -> None:
        memory = torch.zeros(4)
        ((block, _),) = side_by_side([memory[:2], memory[2:]], [memory[:2], memory[2:]])
        block += 1
        assert memory.tolist() == [1.0] * 4
