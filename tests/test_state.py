"""State formats: what is kept of a value, where blocks lie, how many bytes it takes, and what a step needs beside them."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_optforge import build_optimizer
from ds_optforge.rules.base import Buffer
from ds_optforge.state import BLOCK, EightBit, Extent, Plain, StateFormat
from tests.layers import linears, matrix, set_gradients
from tests.oracles import relative_error

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

SIGNED, UNSIGNED = Buffer("exp_avg"), Buffer("exp_avg_sq", signed=False)
holds_for = settings(max_examples=60, deadline=None)


def wild(numel: int, seed: int = 0, signed: bool = True) -> Tensor:
    """Values of very different sizes, so that a block that lies elsewhere has another scale and other codes."""
    values = matrix(numel, seed=seed) * 10 ** (2 * matrix(numel, seed=seed + 1))
    return values if signed else values.abs()


def stored(form: StateFormat, buffer: Buffer, values: Tensor) -> dict[str, Any]:
    """The state after ``values`` were written."""
    state: dict[str, Any] = {}
    form.allocate(state, buffer, torch.empty(len(values)))
    form.write(state, buffer, 0, values)
    return state


def half_gap(buffer: Buffer) -> float:
    """The largest error of a value in [-1, 1] that is rounded to the nearest entry of bitsandbytes' map."""
    code = functional.create_dynamic_map(signed=buffer.signed).sort().values
    lowest = -1.0 if buffer.signed else 0.0
    return max(code.diff().max().item() / 2, code[0].item() - lowest)


