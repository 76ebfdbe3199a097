"""A steady step on an accelerator, counted: launches, waits of the host, copies, what exchanges hide behind.

Numbers are of rank 0. They may fall; who makes one rise changes it here, with a reason.
"""

from functools import cache
from typing import Any

import pytest
import torch

from tests.launches import Launches, launches_of
from tests.stand_in import META, Shape, Stepped, steady_step


def transformer(layers: int, width: int, inner: int) -> tuple[Shape, ...]:
    """q, k, v, out, gate, up and down of each layer."""
    return ((width, width),) * 4 * layers + ((inner, width), (inner, width), (width, inner)) * layers


SMALL = tuple(s for _ in range(8) for s in transformer(1, 1024, 4096))
SQUARES = ((1024, 1024),) * 512
SEVEN_B = tuple(s for _ in range(32) for s in transformer(1, 4096, 11008))
EXPERTS = ((2048, 7168), (2048, 7168), (7168, 2048)) * 768
MODELS = {"8 layers": (SMALL, 3), "512 squares": (SQUARES, 8), "7B": (SEVEN_B, 8), "2304 experts": (EXPERTS, 256)}

# Most launches, by model, rule and stage.
LAUNCHES = {
    ("8 layers", "muon", 2): 725,
    ("8 layers", "muon", 3): 754,
    ("8 layers", "normuon", 2): 956,
    ("8 layers", "normuon", 3): 965,
    ("512 squares", "muon", 2): 1088,
    ("512 squares", "muon", 3): 1878,
    ("7B", "muon", 2): 3324,
    ("7B", "muon", 3): 3943,
    ("2304 experts", "muon", 3): 5397,
    ("7B", "adamw_8bit", 2): 3724,
    ("7B", "adamw_8bit", 3): 5888,
    ("8 layers", "adamw", 2): 5,
    ("8 layers", "adamw", 3): 5,
}
RULES = ("muon", "normuon", "adamw", "adamw_8bit", "lion", "sgd", "schedule_free_adamw")


@cache
def stepped(model: str, rule: str, stage: int) -> Stepped:
    shapes, world = MODELS[model]
    decay: dict[str, Any] = {} if rule == "sgd" else {"weight_decay": 0.1}
    return steady_step(shapes, stage, world, name=rule, **decay)


@pytest.mark.parametrize(("model", "rule", "stage"), LAUNCHES)
def test_launches(model: str, rule: str, stage: int) -> None:
    assert stepped(model, rule, stage).counts.launches <= LAUNCHES[model, rule, stage]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("rule", RULES)
def test_the_host_waits_nowhere_and_copies_nothing(rule: str, stage: int) -> None:
    counts = stepped("8 layers", rule, stage).counts
    assert (counts.places("waits"), counts.places("copies")) == ({}, {})


class TestTheCounter:
    """Against counts by hand, and faults that were put in."""

    def test_a_launch_holds_320_blocks_of_65536_elements(self) -> None:
        assert launches_of([65536 * 320], depth=1) == 1
        assert launches_of([65536 * 320 + 1], depth=1) == 2
        assert launches_of([1, 65536 * 319, 1], depth=1) == 2

    def test_a_launch_holds_so_many_tensors_and_empty_ones_are_none(self) -> None:
        assert [launches_of([1] * count, depth=1) for count in (110, 111)] == [1, 2]
        assert [launches_of([1] * count, depth=3) for count in (48, 49)] == [1, 2]
        assert launches_of([0] * 1000, depth=1) == 0

    def test_a_list_is_one_launch_if_all_in_it_is_alike(self) -> None:
        narrow, wide = (
            [torch.empty(8, dtype=dtype, device=META) for _ in range(5)] for dtype in (torch.bfloat16, torch.float32)
        )
        with Launches() as counter:
            torch._foreach_add_(wide, wide)
            torch._foreach_copy_(wide, narrow)
            torch._foreach_norm(wide)
        assert [(op.launches, op.slow) for op in counter.ops] == [(1, False), (1, False), (3, False)]
        factors = [torch.empty(1, device=META) for _ in range(5)]
        counter.clear()
        with counter:
            torch._foreach_add_(wide, narrow)
            torch._foreach_mul_(wide, factors)
        assert [(op.launches, op.slow) for op in counter.ops] == [(5, True), (5, True)]

    def test_views_launch_nothing_and_count_per_call(self) -> None:
        with Launches() as counter:
            torch.empty(12, device=META).view(3, 4).split(1)
        assert (counter.launches, counter.views, counter.allocations) == (0, 2, 1)

    def test_a_sum_of_a_product_and_a_matrix_copies_the_matrix_unless_it_is_the_result(self) -> None:
        square = torch.empty(1, 4, 4, device=META)
        with Launches() as counter:
            square.baddbmm_(square, square)
            torch.baddbmm(square, square, square)
            torch.baddbmm(square, square, square, beta=0)
        assert [op.launches for op in counter.ops] == [1, 2, 1]

    def test_values_that_the_host_asks_for_make_it_wait(self) -> None:
        flag = torch.empty((), device=META)
        with Launches() as counter:
            bool(flag)
            flag.nonzero()
            flag.cpu()
            torch.tensor([1.0, 2.0], device=META)
        assert counter.waits == 4
        assert counter.copies == 2

    def test_the_hosts_own_counts_for_nothing(self) -> None:
        with Launches() as counter:
            assert int(torch.ones(3).sum()) == 3
        assert not counter.ops

    def test_tensors_on_two_devices_are_refused(self) -> None:
        with Launches(), pytest.raises(AssertionError, match="two devices"):
            torch.empty(3, device=META).mul_(torch.empty(3))
