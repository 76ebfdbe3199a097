"""A steady step on an accelerator, counted: launches, waits of the host, copies, what exchanges hide behind.

Numbers are of rank 0. They may fall; who makes one rise changes it here, with a reason.
"""

from functools import cache
from math import prod
from typing import Any

import pytest
import torch

from ds_optforge import build_optimizer
from ds_optforge.optimizer import send_telemetry
from ds_optforge.rules import rule_settings
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
    ("8 layers", "muon_squared", 2): 230,
    ("8 layers", "muon_squared", 3): 230,
    ("512 squares", "muon_squared", 3): 210,
    # Of these, three for each of the 20, or 56, fragments are its mean squares.
    ("8 layers", "adamuon", 2): 335,
    ("8 layers", "adamuon", 3): 480,
    ("8 layers", "aurora", 2): 330,
    ("8 layers", "aurora", 3): 290,
    ("8 layers", "muon_hyperball", 2): 350,
    ("8 layers", "muon_hyperball", 3): 420,
    ("8 layers", "muown", 2): 530,
    ("8 layers", "muown", 3): 580,
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
    ("2304 experts", "muon_hyperball", 3): 1100,
    ("2304 experts", "muown", 3): 2050,
}
RULES = (
    "muon",
    "muon_squared",
    "adamuon",
    "aurora",
    "normuon",
    "muon_hyperball",
    "muown",
    "soap_muon",
    "adamw",
    "adamw_8bit",
    "lion",
    "sgd",
    "schedule_free_adamw",
)


@cache
def stepped(model: str, rule: str, stage: int) -> Stepped:
    shapes, world = MODELS[model]
    decay: dict[str, Any] = {} if rule in ("sgd", "muon_hyperball") else {"weight_decay": 0.1}
    return steady_step(shapes, stage, world, name=rule, **decay)


@pytest.mark.parametrize(("model", "rule", "stage"), LAUNCHES)
def test_launches(model: str, rule: str, stage: int) -> None:
    assert stepped(model, rule, stage).counts.launches <= LAUNCHES[model, rule, stage]


