"""State formats: what is kept of a value, where blocks lie, and what a step needs beside them.

How many bytes each rule takes is in its own test file; that every rule works with every format in test_conformance.py.
"""

import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ds_optforge import ConfigError, OptForge, build_optimizer
from ds_optforge.rules import rule_names
from ds_optforge.rules.base import Buffer
from ds_optforge.state import BLOCK, EightBit, Plain, StateFormat, block_edges, dequantize, portions, recut
from ds_optforge.testing.params import formats_of, settings_of
from ds_optforge.zero.partition import Range
from ds_optforge.zero.placement import Held
from tests.layers import linears, matrix, set_gradients
from tests.oracles import relative_error

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

SIGNED, UNSIGNED = Buffer("exp_avg"), Buffer("exp_avg_sq", signed=False)
holds_for = settings(max_examples=60, deadline=None)


def held(tensor_start: int, numel: int, parameter_start: int) -> Held:
    """A fragment in the one tensor that there is."""
    return Held(0, tensor_start, Range(parameter_start, numel))


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
        """And by 2**-15: on a CPU bitsandbytes looks the code up in a table of 2**16 bins."""
        values = wild(numel, signed=buffer.signed)
        form = EightBit([held(0, numel, 0)])
        back = form.read(stored(form, buffer, values), buffer, 0, numel)
        for start in range(0, numel, BLOCK):
            block, found = values[start : start + BLOCK], back[start : start + BLOCK]
            assert (found - block).abs().max() <= (half_gap(buffer) + 2**-15) * block.abs().max()

    @pytest.mark.parametrize("buffer", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
    def test_8_bits_of_one_sign_have_two_digits(self, buffer: Buffer) -> None:
        """A state of ordinary spread comes back to within 1.5%: a signed map has half as many codes a decade."""
        values = matrix(100_000) if buffer.signed else matrix(100_000).square()
        form = EightBit([held(0, len(values), 0)])
        assert relative_error(form.read(stored(form, buffer, values), buffer, 0, len(values)), values) < 0.015

    @pytest.mark.parametrize("buffer", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
    def test_zero_is_exactly_zero_as_allocated_and_as_written(self, buffer: Buffer) -> None:
        values = wild(1000, signed=buffer.signed)
        values[::3] = 0
        values[256:512] = 0  # a block of nothing else
        form = EightBit([held(0, 1000, 0)])
        state: dict[str, Any] = {}
        form.allocate(state, buffer, torch.empty(1000))
        assert not form.read(state, buffer, 0, 1000).any()
        form.write(state, buffer, 0, values)
        back = form.read(state, buffer, 0, 1000)
        assert not back[values == 0].any()

    @pytest.mark.parametrize("name", ["lion", "adamw"])
    def test_a_row_that_was_never_used_stays_beside_one_that_was(self, name: str) -> None:
        """Of an embedding: they share a block, and the sign of a zero that came back as 2e-5 would be a full step of Lion."""
        table = nn.Embedding(100, 50)
        before = table.weight.detach().clone()
        optimizer = build_optimizer(table, {"name": name, "lr": 0.01, "state_dtype": "8bit"})
        for step in range(5):
            table.weight.grad = matrix(100, 50, seed=step)
            table.weight.grad[1::2] = 0
            optimizer.step()
        assert optimizer.state[table.weight]["exp_avg"].dtype == torch.uint8
        assert torch.equal(table.weight[1::2], before[1::2])
        assert not torch.equal(table.weight[::2], before[::2])

    def test_full_precision_is_a_view(self) -> None:
        """So that what a rule changes in place is stored already."""
        state: dict[str, Any] = {}
        form = Plain(torch.float32)
        form.allocate(state, SIGNED, torch.empty(4, 3))
        form.read(state, SIGNED, 3, 6).fill_(7.0)
        assert torch.equal(state["exp_avg"], torch.tensor([[0.0] * 3, [7.0] * 3, [7.0] * 3, [0.0] * 3]))

    @pytest.mark.parametrize("form", [Plain(torch.bfloat16), EightBit([held(0, 3000, 0)])], ids=["bfloat16", "8bit"])
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
            form = EightBit([held(0, high - low, low)])
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
        form = EightBit([held(0, 2300, 0)])  # as if the parameter began at the cut, 700
        elsewhere = form.read(stored(form, SIGNED, values[700:]), SIGNED, 0, 2300)
        assert (elsewhere != self.after_a_cut(values, [700])[700:]).float().mean() > 0.1

    def test_a_small_parameter_is_not_spoiled_by_a_large_one_beside_it(self) -> None:
        """2%: its own resolution. One block across both would lose it altogether."""
        small, large = 1e-6 * matrix(100), matrix(5000, seed=1)
        values = torch.cat([small, large])
        separate = EightBit([held(0, 100, 0), held(100, 5000, 0)])
        across = EightBit([held(0, 5100, 0)])
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
        fragments = [held(0, 1000, 300), held(1000, 512, 0), held(1512, 10, 0)]
        state: dict[str, Any] = {}
        EightBit(fragments).allocate(state, SIGNED, torch.empty(1522))
        assert len(state["exp_avg_absmax"]) == (1 + 4) + 2 + 1  # of 212, 256, 256, 256, 20 elements; of 256, 256; of 10


class TestChunks:
    @holds_for
    @given(
        st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 2000)), min_size=1, max_size=6),
        st.sampled_from([256, 1024, 2560]),
    )
    def test_they_cover_everything_once_and_never_cut_a_block(self, sizes: list[tuple[int, int]], limit: int) -> None:
        fragments, offset = [], 0
        for numel, parameter_start in sizes:
            fragments.append(held(offset, numel, parameter_start))
            offset += numel
        cut = portions(fragments, limit)
        parts = [part for chunk in cut for part in chunk]
        assert [start for start, _ in parts] == [0, *itertools.accumulate(length for _, length in parts)][:-1]
        assert sum(length for _, length in parts) == offset
        assert all(sum(length for _, length in chunk) <= limit for chunk in cut)
        begins = {fragment.tensor_start for fragment in fragments}
        for start, _ in parts:
            fragment = max((e for e in fragments if e.tensor_start <= start), key=lambda e: e.tensor_start)
            assert start in begins or (fragment.within.start + start - fragment.tensor_start) % BLOCK == 0

    def test_a_state_is_stepped_alike_in_one_chunk_and_in_many(self) -> None:
        """Blocks written a chunk at a time are those of the whole."""
        values = wild(10_000)
        fragments = [held(0, 4000, 100), held(4000, 6000, 0)]
        form = EightBit(fragments)
        whole = stored(form, SIGNED, values)
        parts: dict[str, Any] = {}
        form.allocate(parts, SIGNED, torch.empty(10_000))
        for chunk in portions(fragments, 1024):
            for start, length in chunk:
                form.write(parts, SIGNED, start, values[start : start + length])
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


