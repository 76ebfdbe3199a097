"""Forecasts: the figures are those of the plan that runs, the shipped models stay as balanced as promised."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.config.sections import ShardingSettings
from ds_optforge.errors import ConfigError
from ds_optforge.forecast import skeletons
from ds_optforge.forecast.advice import better_bucket
from ds_optforge.forecast.catalog import MODEL_SHAPES
from ds_optforge.forecast.exchange_sizes import exchange_sizes
from ds_optforge.forecast.forecast import Forecast, forecast, forecast_routes, lay_out
from ds_optforge.forecast.hardware import Hardware
from ds_optforge.forecast.launches import step_launches
from ds_optforge.forecast.step_time import Mode, Workload, model_seconds, modes, recommended
from ds_optforge.forecast.topology import Topology
from ds_optforge.routing import roles, tags
from ds_optforge.routing.roles import Route
from ds_optforge.zero.buckets import Kept, exchange_buckets
from ds_optforge.zero.partition import Matrix
from ds_optforge.zero.plan import make_plan
from tests.models import AwkwardNet
from tests.rules.registering import registered
from tests.rules.summing import SilentSettings, Summing, SummingSettings

MUON = OptimizerConfig({"name": "muon"})
ONE_SUB_GROUP = 10**15
HARDWARE = Hardware(100.0, 100.0)
WORKLOAD = Workload(2**19, 6 * 8e9)


def routed(model: nn.Module, config: OptimizerConfig = MUON) -> list[Route]:
    tags.tag(model)
    return [roles.route(parameter, config) for parameter in model.parameters()]


@cache
def routes_of(model: str) -> tuple[Route, ...]:
    return tuple(routed(skeletons.load(model)))


@cache
def predicted(model: str, world_size: int, stage: int, sub_group_size: int = ONE_SUB_GROUP) -> Forecast:
    return forecast_routes(routes_of(model), ShardingSettings(), Topology(world_size, stage, 1, sub_group_size))


def cubic(matrix: Matrix) -> int:
    return min(matrix.rows, matrix.cols) ** 2 * max(matrix.rows, matrix.cols)


class TestModelShapes:
    PUBLISHED: Mapping[str, float] = {
        "gpt2": 124.44e6,
        "gpt2-medium": 354.82e6,
        "gpt2-large": 774.03e6,
        "gpt2-xl": 1557.61e6,
        "llama3-8b": 8.03e9,
        "llama3-70b": 70.55e9,
        "mixtral-8x7b": 46.70e9,
        "kimi-k2": 1.03e12,
    }

    @pytest.mark.parametrize("model", MODEL_SHAPES)
    def test_every_table_has_the_published_number_of_parameters(self, model: str) -> None:
        assert sum(prod(shape) for _, shape in MODEL_SHAPES[model]) == pytest.approx(self.PUBLISHED[model], rel=0.005)

    @pytest.mark.parametrize("model", ["gpt2", "llama3-8b"])
    def test_embeddings_head_and_vectors_are_no_matrices(self, model: str) -> None:
        found = {route.name: route.role for route in routes_of(model) if not route.matrices}
        assert found["token_embedding.weight"] == "embedding"
        assert found.get("lm_head.weight", "unembedding") == "unembedding"
        assert {route.role for route in routes_of(model) if len(route.shape) == 1} == {"scalar"}

    def test_a_bank_of_experts_is_as_many_matrices(self) -> None:
        bank = next(route for route in routes_of("mixtral-8x7b") if route.name == "layers.0.experts.down")
        assert [(rows, cols) for _, rows, cols in bank.matrices] == [(4096, 14336)] * 8

    def test_an_unknown_model_is_named_with_what_is_allowed(self) -> None:
        with pytest.raises(
            ConfigError,
            match=r"model: got 'gpt5' \(did you mean 'gpt2'\?\); allowed: gpt2, .*kimi-k2, or the path of .* config\.json",
        ):
            skeletons.load("gpt5")


class TestBytes:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.booleans()), min_size=1, max_size=6),
        st.integers(1, 20),
        st.sampled_from([2, 3]),
        st.sampled_from([1, 20, 10_000]),
        st.sampled_from([Kept(), Kept(("row",), 1), Kept(("row", "matrix"), 2)]),
    )
    def test_the_sizes_are_those_of_the_buckets_that_run(
        self, banks: list[tuple[int, int, int, bool]], world_size: int, stage: int, bucket_numel: int, kept: Kept
    ) -> None:
        layout, _ = lay_out([bank(index, *shape) for index, shape in enumerate(banks)], world_size, stage)
        plan = make_plan(layout, cubic, bucket_numel)
        sizes = exchange_sizes(plan, kept)
        for rank in range(world_size):
            buckets = exchange_buckets(plan, rank, kept)
            assert [(size.sends[rank], size.receives[rank]) for size in sizes] == [
                (bucket.send_numel, bucket.receive_numel) for bucket in buckets
            ]
            assert [size.travels(rank) for size in sizes] == [
                sum(b.sends) - b.sends[rank] + sum(b.receives) - b.receives[rank] for b in buckets
            ]

    def test_sums_over_matrices_and_rows_are_counted(self) -> None:
        """4 per matrix and 5 per row, of 8 bytes each; of 2 ranks each sends a half of them there and a half back."""

        class WithoutStatistics(Summing):
            statistics = ()

        class Settings(SummingSettings):
            rule, title, builds = "sums_alone", "Sums alone", WithoutStatistics

            def build(self) -> WithoutStatistics:
                return WithoutStatistics()

        model = nn.Sequential(nn.Linear(40, 24, bias=False), nn.Linear(24, 40, bias=False))
        with registered(Settings, SilentSettings):
            summed, silent = (
                forecast_routes(routed(model, OptimizerConfig({"name": name})), ShardingSettings(), Topology(2, 3))
                for name in ("sums_alone", "silent")
            )
        added = [one.sent_bytes - other.sent_bytes for one, other in zip(summed.ranks, silent.ranks, strict=True)]
        assert added == [8 * (4 * 2 + 5 * (24 + 40))] * 2
        assert [mode.name for mode in modes(summed, HARDWARE, WORKLOAD)] == ["gather"]  # what `check` would refuse
        assert len(modes(silent, HARDWARE, WORKLOAD)) > 2

    @pytest.mark.parametrize("world_size", [2, 4, 8, 32])
    def test_on_zero_3_every_matrix_travels_there_and_back_but_for_the_owners_part(self, world_size: int) -> None:
        """All ranks together: 2 (w - 1) / w P elements of 2 bytes, and 8 more per fragment each way, one of which is a flag."""
        found = predicted("llama3-8b", world_size, 3)
        numel = sum(route.numel for route in routes_of("llama3-8b") if route.matrices)
        assert all(route.numel % world_size == 0 for route in routes_of("llama3-8b"))
        flags = 2 * 2 * 8 * (world_size - 1) * found.matrices
        sent = sum(rank.sent_bytes for rank in found.ranks)
        assert sent == 2 * 2 * numel * (world_size - 1) // world_size + flags

    @pytest.mark.parametrize(("key", "value"), [("average", {"kind": "ema"}), ("ema_nesterov", {})])
    def test_what_is_around_rules_adds_a_float_an_element(self, key: str, value: dict[str, object]) -> None:
        """Whatever the state format. Of the rank's slice, padding included."""
        model = skeletons.load("gpt2")
        params = {"name": "muon", "state_dtype": "bfloat16"}
        found = [forecast(model, OptimizerConfig({**params, **more}), Topology(8, 3)) for more in ({}, {key: value})]
        for before, after in zip(found[0].ranks, found[1].ranks, strict=True):
            assert after.state_bytes - before.state_bytes == 4 * after.slice_numel

    def test_normuon_adds_one_float_a_row(self) -> None:
        """4 bytes per output row, where the row's first element does not lie with the owner, each way."""
        muon, normuon = (
            forecast_routes(routed(skeletons.load("gpt2"), OptimizerConfig({"name": name})), ShardingSettings(), Topology(8, 3))
            for name in ("muon", "normuon")
        )
        rows = sum(rows for route in routes_of("gpt2") for _, rows, _ in route.matrices)
        more = sum(n.sent_bytes - m.sent_bytes for m, n in zip(muon.ranks, normuon.ranks, strict=True))
        assert more == 2 * 4 * rows * 7 // 8
        state = sum(n.state_bytes - m.state_bytes for m, n in zip(muon.ranks, normuon.ranks, strict=True))
        assert state == 4 * rows

    def test_on_zero_2_only_straddling_fragments_travel(self) -> None:
        net = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(3))
        # Three slices of 144 elements: no cut goes through a matrix.
        assert sum(rank.sent_bytes for rank in forecast(net, MUON, Topology(3, 2)).ranks) == 0
        # Two of 216: the second matrix is cut in halves of 72 elements; each rank sends one there or back, with a flag 80.
        found = forecast(net, MUON, Topology(2, 2))
        assert [rank.sent_bytes for rank in found.ranks] == [2 * 80] * 2
        assert sum(rank.matrices for rank in found.ranks) == 3

    @pytest.mark.parametrize(("rows", "elements", "flops"), [(None, 80, 51840), (0.5, 36 + 1, 9504), (0.25, 18 + 1, 1620)])
    def test_only_chosen_rows_are_sent_and_orthogonalized(self, rows: float | None, elements: int, flops: int) -> None:
        """As above, if every row is chosen as often as another, with a flag and no gaps.

        And a sum of 8 bytes per row, half of it there and half back.

        Five quintic steps on 12, 6 and 3 rows of 12, n of m: 20 n^2 m + 10 n^3, or 8 n^2 m + 28 n^3 if that is less.
        """
        net = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(3))
        config = OptimizerConfig({"name": "muon", "nesterov": False, "sharding": {"rows": rows}})
        found = forecast(net, config, Topology(2, 2))
        assert [rank.sent_bytes for rank in found.ranks] == [2 * elements + (8 * 12 if rows else 0)] * 2
        assert sum(rank.flops for rank in found.ranks) == 3 * flops
        assert step_launches(found).uncounted == (("muon",) if rows else ())  # of chosen rows no count of kernels is known

    def test_one_rank_sends_nothing(self) -> None:
        for stage in (1, 2, 3):
            found = forecast(AwkwardNet(shapes=True), MUON, Topology(1, stage))
            assert (found.ranks[0].sent_bytes, found.exchanges, found.shard_rows) == (0, 0, Counter())
            assert found.ranks[0].shard_flops == found.ranks[0].flops == found.critical_path


