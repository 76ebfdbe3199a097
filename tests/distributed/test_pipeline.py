"""DeepSpeed's PipelineModule: stages that hold different roles train as one process does, on ZeRO-0 and ZeRO-1.

Tolerances as in test_parity: 1e-5 relative, with float32 products and wire.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_optforge
from tests.distributed import pipelines
from tests.distributed.conftest import Pools
from tests.oracles import EXACT

TOLERANCE = 1e-5
ADAMW = {"lr": 3e-3, "eps": 1e-5}
RULES: dict[str, dict[str, Any]] = {
    "muon": {"name": "muon", "lr": 0.02, "weight_decay": 0.1, "adamw": ADAMW, **EXACT},
    "normuon": {"name": "normuon", "lr": 0.02, "weight_decay": 0.1, "adamw": ADAMW, **EXACT},
    "adamw": {"name": "adamw", **ADAMW},
    "schedule_free_adamw": {"name": "schedule_free_adamw", **ADAMW},
}
Reference = tuple[list[float], dict[str, Tensor]]  # losses, and parameters by name
LAYOUTS = {"2 stages": (2, 2), "3 stages": (3, 3), "2 stages of 2 ranks": (4, 2)}  # ranks, stages


@cache
def reference(rule: str, kind: str = "plain", clip: float = 0.0) -> Reference:
    """One process, without DeepSpeed."""
    model = pipelines.whole(kind)
    return pipelines.one_process(ds_optforge.build_optimizer(model, RULES[rule]), model, clip=clip)


def assert_same(
    results: list[dict[str, Any]], expected: tuple[list[float], dict[str, Tensor]], tolerance: float = TOLERANCE
) -> None:
    """Losses on every rank; every parameter of every stage."""
    losses, parameters = expected
    found: set[str] = set()
    for result in results:
        assert result["losses"] == pytest.approx(losses, rel=tolerance)
        for name, value in result["parameters"].items():
            assert (value - parameters[name]).norm() <= tolerance * parameters[name].norm(), name
        found |= result["parameters"].keys()
    assert found == parameters.keys()


def error(results: list[dict[str, Any]], parameters: dict[str, Tensor]) -> float:
    """The largest relative error of a parameter."""
    pairs = [(value, parameters[name]) for result in results for name, value in result["parameters"].items()]
    return max(((found - expected).norm() / expected.norm()).item() for found, expected in pairs)


@cache
def control() -> dict[str, Tensor]:
    """torch.optim.AdamW in one process."""
    model = pipelines.whole()
    return pipelines.one_process(torch.optim.AdamW(model.parameters(), **ADAMW, weight_decay=0.0), model)[1]


@pytest.mark.promise("pipeline")
@pytest.mark.compatibility("pipeline", verdict="exact")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", [0, 1])
def test_a_pipeline_trains_as_one_process_does(
    stage: int, layout: str, pools: Pools, record_errors: Callable[..., None]
) -> None:
    """Each rule; the stages hold different roles. The control has one group on every stage: with several it hangs."""
    ranks, stages = LAYOUTS[layout]
    runs: list[Any] = [(pipelines.configuration(stage, params), {}) for params in RULES.values()]
    runs.append((pipelines.configuration(stage, None), {"door": "control"}))
    by_rank = pools[ranks].run(pipelines.train_each, runs, stages)
    for index, rule in enumerate(RULES):
        assert_same([results[index] for results in by_rank], reference(rule))
    ours, adamw = ([results[index] for results in by_rank] for index in (0, -1))
    record_errors("pipeline", stage, muon=error(ours, reference("muon")[1]), adamw=error(adamw, control()))


def test_norms_of_matrices_are_summed_over_the_ranks_of_their_stage(pools: Pools) -> None:
    """The first stage has two matrices, the second one, and ZeRO-1 cuts them over two ranks each."""
    params = {"name": "muon_hyperball", "lr": 0.02, "adamw": ADAMW, **EXACT}
    model = pipelines.whole()
    expected = pipelines.one_process(ds_optforge.build_optimizer(model, params), model)
    assert_same(pools[4].run(pipelines.train, pipelines.configuration(1, params), 2), expected)


@pytest.mark.compatibility("pipeline", stages=("offload",), verdict="exact")
def test_offload(pools: Pools) -> None:
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    config = pipelines.configuration(1, RULES["muon"], zero_optimization=zero, gradient_clipping=0.1)
    assert_same(pools[4].run(pipelines.train, config, 2), reference("muon", clip=0.1))


@pytest.mark.parametrize("kind", ["plain", "tied"])
@pytest.mark.parametrize("stage", [0, 1])
def test_deepspeed_clips_by_the_norm_of_all_stages_and_counts_everything_once(stage: int, kind: str, pools: Pools) -> None:
    """As torch.nn.utils.clip_grad_norm_ does with the whole model: tied weights once, placeholders not.

    (On stage 0 it counts only the gradients of the first stage of a model that was not registered.)
    """
    config = pipelines.configuration(stage, RULES["muon"], gradient_clipping=0.1)
    for ranks, stages in ((3, 3), (4, 2)):
        assert_same(pools[ranks].run(pipelines.train, config, stages, kind=kind), reference("muon", kind, clip=0.1))


@pytest.mark.parametrize("door", ["register", "object", "callable"])
def test_every_door_leads_to_the_same_run(door: str, pools: Pools) -> None:
    config = pipelines.configuration(1, RULES["muon"])
    assert_same(pools[2].run(pipelines.train, config, 2, door=door), reference("muon"))


def test_groups_of_ones_own_are_the_same_on_all_stages(pools: Pools) -> None:
    """KellerJordan's, of which the last stage has an empty one; but not of a model that was not registered."""
    config = pipelines.configuration(1, None)
    results = pools[3].run(pipelines.train, config, 3, door="groups")
    names = [group["optforge_group"] for group in results[0]["groups"]]
    assert names == ["group0.matrix.muon", "group1.embedding.adamw", "group1.scalar.adamw", "group1.unembedding.adamw"]
    assert all(result["groups"] == results[0]["groups"] for result in results)
    for message in pools[3].run(pipelines.refusal, config, 3, door="groups, not registered"):
        assert message.endswith(
            ".params[0]: is a parameter of a PipelineModule that is not registered; call ds_optforge.register(model) before "
            "the optimizer is made"
        )