def peak_of(action: Callable[[], Any]) -> int:
    """The most bytes that torch's CPU allocator held beyond what it held at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        action()
    held = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


class TestWorkingMemory:
    """Of a step that finds its state allocated."""

    @pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
    def test_a_large_parameter_needs_less_than_one_float32_copy(self, state_dtype: str) -> None:
        """AdamW would need two. 28 million elements are seven chunks."""
        layer = nn.Linear(4096, 7 * 1024, bias=False)
        optimizer = build_optimizer(layer, {"name": "adamw", "state_dtype": state_dtype})
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
        assert peak_of(optimizer.step) < 0.8 * 4 * layer.weight.numel()

    @pytest.mark.parametrize(
        ("name", "state_dtype"),
        [(name, form) for name in rule_names() if settings_of(name).needs_matrix() for form in formats_of(name)],
    )
    def test_more_matrices_need_no_more(self, name: str, state_dtype: str) -> None:
        """A bucket bounds it. 5%: the larger model's lists of flags."""
        peaks = []
        for count in (8, 32):
            model = linears(*(matrix(128, 128, seed=seed) for seed in range(count)))
            sharding = {"bucket_numel": 4 * 128 * 128}
            optimizer = build_optimizer(model, {"name": name, "state_dtype": state_dtype, "sharding": sharding})
            set_gradients(model.parameters(), 0)
            optimizer.step()
            peaks.append(peak_of(optimizer.step))
        assert peaks[1] < 1.05 * peaks[0]