def bank(index: int, count: int, rows: int, cols: int, transposed: bool) -> Route:
    places = tuple((expert * rows * cols, rows, cols) for expert in range(count))
    return Route(f"p{index}", (count, rows, cols), count * rows * cols, "matrix", MUON.main, places, transposed, "matrix")


def test_flops_are_those_of_the_device_that_is_planned_for() -> None:
    """5 steps of a steep set on 8 x 64: the standard form on a CPU, 20 n^2 m + 10 n^3; on CUDA the Gram form, 8 and 28."""
    config = OptimizerConfig({"name": "muon", "orthogonalization": {"coefficients": "polar_express"}})
    net = nn.Sequential(nn.Linear(64, 8, bias=False))
    on = {device: forecast(net, config, Topology(1, 3, device=device)).ranks[0].flops for device in ("cpu", "cuda")}
    assert on == {"cpu": 20 * 8**2 * 64 + 10 * 8**3, "cuda": 8 * 8**2 * 64 + 28 * 8**3}


class TestBalance:
    """The shipped models with default settings. FLOPs of the busiest rank over the mean."""

    @pytest.mark.parametrize("world_size", [8, 32])
    def test_llama_3_8b_waits_for_no_rank_for_long(self, world_size: int) -> None:
        found = predicted("llama3-8b", world_size, 3, Topology(1, 3).sub_group_size)
        assert found.path_over_ideal <= 1.15
        assert found.balance <= 1.05

    @pytest.mark.parametrize("world_size", [8, 32, 64])
    @pytest.mark.parametrize("model", [name for name in MODEL_SHAPES if name != "kimi-k2"])
    def test_zero_3_with_at_least_8_matrices_a_rank(self, model: str, world_size: int) -> None:
        found = predicted(model, world_size, 3)
        if found.matrices >= 8 * world_size:
            assert found.balance <= 1.05

    @pytest.mark.parametrize("world_size", [8, 32, 64])
    @pytest.mark.parametrize("model", [name for name in MODEL_SHAPES if name != "kimi-k2"])
    def test_zero_2_with_at_least_6_matrices_a_rank(self, model: str, world_size: int) -> None:
        found = predicted(model, world_size, 2)
        if found.matrices >= 6 * world_size:
            assert found.balance <= 1.15

    @pytest.mark.parametrize(("world_size", "stage"), [(64, 2), (64, 3), (256, 3)])
    def test_a_trillion_parameters(self, world_size: int, stage: int) -> None:
        """On ZeRO-2 and more ranks no choice among straddling matrices is balanced: attention is dearer than experts."""
        assert predicted("kimi-k2", world_size, stage).balance <= (1.05 if stage == 3 else 1.15)

    def test_a_larger_bucket_is_found_where_matrices_are_larger_than_buckets(self) -> None:
        now = predicted("llama3-70b", 32, 3)
        bucket = better_bucket(routes_of("llama3-70b"), ShardingSettings(), now.topology, now)
        assert bucket is not None
        assert bucket[0] > 2**26
        assert now.path_over_ideal > 1.5
        assert bucket[1].path_over_ideal <= 1.15

    def test_a_bucket_that_is_large_enough_is_left(self) -> None:
        routes, sharding = routes_of("llama3-8b"), ShardingSettings(bucket_numel=2**27)
        topology = predicted("llama3-8b", 8, 3).topology
        assert better_bucket(routes, sharding, topology, forecast_routes(routes, sharding, topology)) is None


