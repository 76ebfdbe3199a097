"""Teams: planned only where they pay, and the way of their fragments out and back.

The figures of plans are counted by hand: quintic Newton-Schulz in standard form takes 30 n^3 FLOPs for a square matrix of n
rows, and s members do 30 n^3 / s of them each.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import strategies as st
from torch import nn

from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.forecast.exchange_sizes import exchange_sizes
from ds_optforge.forecast.hardware import hardware
from ds_optforge.forecast.plan import Plan, plan_stage
from ds_optforge.forecast.report import report
from ds_optforge.forecast.step_time import Workload
from ds_optforge.forecast.topology import Topology
from ds_optforge.routing.roles import routes_of
from ds_optforge.rules.muon import MuonSettings
from ds_optforge.zero.buckets import exchange_buckets
from ds_optforge.zero.partition import Cut, Joined, Matrix, PartitionLayout, Range, cuts_of_group, cuts_of_parameters
from ds_optforge.zero.plan import ExchangePlan, Team, critical_path, make_plan
from ds_optforge.zero.teams import with_teams
from tests.zero.test_plan import FLAG, World, all_to_all, bucket_sizes, holds_for, pack, plan_of, update, worlds

MUON = MuonSettings().build()
BFLOAT16 = 2
BUCKET = 2**29


def flops(matrix: Matrix) -> int:
    return MUON.cost(matrix.rows, matrix.cols)


team_cost = partial(MUON.team_cost, "cpu")


def laid_out(shapes: Sequence[tuple[int, int]], ranks: int, stage: int = 3) -> PartitionLayout:
    cut = cuts_of_parameters if stage == 3 else cuts_of_group
    cuts, _ = cut([rows * cols for rows, cols in shapes], ranks)
    matrices = tuple(Matrix(index, 0, *shape) for index, shape in enumerate(shapes))
    return PartitionLayout(ranks, tuple(map(str, range(len(shapes)))), tuple(cuts), matrices)


def alone(layout: PartitionLayout, device: str) -> ExchangePlan:
    return make_plan(layout, flops, BUCKET, device)


def planned(layout: PartitionLayout, device: str = "cuda") -> ExchangePlan:
    return with_teams(alone(layout, device), flops, team_cost, BFLOAT16, device)


def members(plan: ExchangePlan) -> list[int]:
    return [len(team.ranks) for team in plan.teams]


class TestPlanned:
    @pytest.mark.promise("teams")
    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_one_matrix_on_four_ranks_is_four_ranks_work(self, stage: int) -> None:
        plan = planned(laid_out([(512, 512)], 4, stage), "cpu")
        assert [(team.ranks, team.rows, team.flops) for team in plan.teams] == [
            ((0, 1, 2, 3), (128, 128, 128, 128), 30 * 512**3 // 4)
        ]
        assert critical_path(plan, flops) == 30 * 512**3 // 4

    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_two_matrices_on_four_ranks_have_two_ranks_each(self, stage: int) -> None:
        plan = planned(laid_out([(512, 512)] * 2, 4, stage), "cpu")
        assert [(team.matrix, team.ranks, team.rows) for team in plan.teams] == [
            (0, (0, 1), (256, 256)),
            (1, (2, 3), (256, 256)),
        ]
        assert critical_path(plan, flops) == 30 * 512**3 // 2

    def test_a_matrix_that_is_left_over_is_shared_by_all(self) -> None:
        """Five on four ranks: one each, and a quarter of the fifth."""
        plan = planned(laid_out([(2048, 2048)] * 5, 4), "cpu")
        assert members(plan) == [4]
        assert sorted(plan.owners[index] for index in range(5) if index != plan.teams[0].matrix) == [0, 1, 2, 3]
        assert critical_path(plan, flops) == 30 * 2048**3 * 5 // 4

    @pytest.mark.promise("teams")
    @pytest.mark.parametrize(("ranks", "expected"), [(16, 13), (64, 45), (256, 45), (1024, 45), (4096, 45)])
    def test_one_large_matrix_on_many_ranks_is_cut_while_that_gains(self, ranks: int, expected: int) -> None:
        """13 of 16: three more would gain less than the twentieth for which the search goes on."""
        plan = planned(laid_out([(32768, 32768)], ranks))
        assert members(plan) == [expected]
        assert plan.teams[0].flops == 30 * 32768**2 * max(plan.teams[0].rows)

    @pytest.mark.parametrize("stage", [1, 3])
    @pytest.mark.parametrize("ranks", [16, 4096])
    def test_nothing_changes_where_gathering_takes_as_long_as_it_saves(self, ranks: int, stage: int) -> None:
        """Of 8192 rows at 2^14 FLOPs a byte: 10 gathers of n^2 elements take longer than the 30 n^3 FLOPs of one rank."""
        layout = laid_out([(8192, 8192)] * 3, ranks, stage)
        assert planned(layout) is not alone(layout, "cuda")
        assert planned(layout) == alone(layout, "cuda")

    @pytest.mark.parametrize(("matrices", "ranks"), [(12, 4), (20_000, 4_096)])
    def test_nothing_changes_where_every_rank_has_enough(self, matrices: int, ranks: int) -> None:
        layout = laid_out([(4096, 4096)] * matrices, ranks)
        plan = alone(layout, "cuda")
        assert with_teams(plan, flops, team_cost, BFLOAT16, "cuda") is plan

    def test_exchanges_with_few_matrices_each_have_teams_too(self) -> None:
        """300 on 256 ranks in three exchanges: the last third would wait for the first, and take a rank each."""
        plan = planned(laid_out([(32768, 32768)] * 300, 256))
        assert len(plan.exchanges) == 3
        assert members(plan) == [2] * 100
        assert 2 * critical_path(plan, flops) == 3 * 30 * 32768**3

    def test_the_busiest_rank_gets_no_more_than_before(self) -> None:
        for matrices in range(1, 12):
            layout = laid_out([(1024, 1024)] * matrices, 4)
            before, after = alone(layout, "cpu"), planned(layout, "cpu")
            assert busiest(after) <= busiest(before)
            assert critical_path(after, flops) <= critical_path(before, flops)

    def test_a_joined_or_misaligned_or_small_matrix_keeps_one_owner(self) -> None:
        """Blocks are multiples of 256 elements in the parameter, as blocks of 8-bit state are, and of 64 rows or more."""
        cut = (Cut(0, 512 * 512 // 4, 0),)
        for matrix in (
            Matrix(0, 0, 512, 512, joins=Joined(2, 256)),
            Matrix(0, 128, 511, 512),
            Matrix(0, 0, 100, 2048),
        ):
            assert not planned(PartitionLayout(4, ("a",), cut, (matrix,)), "cpu").teams

    def test_tensor_ranks_have_no_teams(self) -> None:
        layout = replace(laid_out([(512, 512)], 4), world_size=8, tensor_ranks=2)
        assert not planned(layout, "cpu").teams

    @pytest.mark.parametrize(("cols", "unit"), [(512, 1), (640, 2), (520, 32), (513, 256)])
    def test_blocks_begin_where_blocks_of_eight_bit_state_do(self, cols: int, unit: int) -> None:
        (team,) = planned(laid_out([(2048, cols)], 4), "cpu").teams
        assert sum(team.rows) == 2048
        assert all(rows % unit == 0 for rows in team.rows)
        assert all((before * cols) % 256 == 0 for before, _ in pairwise(sums(team.rows)))

    def test_plans_with_other_teams_have_other_fingerprints(self) -> None:
        layout = laid_out([(512, 512)], 4)
        assert planned(layout, "cpu").fingerprint != alone(layout, "cpu").fingerprint


def sums(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:index]) for index in range(len(counts) + 1)]


def busiest(plan: ExchangePlan) -> int:
    load = [0] * plan.layout.world_size
    teams = {team.matrix: team for team in plan.teams}
    for index, owner in enumerate(plan.owners):
        for rank in teams[index].ranks if index in teams else (owner,):
            load[rank] += teams[index].flops if index in teams else flops(plan.layout.matrices[index])
    return max(load)


@st.composite
def plans_with_teams(draw: st.DrawFn) -> tuple[World, ExchangePlan]:
    """Any plan, with teams of two to four members, in any order, for some matrices that have as many rows and holders."""
    world, numel = draw(worlds), draw(bucket_sizes)
    plan = plan_of(world, numel)
    teams = []
    for exchange in plan.exchanges:
        for matrix in exchange:
            rows, holders = world.layout.matrices[matrix].rows, list(world.layout.holders(matrix))
            size = draw(st.integers(1, 4))
            if size == 1 or size > min(rows, len(holders)):
                continue
            ranks = sorted(draw(st.permutations(holders))[:size])
            cuts = [0, *sorted(draw(st.permutations(range(1, rows)))[: size - 1]), rows]
            blocks = tuple(end - start for start, end in pairwise(cuts))
            teams.append(Team(matrix, tuple(ranks), blocks, 0, 0))
    teams = draw(st.permutations(teams))
    first = {team.matrix: team.ranks[0] for team in teams}
    owners = tuple(first.get(index, owner) for index, owner in enumerate(plan.owners))
    return world, replace(plan, owners=owners, teams=tuple(teams))


class TestExchange:
    @holds_for(plans_with_teams())
    def test_each_member_gets_its_rows_and_returns_them(self, drawn: tuple[World, ExchangePlan]) -> None:
        world, plan = drawn
        layout, teams = world.layout, {team.matrix: team for team in plan.teams}
        per_rank = [exchange_buckets(plan, rank) for rank in range(layout.world_size)]
        for buckets in zip(*per_rank, strict=True):
            sent = [pack(bucket, world.slices[rank], rank, layout) for rank, bucket in enumerate(buckets)]
            received = all_to_all(sent, [bucket.sends for bucket in buckets])
            for rank, (bucket, buffer) in enumerate(zip(buckets, received, strict=True)):
                for index, (rows, cols) in zip(bucket.owned, bucket.shapes, strict=True):
                    matrix = layout.matrices[index]
                    before = 0
                    if index in teams:
                        member = teams[index].ranks.index(rank)
                        before = sum(teams[index].rows[:member])
                        assert rows == teams[index].rows[member]
                    elements: list[object] = [None] * (rows * cols)
                    for place in bucket.received:
                        if place.matrix == index:
                            arrived = buffer[place.position : place.position + place.within.numel]
                            elements[place.within.start : place.within.end] = arrived
                            assert buffer[place.flag][:2] == (FLAG, index)  # type: ignore[index]
                    start = matrix.start + before * cols
                    assert elements == [(matrix.parameter, start + e) for e in range(rows * cols)]
            updates = [update(bucket, buffer) for bucket, buffer in zip(buckets, received, strict=True)]
            returned = all_to_all(updates, [bucket.receives for bucket in buckets])
            assert returned == [[item and ("updated", item) for item in buffer] for buffer in sent]

    @holds_for(plans_with_teams())
    def test_all_members_take_their_teams_in_one_order(self, drawn: tuple[World, ExchangePlan]) -> None:
        world, plan = drawn
        for rank in range(world.layout.world_size):
            for exchange, bucket in zip(plan.exchanges, exchange_buckets(plan, rank), strict=True):
                expected = [team for team in plan.teams if team.matrix in exchange and rank in team.ranks]
                assert list(bucket.teams) == expected


@holds_for(plans_with_teams())
def test_the_sizes_that_are_forecast_are_those_of_the_buckets(drawn: tuple[World, ExchangePlan]) -> None:
    _, plan = drawn
    sizes = exchange_sizes(plan)
    for rank in range(plan.layout.world_size):
        for size, bucket in zip(sizes, exchange_buckets(plan, rank), strict=True):
            assert (size.sends[rank], size.receives[rank]) == (sum(bucket.sends), sum(bucket.receives))
            assert size.keeps[rank] == bucket.sends[rank] == bucket.receives[rank]


def test_the_report_says_how_many_ranks_share_how_many_matrices() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Linear(32768, 32768, bias=False, device="meta")

    config, speeds = OptimizerConfig({"name": "muon"}), hardware("h100", None, 16)
    routes = routes_of(Net(), config)
    workload = Workload(2**19, 6 * 32768**2)
    found = plan_stage(routes, config.common.sharding, Topology(16, 3, device="cuda"), speeds, workload)
    plan = Plan("net", routes, config.common.sharding, speeds, workload, 4096, [found])
    text = " ".join(report(plan).split())
    assert "Teams on ZeRO-3: with gather, 13 ranks each orthogonalize 1 of the 1 matrices together" in text
    assert plan.plain()["stages"][0]["teams"] == {"13": 1}
    assert "orthogonalize nothing" not in text
    assert found.launches.uncounted == ("muon",)  # of teams no count of kernels is known


def test_a_block_is_a_range_of_elements() -> None:
    team = Team(0, (3, 5, 9), (2, 2, 1), 0, 0)
    assert [team.block(rank, cols=10) for rank in team.ranks] == [Range(0, 20), Range(20, 20), Range(40, 10)]