def dtypes(optimizer: OptForge) -> dict[str, torch.dtype]:
    """Of each parameter's first moment, by name."""
    return {piece.optforge_name: state["exp_avg"].dtype for piece, state in optimizer.state.items()}  # type: ignore[attr-defined]


def test_small_parameters_and_scalars_keep_float32() -> None:
    """Small is below 4096 elements, as in bitsandbytes; a scalar of any size is too precious."""
    model = nn.ModuleDict(
        {"at": nn.Linear(64, 64, bias=False), "below": nn.Linear(63, 65, bias=False), "norm": nn.LayerNorm(8192, bias=False)}
    )
    optimizer = build_optimizer(model, {"name": "adamw_8bit"})
    set_gradients(model.parameters(), 0)
    optimizer.step()
    assert dtypes(optimizer) == {"at.weight": torch.uint8, "below.weight": torch.float32, "norm.weight": torch.float32}


def test_a_format_can_be_chosen_by_role() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(100, 64), "layer": nn.Linear(64, 64, bias=False)})
    optimizer = build_optimizer(model, {"name": "adamw", "roles": {"embedding": {"state_dtype": "bfloat16"}}})
    set_gradients(model.parameters(), 0)
    optimizer.step()
    assert dtypes(optimizer) == {"table.weight": torch.bfloat16, "layer.weight": torch.float32}


@pytest.mark.parametrize(("saved", "loading"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("8bit", "float32")])
def test_state_of_another_format_is_refused_before_anything_changes(saved: str, loading: str) -> None:
    optimizers = [build_optimizer(linears(matrix(65, 70)), {"name": "muon", "state_dtype": form}) for form in (saved, loading)]
    for optimizer in optimizers:
        set_gradients(optimizer.param_groups[0]["params"], 0)
        optimizer.step()
    before = [value.clone() for state in optimizers[1].state.values() for value in state.values()]
    with pytest.raises(ConfigError, match=r"state_dtype: the checkpoint holds 4550 elements of .* allowed: 4550 of "):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    after = [value for state in optimizers[1].state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("beta2", "state_dtype", "tolerance"),
    [
        (0.95, "float32", 0.02),
        (0.95, "bfloat16", 0.025),
        (0.95, "8bit", 0.02),
        (0.99, "bfloat16", 0.13),
        (0.999, "float32", 0.02),
        (0.999, "8bit", 0.02),
    ],
)
def test_a_second_moment_grows_as_in_float64(beta2: float, state_dtype: str, tolerance: float) -> None:
    """A constant gradient of 1: the second moment is 1 - beta2 ** step, so that every step is lr.

    bfloat16 stops short of 1 by 2**-9 / (1 - beta2), where an increment is less than half its spacing.
    """
    model = linears(torch.zeros(64, 64))
    optimizer = build_optimizer(model, {"name": "adamw", "lr": 1e-3, "betas": (0.9, beta2), "state_dtype": state_dtype})
    model[0].weight.grad = torch.ones(64, 64)
    for _ in range(2000):
        before = model[0].weight[0, 0].item()
        optimizer.step()
    assert before - model[0].weight[0, 0].item() == pytest.approx(1e-3, rel=tolerance)