class TestTopology:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ((0, 3), "world size: got 0; allowed: at least 1"),
            ((8, 0), "stage: got 0; allowed: 1, 2, 3"),
            ((8, 4), "stage: got 4; allowed: 1, 2, 3"),
            ((8, 2, 3), "expert parallel: got 3; allowed: a divisor of 8 ranks"),
            ((8, 3, 2), "expert parallel: got 2 on stage 3; allowed: 1"),
        ],
    )
    def test_impossible_numbers_are_named(self, arguments: Sequence[int], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            Topology(*arguments)

    def test_expert_parallel_ranks_share_out_the_experts(self) -> None:
        """8 experts over 4 ranks; each pair is cut over 2 ranks, everything else over 8."""
        together = forecast_routes(routes_of("mixtral-8x7b"), ShardingSettings(), Topology(8, 2))
        found = forecast_routes(routes_of("mixtral-8x7b"), ShardingSettings(), Topology(8, 2, expert_parallel=4))
        assert found.matrices == together.matrices == sum(rank.matrices for rank in found.ranks)
        assert sum(rank.flops for rank in found.ranks) == sum(rank.flops for rank in together.ranks)

    def test_a_number_of_ranks_that_does_not_divide_the_experts(self) -> None:
        with pytest.raises(ConfigError, match=r"got 16; allowed: a divisor of the 8 experts of layers\.0\.experts\.gate"):
            forecast_routes(routes_of("mixtral-8x7b"), ShardingSettings(), Topology(16, 2, expert_parallel=16))

    def test_zero_3_steps_sub_groups_one_after_another(self) -> None:
        """Each linear has 144 elements, 72 on each rank: a sub-group of 100 has two of them."""
        net = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(5))
        found = forecast(net, MUON, Topology(2, 3, sub_group_size=100))
        assert (found.sub_groups, found.exchanges) == (3, 3)
        assert found.critical_path == 3 * found.largest

    def test_zero_2_aligns_a_group_to_two_elements_a_rank(self) -> None:
        layout, numel = lay_out([bank(0, 1, 5, 5, False), bank(1, 1, 3, 3, False)], 4, 2)
        assert numel == 10  # 34 elements, padded to 40
        assert [cut.base for cut in layout.cuts] == [0, 25]