def test_all_stages_have_the_same_groups_in_the_same_order(pools: Pools) -> None:
    """With the same settings, so that a scheduler finds the same on every stage; also where a pattern matches on one stage."""
    params = {**RULES["muon"], "overrides": [{"match": r"^3\.lin\.weight$", "lr": 0.01}]}
    for stage in (0, 1):
        results = pools[3].run(pipelines.train, pipelines.configuration(stage, params), 3, steps=1)
        names = [group["optforge_group"] for group in results[0]["groups"]]
        assert names == ["embedding.adamw", "matrix.muon", "scalar.adamw", "matrix.muon.override0", "unembedding.adamw"]
        assert all(result["groups"] == results[0]["groups"] for result in results)


@pytest.mark.compatibility("pipeline_tied", verdict="exact")
@pytest.mark.parametrize("stage", [0, 1])
def test_tied_layers_are_stepped_alike_on_both_stages(stage: int, pools: Pools) -> None:
    """The embedding is the head too; DeepSpeed adds up its gradients."""
    runs: list[Any] = [(pipelines.configuration(stage, RULES[rule]), {"kind": "tied"}) for rule in ("muon", "adamw")]
    for ranks, stages in ((2, 2), (4, 2), (3, 3)):
        by_rank = pools[ranks].run(pipelines.train_each, runs, stages)
        for index, rule in enumerate(("muon", "adamw")):
            results = [found[index] for found in by_rank]
            assert_same(results, reference(rule, "tied"))
            copies = [found["parameters"].get("tied_modules.embed.weight") for found in results]
            first, *others = [copy for copy in copies if copy is not None]
            assert others
            assert all(torch.equal(first, other) for other in others)


BF16 = {
    "BF16_Optimizer, stage 0": (0, "bf16"),
    "BF16_Optimizer, stage 1": (1, "fp32"),
    "DeepSpeedZeroOptimizer, stage 1": (1, "bf16"),
}


@pytest.mark.parametrize("wrapper", BF16)
def test_bf16_trains_the_same_in_one_stage_and_in_several(wrapper: str, pools: Pools) -> None:
    """To 1e-5 with AdamW and one rank per stage, where nothing is added up in another order.

    1e-3 with Muon: batches of other matrices change an update by 1e-7, which rounds a few weights to another bfloat16.
    1e-2 where data ranks add up bfloat16 gradients in another order.
    """
    stage, accumulated = BF16[wrapper]
    extra = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": accumulated}, "gradient_clipping": 1.0}
    tolerances = {"adamw": 1e-5, "muon": 1e-3}
    runs: list[Any] = [(pipelines.configuration(stage, RULES[rule], **extra), {}) for rule in tolerances]
    expected = pools[1].run(pipelines.train_each, runs, 1)[0]
    for ranks, stages in LAYOUTS.values():
        for results in pools[ranks].run(pipelines.train_each, runs, stages):
            for result, one, tolerance in zip(results, expected, tolerances.values(), strict=True):
                assert result["wrapper"] == wrapper.partition(",")[0]
                assert result["losses"] == pytest.approx(one["losses"], rel=1e-2 if ranks == 4 else tolerance)