@pytest.mark.parametrize(
    "params", [{"name": "adamw", "betas": (0.9, 0.999)}, {"name": "schedule_free_adamw"}, {"name": "muon", "momentum": 0.999}]
)
def test_an_average_too_slow_for_bfloat16_is_refused(params: dict[str, Any]) -> None:
    """0.001 of a value is less than half of bfloat16's spacing: the average would stand still."""
    with pytest.raises(ConfigError, match=r"state_dtype: got 'bfloat16' with a moving average of decay rate 0\.999"):
        build_optimizer(linears(torch.zeros(64, 64)), {**params, "state_dtype": "bfloat16"})


WITHOUT = """
import sys
sys.modules["bitsandbytes"] = None  # what an import of it finds
import torch
import ds_optforge
model = torch.nn.Linear(64, 64)
for config in ({"name": "adamw_8bit"}, {"name": "muon", "state_dtype": "8bit"}):
    try:
        ds_optforge.build_optimizer(model, config)
    except ds_optforge.ConfigError as error:
        print(error)
model.weight.grad = torch.ones(64, 64)
for state_dtype in ("float32", "bfloat16"):
    ds_optforge.build_optimizer(model, {"name": "muon", "state_dtype": state_dtype}).step()
print("stepped")
"""


def test_without_bitsandbytes_8_bits_name_the_extra_and_the_rest_works() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("optimizer.", "stepped"))]
    assert len(lines) == 3, done.stderr
    for line in lines[:2]:
        assert line.startswith("optimizer.params.state_dtype: got '8bit' (str); allowed: ")
        assert "pip install 'ds-optforge[8bit]'" in line


# ------------------------------------------------------------------------------------ blocks at other cuts

CUTS = st.lists(st.integers(1, 2999), max_size=6, unique=True).map(sorted)


@holds_for
@given(CUTS, CUTS, st.integers(0, 2**31), st.booleans())
def test_blocks_move_to_other_cuts(saved_cuts: list[int], own_cuts: list[int], seed: int, signed: bool) -> None:
    """A block between the same two edges keeps its bits; what is quantized anew keeps its values to 8-bit precision."""
    values = torch.randn(3000, generator=torch.Generator().manual_seed(seed))
    values = values if signed else values.square()
    codes, absmax, saved = quantized(values, saved_cuts, signed)
    before = codes.clone()
    own = block_edges(3000, own_cuts)
    scales = recut(codes, absmax, saved, own, signed)
    found, expected = dequantize(codes, scales, own, signed), dequantize(before, absmax, saved, signed)
    pairs = set(itertools.pairwise(saved.tolist()))
    for index, (begin, end) in enumerate(itertools.pairwise(own.tolist())):
        if (begin, end) in pairs:
            assert torch.equal(codes[begin:end], before[begin:end])
            assert scales[index] == absmax[sorted(pairs).index((begin, end))]
        else:
            assert (found[begin:end] - expected[begin:end]).abs().max() <= 0.02 * expected[begin:end].abs().max()


def test_a_range_takes_the_ends_of_saved_blocks_that_begin_before_it_and_end_after() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    codes, absmax, saved = quantized(values, [], True)
    low, high = 300, 700  # blocks 1 and 2
    part = codes[low:high].clone()
    edges = torch.tensor([0, 212, 400])
    scales = recut(part, absmax[1:3], saved[1:4] - low, edges, True)
    found = dequantize(part, scales, edges, True)
    expected = dequantize(codes, absmax, saved, True)[low:high]
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


def quantized(values: Tensor, cuts: list[int], signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and edges of one parameter whose fragments begin at the cuts."""
    starts = [0, *cuts]
    fragments = [held(a, b - a, a) for a, b in itertools.pairwise([*starts, len(values)])]
    state: dict[str, Tensor] = {}
    eight = EightBit(fragments)
    buffer = Buffer("m", signed=signed)
    eight.allocate(state, buffer, values)
    eight.write(state, buffer, 0, values)
    return state["m"], state["m_absmax"], block_edges(len(values), cuts)
