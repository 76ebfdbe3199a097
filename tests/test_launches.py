"""A steady step on an accelerator, counted: launches, waits of the host, copies, what exchanges hide behind.

Numbers are of rank 0. They may fall; who makes one rise changes it here, with a reason.
"""

from functools import cache
from typing import Any

import pytest
import torch

from ds_optforge import build_optimizer
from tests.launches import Launches, launches_of
from tests.stand_in import META, Shape, Stepped, standing, steady_step


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
    ("8 layers", "muon", 2): 200,
    ("8 layers", "muon", 3): 230,
    ("8 layers", "normuon", 2): 260,
    ("8 layers", "normuon", 3): 290,
    ("8 layers", "adamw", 2): 5,
    ("8 layers", "adamw", 3): 5,
    ("8 layers", "lion", 3): 15,
    ("8 layers", "schedule_free_adamw", 3): 30,
    ("512 squares", "muon", 2): 160,
    ("512 squares", "muon", 3): 180,
    ("7B", "muon", 2): 1200,
    ("7B", "muon", 3): 1500,
    ("7B", "adamw_8bit", 2): 800,
    ("7B", "adamw_8bit", 3): 1200,
    ("2304 experts", "muon", 3): 800,
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


@pytest.mark.parametrize(("rule", "views"), [("muon", 2), ("normuon", 4)])
def test_views_do_not_grow_with_fragments(rule: str, views: int) -> None:
    """At most so many calls a fragment: one call views all fragments of a buffer."""
    found = stepped("2304 experts", rule, 3)
    assert found.fragments == 2304
    assert found.counts.views <= views * found.fragments


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cautious", [False, True])
def test_lists_of_tensors_take_the_fast_route(rule: str, stage: int, cautious: bool) -> None:
    """A list that mixes dtypes or shapes would take a kernel for each tensor."""
    if rule in ("sgd", "schedule_free_adamw"):
        assert not stepped("8 layers", rule, stage).counts.slow
        return
    found = steady_step(SMALL, stage, 3, name=rule, weight_decay=0.1, cautious_weight_decay=cautious)
    assert not found.counts.slow, found.counts.places("slow")


@pytest.mark.parametrize("model", ["8 layers", "512 squares", "7B", "2304 experts"])
def test_every_exchange_hides_behind_work(model: str) -> None:
    """Kernels are launched between its issue and the wait for it; at most two exchanges are under way."""
    found = stepped(model, "muon", 3)
    assert found.exchanges >= 3
    assert len(found.hidden) == 2 * found.exchanges
    assert all(found.hidden)
    assert found.most_under_way == 2


def test_local_matrices_hide_the_only_exchange_both_ways() -> None:
    """ZeRO-2: they are orthogonalized while it travels out, and applied while it returns."""
    found = stepped("8 layers", "muon", 2)
    assert found.exchanges == 1
    assert all(found.hidden)


@pytest.mark.parametrize("shapes", [((256, 256),) * 60, ((8192, 8192),) * 3])
def test_few_or_small_matrices_travel_in_one_exchange(shapes: tuple[Shape, ...]) -> None:
    assert steady_step(shapes, 3, 4, name="muon").exchanges == 1


def test_fragments_that_are_orthogonalized_alone_take_it_too() -> None:
    found = steady_step(SMALL, 3, 3, name="muon", weight_decay=0.1, sharding={"mode": "shard_local"})
    assert not found.counts.slow
    assert not found.hidden


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("rule", ["muon", "normuon"])
def test_with_offload_a_bucket_is_copied_once_each_way(rule: str, stage: int) -> None:
    """The host waits for what comes back, once; each fragment on its own would be hundreds of waits."""
    found = steady_step(((256, 256),) * 14 + ((256, 1024),) * 6, stage, 3, offload=True, name=rule, weight_decay=0.1)
    assert found.fragments >= 13
    assert (found.counts.waits, found.counts.copies) == (found.buckets, 2 * found.buckets)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("rule", ["muon", "normuon"])
def test_where_rows_are_chosen_the_host_waits_once_an_exchange(rule: str, stage: int) -> None:
    """For what each rank sends; buckets that do not travel need no wait."""
    found = steady_step(SMALL, stage, 3, name=rule, nesterov=False, weight_decay=0.1, sharding={"rows": 0.25})
    assert found.counts.places("waits") == found.counts.places("copies")
    assert (found.counts.waits, found.exchanges) == (found.exchanges, {2: 1, 3: 3}[stage])
    assert not found.counts.slow


@pytest.mark.parametrize("rule", ["muon", "adamw"])
def test_a_number_of_steps_that_was_put_on_the_device_comes_back_once(rule: str) -> None:
    """As DeepSpeed's reload_states does with all state: the host would wait for it in every step."""
    with standing(SMALL, 2, 3, name=rule) as (optimizer, collectives):
        optimizer.step()
        (state,) = optimizer.state.values()
        state["step"] = state["step"].to(META)
        waits = []
        for _ in range(2):
            collectives.counter.clear()
            optimizer.step()
            waits.append(collectives.counter.waits)
    assert waits == [1, 0]


def test_a_model_on_two_devices_is_stepped_device_by_device() -> None:
    """In plain PyTorch: the CPU is one of them here. An operator that mixes them fails, as on two GPUs."""
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8, device=device) for device in ("cpu", META, "cpu", META)))
    optimizer = build_optimizer(model, {"name": "normuon", "lr": 0.02, "adamw": {"lr": 1e-3}})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = model[0].weight.clone()
    with Launches() as counter:
        optimizer.step()
        optimizer.step()
    assert counter.launches
    assert not torch.equal(model[0].weight, before)


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