class TestModes:
    """Llama 3 8B on 64 ranks and ZeRO-3."""

    FOUND = ("llama3-8b", 64, 3)

    def figures(self, tflops: float, link_gbps: float) -> list[Mode]:
        return modes(predicted(*self.FOUND), Hardware(tflops, link_gbps), WORKLOAD)

    def test_seconds_come_from_the_slowest_rank(self) -> None:
        found, candidates = predicted(*self.FOUND), self.figures(100, 400)
        gather, alone = candidates[0].seconds, candidates[-1].seconds
        assert gather.orthogonalization == pytest.approx(found.critical_path / 1e14)
        assert gather.traffic == pytest.approx(max(rank.sent_bytes for rank in found.ranks) * 8 / 4e11)
        assert alone.traffic == 0
        assert alone.optimizer == pytest.approx(max(rank.shard_flops for rank in found.ranks) / 1e14 + alone.elementwise)

    def test_all_but_the_first_and_last_of_the_exchanges_hide_behind_products(self) -> None:
        found, (gather, *_) = predicted(*self.FOUND), self.figures(100, 400)
        products, gathers = gather.seconds.orthogonalization, max(rank.gathered_bytes for rank in found.ranks) * 8 / 4e11
        traffic = max(rank.sent_bytes - rank.gathered_bytes for rank in found.ranks) * 8 / 4e11
        assert products > traffic
        expected = products + gathers + traffic / found.exchanges + gather.seconds.elementwise
        assert gather.seconds.optimizer == pytest.approx(expected)

    def test_a_period_averages_its_steps(self) -> None:
        gather, every_2, *_, alone = self.figures(100, 400)
        assert every_2.settings == {"mode": "shard_local", "gather_every": 2}
        for name in ("orthogonalization", "traffic", "optimizer"):
            both = getattr(gather.seconds, name) + getattr(alone.seconds, name)
            assert getattr(every_2.seconds, name) == pytest.approx(both / 2)

    def test_gather_is_recommended_until_another_mode_saves_the_stated_share_of_the_step(self) -> None:
        candidates = self.figures(100, 400)
        saved = 1 - candidates[-1].seconds.iteration / candidates[0].seconds.iteration
        assert saved > 0
        assert recommended(candidates, 1.001 * saved).name == "gather"
        assert recommended(candidates, 0.999 * saved).name != "gather"

    @pytest.mark.parametrize("tflops", [0.1, 1, 10, 100, 1000])
    def test_no_less_exact_mode_saves_it_beyond_the_recommendation(self, tflops: float) -> None:
        candidates = self.figures(tflops, 400)
        chosen = recommended(candidates, 0.05)
        index = candidates.index(chosen)
        assert all(each.seconds.iteration > 0.95 * chosen.seconds.iteration for each in candidates[index + 1 :])
        for before in candidates[:index]:
            assert min(each.seconds.iteration for each in candidates) <= 0.95 * before.seconds.iteration

    def test_where_no_matrix_is_cut_there_is_nothing_to_choose(self) -> None:
        """The newcomer's case: Mixtral on 8 ranks and ZeRO-2, for which shard_local was once recommended."""
        found = predicted("mixtral-8x7b", 8, 2)
        assert not found.shard_rows
        assert [mode.name for mode in modes(found, HARDWARE, WORKLOAD)] == ["gather"]

    def test_an_iteration_is_no_shorter_than_zeros_own_traffic(self) -> None:
        """On ZeRO-3 every rank sends its part of all weights twice and of all gradients once."""
        found = predicted("llama3-8b", 8, 3)
        padded = found.ranks[0].slice_numel
        slow = model_seconds(found, Hardware(100.0, 1.0), Workload(1, 1.0))
        assert slow == pytest.approx(3 * 7 * padded * 2 * 8 / 1e9)
        assert model_seconds(found, Hardware(100.0, 1e9, 400.0), WORKLOAD) == pytest.approx(2**19 * 6 * 8e9 / (8 * 4e14))

    @pytest.mark.parametrize("speeds", [(0, 100), (100, -1), (float("nan"), 100), (100, float("inf"))])
    def test_speeds_are_positive(self, speeds: tuple[float, float]) -> None:
        with pytest.raises(ConfigError, match="allowed: a positive number"):
            Hardware(*speeds)


class TestState:
    @pytest.mark.parametrize(("state_dtype", "size"), [("float32", 4), ("bfloat16", 2)])
    def test_bytes_of_the_slices(self, state_dtype: str, size: int) -> None:
        """One momentum buffer of 144 elements over two ranks."""
        config: dict[str, Any] = {"name": "muon", "state_dtype": state_dtype}
        found = forecast(nn.Linear(12, 12, bias=False), OptimizerConfig(config), Topology(2, 3))
        assert [rank.state_bytes for rank in found.ranks] == [72 * size] * 2

    def test_elementwise_rules_have_state_and_nothing_else(self) -> None:
        found = forecast(nn.Linear(12, 12), OptimizerConfig({"name": "adamw"}), Topology(2, 3))
        assert found.matrices == found.exchanges == found.critical_path == 0
        assert [rank.state_bytes for rank in found.ranks] == [2 * 4 * (72 + 6)] * 2