@pytest.mark.parametrize("stage", [0, 1])
def test_telemetry_is_that_of_the_whole_model(stage: int, pools: Pools) -> None:
    config = pipelines.configuration(stage, {**RULES["muon"], "telemetry": {"every": 2}})
    expected = pools[1].run(pipelines.train, config, 1)[0]["telemetry"]
    for ranks, stages in LAYOUTS.values():
        for result in pools[ranks].run(pipelines.train, config, stages):
            assert result["telemetry"]["groups"].keys() == expected["groups"].keys()
            for group, numbers in expected["groups"].items():
                found = result["telemetry"]["groups"][group]
                assert found.keys() == numbers.keys()
                for name in numbers.keys() - {"state_bytes"}:
                    assert found[name] == pytest.approx(numbers[name], rel=1e-4), (group, name)


@pytest.mark.compatibility("pipeline", verdict="refused")
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_2_and_3_are_refused_on_all_ranks(stage: int, pools: Pools) -> None:
    config = pipelines.configuration(stage, RULES["muon"])
    for message in pools[2].run(pipelines.refusal, config, 2):
        assert message == (
            f"ConfigError: zero_optimization.stage: got {stage} with a PipelineModule; allowed: 0, 1 (DeepSpeed has no other)"
        )


def test_an_error_on_one_stage_is_an_error_on_all(pools: Pools) -> None:
    """A matrix rule for the last stage's norm."""
    params = {**RULES["muon"], "overrides": [{"match": r"^4\.bias$", "name": "muon"}]}
    for door in ("initialize", "register"):
        for message in pools[2].run(pipelines.refusal, pipelines.configuration(1, params), 2, door=door):
            assert message.startswith("ConfigError: stage 1 of the pipeline: 4.bias: got rule 'muon' for shape (88,)")


def test_a_scheduler_that_flattens_is_refused_on_all_stages(pools: Pools) -> None:
    """Also on the last, which has no matrix: all stages see the rates of all groups."""
    scheduler = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.01, "warmup_num_steps": 2}}
    config = pipelines.configuration(1, RULES["muon"], scheduler=scheduler)
    for message in pools[3].run(pipelines.refusal, config, 3, door="register"):
        assert message.startswith("ConfigError: scheduler: the groups are configured with different rates")


def test_a_stage_without_trainable_parameters_is_refused_on_all_stages(pools: Pools) -> None:
    for message in pools[3].run(pipelines.refusal, pipelines.configuration(1, RULES["muon"]), 3, kind="frozen"):
        assert message == ("ConfigError: stage 2 of the pipeline: got no trainable parameter; allowed: at least one")


def test_weights_for_evaluation_are_the_averages_on_every_stage(pools: Pools) -> None:
    """Schedule-Free."""
    found = [
        pools[ranks].run(pipelines.averages, pipelines.configuration(1, RULES["schedule_free_adamw"]), stages)
        for ranks, stages in ((1, 1), (3, 3))
    ]
    expected = found[0][0]
    for result in found[1]:
        for name, (inside, after) in result.items():
            assert torch.allclose(inside, expected[name][0], rtol=1e-4, atol=1e-6), name
            assert torch.allclose(after, expected[name][1], rtol=1e-4, atol=1e-6), name
            assert not torch.equal(inside, after)


def test_a_pattern_that_matches_on_no_stage_is_refused_on_all_stages(pools: Pools) -> None:
    """With the nearest names of all stages."""
    params = {**RULES["muon"], "overrides": [{"match": r"^5\.wieght$", "lr": 0.01}]}
    for message in pools[2].run(pipelines.refusal, pipelines.configuration(1, params), 2):
        assert message.startswith("ConfigError: optimizer.params.overrides[0].match: ")
        assert "nearest: 5.weight" in message


def test_a_matrix_rule_for_a_tied_weight_is_refused_on_all_stages(pools: Pools) -> None:
    for message in pools[2].run(pipelines.refusal, pipelines.configuration(1, RULES["muon"]), 2, kind="tied_block"):
        assert message.startswith(
            "ConfigError: stage 0 of the pipeline: tied_modules.block.weight: got rule 'muon' for a weight"
        )


def test_the_end_of_a_sequential_language_model_is_its_head() -> None:
    """An nn.Sequential with an embedding; a small one inside a layer, or without embedding, is none."""
    groups = ds_optforge.build_optimizer(pipelines.whole(), RULES["muon"]).param_groups
    assert [group["optforge_group"] for group in groups][-1] == "unembedding.adamw"
    mlp = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.GELU(), torch.nn.Linear(8, 8, bias=False))
    for model in (mlp, torch.nn.ModuleDict({"embed": torch.nn.Embedding(50, 8), "mlp": mlp})):
        found = ds_optforge.build_optimizer(model, RULES["muon"]).param_groups
        assert [group["optforge_group"] for group in found][-1] == "matrix.muon"