AROUND: dict[str, dict[str, Any]] = {"average": {"kind": "ema"}, "ema_nesterov": {"start": 0}}
# Most launches for each portion. EMA-Nesterov scales the matrices of a matrix rule by whether they had a gradient, by shape.
AROUND_LAUNCHES = {("average", "muon"): 1, ("average", "adamw"): 1, ("ema_nesterov", "muon"): 24, ("ema_nesterov", "adamw"): 5}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("key", AROUND)
@pytest.mark.parametrize("case", [("8 layers", "muon"), ("8 layers", "adamw"), ("7B", "muon"), ("2304 experts", "muon")])
def test_what_is_around_a_rule_launches_by_portions(case: tuple[str, str], key: str, stage: int) -> None:
    """Beyond the rule, and 320 blocks of a launch: no more with more fragments; it waits and copies nowhere."""
    model, rule = case
    shapes, world = MODELS[model]
    found = steady_step(shapes, stage, world, name=rule, weight_decay=0.1, **{key: AROUND[key]})
    numel = sum(prod(shape) for shape in shapes) // world
    most = AROUND_LAUNCHES[key, rule] * (max(found.portions, 1) + numel // (320 * 65536) + 2)
    assert 0 < found.counts.launches - stepped(model, rule, stage).counts.launches <= most
    assert (found.counts.places("waits"), found.counts.places("copies"), found.counts.slow) == ({}, {}, [])


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("rule", RULES)
def test_the_host_waits_nowhere_and_copies_nothing(rule: str, stage: int) -> None:
    counts = stepped("8 layers", rule, stage).counts
    assert (counts.places("waits"), counts.places("copies")) == ({}, {})


@pytest.mark.parametrize("rule", ["muon", "muon_squared", "adamuon"])
def test_a_rules_own_launches_grow_with_portions_and_not_with_matrices(rule: str) -> None:
    """512 matrices in 3 portions: at most 35 each, of lists that take several launches."""
    found = stepped("512 squares", rule, 3)
    assert found.portions == 3
    own = sum(op.launches for op in found.counts.ops if "/rules/" in op.place or op.place.startswith("rules/"))
    assert 0 < own <= 35 * found.portions


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
    if "cautious_weight_decay" not in rule_settings(rule).model_fields:
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
def test_a_number_of_steps_that_was_put_on_the_device_is_not_read_from_it(rule: str) -> None:
    """As DeepSpeed's reload_states does with all state, here twice: the host's own number counts on."""
    with standing(SMALL, 2, 3, name=rule) as (optimizer, collectives):
        optimizer.step()
        (state,) = optimizer.state.values()
        steps = []
        for _ in range(2):
            state["step"] = state["step"].to(META)
            collectives.counter.clear()
            optimizer.step()
            assert collectives.counter.waits == 0
            steps.append(state["step"].item())
    assert steps == [2, 3]


def test_a_number_of_steps_that_was_loaded_is_the_one_that_counts_on() -> None:
    """It went to the device before any step saw it."""
    with standing(SMALL, 2, 3, name="muon") as (optimizer, collectives):
        optimizer.step()
        saved = optimizer.state_dict()
        saved["state"][0]["step"] = torch.tensor(40.0)
        optimizer.load_state_dict(saved)
        (state,) = optimizer.state.values()
        state["step"] = state["step"].to(META)
        collectives.counter.clear()
        optimizer.step()
    assert (collectives.counter.waits, state["step"].item()) == (0, 41)


def test_a_number_of_steps_that_was_changed_on_the_device_is_read_once() -> None:
    """The host's is out of date. (What is read of the meta device is 0.)"""
    with standing(SMALL, 2, 3, name="muon") as (optimizer, collectives):
        optimizer.step()
        (state,) = optimizer.state.values()
        state["step"] = state["step"].to(META).fill_(7.0)
        waits, steps = [], []
        for _ in range(2):
            collectives.counter.clear()
            optimizer.step()
            waits.append(collectives.counter.waits)
            steps.append(state["step"].item())
    assert (waits, steps) == ([1, 0], [1, 2])


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


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("rule", ["muon", "normuon", "adamw"])
def test_a_record_of_telemetry_is_one_copy_for_which_the_host_does_not_wait(rule: str, stage: int) -> None:
    found = steady_step(SMALL, stage, 3, name=rule, telemetry={"every": 1})
    assert (found.counts.waits, found.counts.copies) == (0, 1)


@pytest.mark.parametrize("stage", [2, 3])
def test_with_offload_a_record_is_a_copy_each_way(stage: int) -> None:
    """Sums of weights and gradients are the host's, those of orthogonal factors the device's; ranks add both up there."""
    shapes = ((256, 256),) * 14 + ((256, 1024),) * 6
    plain, recorded = (
        steady_step(shapes, stage, 3, offload=True, name="muon", **more).counts for more in ({}, {"telemetry": {"every": 1}})
    )
    assert (recorded.waits - plain.waits, recorded.copies - plain.copies) == (0, 2)


def test_a_record_is_looked_at_in_the_next_step_or_when_it_is_asked_for() -> None:
    class Monitor:
        enabled = True
        written = 0

        def write_events(self, event_list: list[tuple[str, float, int]]) -> None:
            self.written += 1

    with standing(SMALL, 2, 3, name="muon", telemetry={"every": 1}) as (optimizer, _):
        monitor = Monitor()
        send_telemetry(optimizer, monitor)
        written = []
        for _ in range(3):
            optimizer.step()
            written.append(monitor.written)
        assert optimizer.telemetry["step"] == 3
    assert (written, monitor.written) == ([0, 1, 2], 3)


def test_in_plain_pytorch_the_host_waits_once_a_step() -> None:
    """For the check that gradients are finite: once for all three groups (matrices, embedding and head, biases)."""
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(32, 8, device=META), "head": torch.nn.Linear(8, 32, device=META)})
    model.add_module("layers", torch.nn.Sequential(*(torch.nn.Linear(8, 8, device=META) for _ in range(3))))
    optimizer = build_optimizer(model, {"name": "normuon", "lr": 0.02, "adamw": {"lr": 1e-3}})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with Launches() as counter:
        optimizer.step()
        counter.clear()
        optimizer.step()
    assert len(optimizer.param_groups) >= 3
    assert (counter.waits, counter.copies) == (1, 1)


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