class TestRoundTrip:
    def test_bfloat16_keeps_eight_bits(self) -> None:
        values = wild(5000)
        back = Plain(torch.bfloat16).read(stored(Plain(torch.bfloat16), SIGNED, values), SIGNED, 0, 5000).float()
        assert ((back - values).abs() <= 2**-8 * values.abs()).all()

    @pytest.mark.parametrize("buffer", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
    @pytest.mark.parametrize("numel", [1, 255, 256, 257, 5000])
    def test_8_bits_are_off_by_half_a_gap_of_the_blocks_largest_value(self, numel: int, buffer: Buffer) -> None:
        """1e-6 for the float32 division by the block's largest value."""
        values = wild(numel, signed=buffer.signed)
        form = EightBit([Extent(0, numel, 0)])
        back = form.read(stored(form, buffer, values), buffer, 0, numel)
        for start in range(0, numel, BLOCK):
            block, found = values[start : start + BLOCK], back[start : start + BLOCK]
            assert (found - block).abs().max() <= (half_gap(buffer) + 1e-6) * block.abs().max()

    @pytest.mark.parametrize("buffer", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
    def test_8_bits_of_one_sign_have_two_digits(self, buffer: Buffer) -> None:
        """A state of ordinary spread comes back to within 1.5%: a signed map has half as many codes a decade."""
        values = matrix(100_000) if buffer.signed else matrix(100_000).square()
        form = EightBit([Extent(0, len(values), 0)])
        assert relative_error(form.read(stored(form, buffer, values), buffer, 0, len(values)), values) < 0.015

    @pytest.mark.parametrize("buffer", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
    def test_zero_is_exactly_zero_as_allocated_and_as_written(self, buffer: Buffer) -> None:
        values = wild(1000, signed=buffer.signed)
        values[::3] = 0
        values[256:512] = 0  # a block of nothing else
        form = EightBit([Extent(0, 1000, 0)])
        state: dict[str, Any] = {}
        form.allocate(state, buffer, torch.empty(1000))
        assert not form.read(state, buffer, 0, 1000).any()
        form.write(state, buffer, 0, values)
        back = form.read(state, buffer, 0, 1000)
        assert not back[values == 0].any()

    def test_full_precision_is_a_view(self) -> None:
        """So that what a rule changes in place is stored already."""
        state: dict[str, Any] = {}
        form = Plain(torch.float32)
        form.allocate(state, SIGNED, torch.empty(4, 3))
        form.read(state, SIGNED, 3, 6).fill_(7.0)
        assert torch.equal(state["exp_avg"], torch.tensor([[0.0] * 3, [7.0] * 3, [7.0] * 3, [0.0] * 3]))

    @pytest.mark.parametrize("form", [Plain(torch.bfloat16), EightBit([Extent(0, 3000, 0)])], ids=["bfloat16", "8bit"])
    def test_parts_are_read_and_written_as_the_whole_is(self, form: StateFormat) -> None:
        values = wild(3000)
        whole = stored(form, SIGNED, values)
        parts: dict[str, Any] = {}
        form.allocate(parts, SIGNED, torch.empty(3000))
        cuts = [0, 256, 1024, 2048, 3000]
        for low, high in itertools.pairwise(cuts):
            form.write(parts, SIGNED, low, values[low:high])
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
        read = torch.cat([form.read(whole, SIGNED, low, high - low) for low, high in itertools.pairwise(cuts)])
        assert torch.equal(read, form.read(whole, SIGNED, 0, 3000))


class TestBlocks:
    def after_a_cut(self, values: Tensor, cuts: Sequence[int]) -> Tensor:
        """A parameter's state as its slices on several ranks give it back."""
        back = []
        for low, high in itertools.pairwise([0, *cuts, len(values)]):
            form = EightBit([Extent(0, high - low, low)])
            back.append(form.read(stored(form, SIGNED, values[low:high]), SIGNED, 0, high - low))
        return torch.cat(back)

    @holds_for
    @given(st.integers(1, 3000), st.lists(st.integers(1, 2999), max_size=4))
    def test_another_partition_changes_only_the_blocks_at_its_cuts(self, numel: int, cuts: list[int]) -> None:
        """Blocks are aligned to multiples of 256 within the parameter."""
        cuts = sorted({cut for cut in cuts if cut < numel})
        values = wild(numel)
        whole, pieces = self.after_a_cut(values, []), self.after_a_cut(values, cuts)
        interior = torch.ones(numel, dtype=torch.bool)
        for cut in cuts:
            if cut % BLOCK:
                interior[cut // BLOCK * BLOCK : (cut // BLOCK + 1) * BLOCK] = False
        assert torch.equal(pieces[interior], whole[interior])

    def test_the_values_tell_where_blocks_lie(self) -> None:
        """Blocks from the cut on would change nearly everything: the test above can fail."""
        values = wild(3000)
        form = EightBit([Extent(0, 2300, 0)])  # as if the parameter began at the cut, 700
        elsewhere = form.read(stored(form, SIGNED, values[700:]), SIGNED, 0, 2300)
        assert (elsewhere != self.after_a_cut(values, [700])[700:]).float().mean() > 0.1

    def test_a_small_parameter_is_not_spoiled_by_a_large_one_beside_it(self) -> None:
        """2%: its own resolution. One block across both would lose it altogether."""
        small, large = 1e-6 * matrix(100), matrix(5000, seed=1)
        values = torch.cat([small, large])
        separate = EightBit([Extent(0, 100, 0), Extent(100, 5000, 0)])
        across = EightBit([Extent(0, 5100, 0)])
        errors = [relative_error(f.read(stored(f, SIGNED, values), SIGNED, 0, 5100)[:100], small) for f in (separate, across)]
        assert errors[0] < 0.02
        assert errors[1] > 0.5

    def test_in_an_optimizer_too(self) -> None:
        """Two large matrices whose sizes are no multiples of 256, in one group: gradients of 1e-6 and of 1."""
        model = linears(matrix(65, 67), matrix(70, 71))
        optimizer = build_optimizer(model, {"name": "adamw", "lr": 0.01, "state_dtype": "8bit"})
        alone = linears(matrix(65, 67))
        reference = build_optimizer(alone, {"name": "adamw", "lr": 0.01, "state_dtype": "8bit"})
        for step in range(5):
            set_gradients(model.parameters(), step)
            model[0].weight.grad.mul_(1e-6)
            alone[0].weight.grad = model[0].weight.grad.clone()
            optimizer.step()
            reference.step()
        assert torch.equal(model[0].weight, alone[0].weight)

    def test_every_block_has_its_own_scale_and_nothing_more(self) -> None:
        """Short blocks: before the first boundary of a fragment, and at its end."""
        extents = [Extent(0, 1000, 300), Extent(1000, 512, 0), Extent(1512, 10, 0)]
        state: dict[str, Any] = {}
        EightBit(extents).allocate(state, SIGNED, torch.empty(1522))
        assert len(state["exp_avg_absmax"]) == (1 + 3) + 2 + 1  # 212, 256, 256, 256 + 20 ...
