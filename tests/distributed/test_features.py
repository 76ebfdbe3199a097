"""Every feature of DeepSpeed that the configuration can turn on, tried on ranks beside torch.optim.AdamW.

Tolerance 1e-5 as in test_parity.py. What rounds gradients is compared with one process that rounds them in the same place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tests.compatibility import OFFLOAD
from tests.distributed import cases, features
from tests.distributed.conftest import Pools

TOLERANCE = 1e-5
CPU = {"device": "cpu"}
ALL, ZERO, FLAT, CUT = (0, 1, 2, 3), (1, 2, 3), (1, 2), (3,)


class Feature(NamedTuple):
    """Sections of DeepSpeed's configuration, the stages that know them, and how the ranks' gradients then come together."""

    sections: dict[str, Any]
    stages: tuple[int, ...]
    combined: str = "mean"
    autocast: bool = False


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": settings}


# By row of tests/compatibility.py, in which a setting is tried with a value that is not its default.
FEATURES: dict[str, list[Feature]] = {
    "overlap_comm": [Feature(zero(overlap_comm=value), ZERO) for value in (True, False)],
    "contiguous_gradients": [Feature(zero(contiguous_gradients=False), ZERO)],
    "reduce_scatter": [Feature(zero(reduce_scatter=False), ZERO)],
    "round_robin_gradients": [Feature(zero(round_robin_gradients=True), FLAT)],
    "buckets": [
        Feature(zero(reduce_bucket_size=500, allgather_bucket_size=500), ZERO),
        Feature(zero(use_multi_rank_bucket_allreduce=False), FLAT),
        Feature(zero(allgather_partitions=False), FLAT),
    ],
    "parameter_alignment": [Feature(zero(parameter_alignment=True), FLAT)],
    "ignore_unused_parameters": [Feature(zero(ignore_unused_parameters=False), ZERO)],
    "prescale_gradients": [
        Feature({"prescale_gradients": True}, (0, 1)),
        Feature({"prescale_gradients": True, **zero(reduce_scatter=False)}, (2, 3)),
        Feature({"gradient_predivide_factor": 2.0}, (0, 1)),
        Feature({"gradient_predivide_factor": 2.0, **zero(reduce_scatter=False)}, (2,)),
        Feature({"prescale_gradients": True, "gradient_predivide_factor": 2.0, **zero(reduce_scatter=False)}, ZERO),
    ],
    "gradient_allreduce_op": [Feature({"gradient_allreduce_op": "sum"}, (0, 1, 2), "total")],
    "communication_data_type": [
        Feature({"communication_data_type": "fp32"}, ALL),
        Feature({"communication_data_type": "bf16"}, ALL, "mean of bf16"),
        Feature({"communication_data_type": "fp16"}, (0,), "mean of fp16"),
        Feature({"communication_data_type": "fp16"}, FLAT, "halves in fp16"),
        Feature({"communication_data_type": "fp16"}, CUT, "fp16 in halves"),
    ],
    "grad_accum_dtype": [
        Feature({"data_types": {"grad_accum_dtype": "fp32"}}, ALL),
        Feature({"data_types": {"grad_accum_dtype": "bf16"}}, (1,), "mean of bf16"),
        Feature({"data_types": {"grad_accum_dtype": "bf16"}}, (2,)),  # which rounds only what it adds to
        Feature({"data_types": {"grad_accum_dtype": "bf16"}}, CUT, "bf16 of the mean"),
    ],
    "gradient_accumulation_steps": [Feature({"gradient_accumulation_steps": 2}, ALL)],
    "torch_autocast": [
        Feature({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, (0,), autocast=True),
        Feature({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, ZERO, "mean of bf16", autocast=True),
    ],
    "sub_group_size": [Feature(zero(sub_group_size=2000), CUT)],
    "persistence": [
        Feature(zero(stage3_param_persistence_threshold=0), CUT),
        Feature(zero(stage3_param_persistence_threshold=10**6, stage3_model_persistence_threshold=1000), CUT),
    ],
    "prefetch": [
        Feature(zero(stage3_prefetch_bucket_size=0, stage3_max_live_parameters=0, stage3_max_reuse_distance=0), CUT),
        Feature(zero(stage3_use_all_reduce_for_fetch_params=True), CUT),
        Feature(zero(stage3_allgather_sequential=True), CUT),
    ],
    "memory_efficient_linear": [Feature(zero(memory_efficient_linear=False, override_module_apply=False), CUT)],
    "gather_16bit": [Feature(zero(stage3_gather_16bit_weights_on_model_save=True), CUT)],
    "offload_param": [Feature(zero(offload_param=CPU), CUT)],
    "activation_checkpointing": [Feature({"activation_checkpointing": {"partition_activations": True}}, ALL)],
    "data_efficiency": [Feature({"data_efficiency": {"enabled": True}}, ALL)],
    "profilers": [
        Feature(
            {
                "flops_profiler": {"enabled": True, "profile_step": 2},
                "comms_logger": {"enabled": True},
                "wall_clock_breakdown": True,
                "memory_breakdown": True,
            },
            ALL,
        )
    ],
}
OFFLOADED: dict[str, list[Feature]] = {
    "reduce_scatter": [Feature(zero(reduce_scatter=False, offload_optimizer=CPU), ZERO)],
    "round_robin_gradients": [Feature(zero(round_robin_gradients=True, offload_optimizer=CPU), FLAT)],
    "offload_param": [Feature(zero(offload_param=CPU, offload_optimizer=CPU), CUT)],
    "offload_pipeline": [
        Feature(zero(offload_optimizer={**CPU, "pipeline_read": True, "pipeline_write": True, "fast_init": True}), ZERO)
    ],
}


def parametrized(table: dict[str, list[Feature]], column: str | None = None) -> pytest.MarkDecorator:
    """A case per row, feature and stage, marked for its cell."""
    found = [
        pytest.param(
            row,
            feature,
            stage,
            id=f"{row}-{number}-{stage}",
            marks=pytest.mark.compatibility(row, stages=(column or stage,), verdict="exact"),
        )
        for row, of_row in table.items()
        for number, feature in enumerate(of_row)
        for stage in feature.stages
    ]
    return pytest.mark.parametrize(("row", "feature", "stage"), found)


Errors = dict[str, float]
Record = Callable[..., None]


def worst(results: list[Any], kind: str = "awkward", combined: str = "mean", autocast: bool = False) -> Errors:
    """The largest error on any rank, by optimizer; Muon's is within the tolerance."""
    errors = {
        name: max(features.error(of_rank[name], features.reference(name, kind, combined, autocast)) for of_rank in results)
        for name in features.OPTIMIZERS
    }
    assert errors["muon"] <= TOLERANCE, errors
    return errors


def configured(stage: int, sections: dict[str, Any]) -> dict[str, Any]:
    return cases.engine_config(stage, features.MUON, **sections)


@parametrized(FEATURES)
def test_a_feature_changes_nothing(row: str, feature: Feature, stage: int, pools: Pools, record_errors: Record) -> None:
    results = pools[2].run(features.train, configured(stage, feature.sections))
    record_errors(row, stage, **worst(results, combined=feature.combined, autocast=feature.autocast))


@parametrized(OFFLOADED, OFFLOAD)
def test_nor_under_offload(row: str, feature: Feature, stage: int, pools: Pools, record_errors: Record) -> None:
    record_errors(row, OFFLOAD, **worst(pools[2].run(features.train, configured(stage, feature.sections))))


@pytest.mark.compatibility("cpu", "data", "deepspeed", verdict="exact")
@pytest.mark.parametrize("stage", ALL)
def test_the_stages_themselves(stage: int, pools: Pools, record_errors: Record) -> None:
    errors = worst(pools[2].run(features.train, configured(stage, {})))
    for row in ("cpu", "data", "deepspeed"):
        record_errors(row, stage, **errors)


@pytest.mark.compatibility("cpu", "data", "deepspeed", stages=(OFFLOAD,), verdict="exact")
@pytest.mark.parametrize("stage", ZERO)
def test_offload_itself(stage: int, pools: Pools, record_errors: Record) -> None:
    errors = worst(pools[2].run(features.train, configured(stage, zero(offload_optimizer=CPU))))
    for row in ("cpu", "data", "deepspeed"):
        record_errors(row, OFFLOAD, **errors)


@pytest.mark.compatibility("hpz", stages=(3,), verdict="exact")
def test_hpz_keeps_weights_within_pairs_of_ranks(pools: Pools, record_errors: Record) -> None:
    """Four ranks: gradients, state and slices are cut over all of them, gathered weights over two."""
    results = pools[4].run(features.train, configured(3, zero(zero_hpz_partition_size=2)))
    record_errors("hpz", 3, **worst(results))


@pytest.mark.compatibility("leaf", stages=(3,), verdict="exact")
def test_leaf_modules_of_which_ranks_use_different_weights(pools: Pools, record_errors: Record) -> None:
    results = pools[2].run(features.train, configured(3, {}), "routed", leaf=True)
    record_errors("leaf", 3, **worst(results, "routed"))


@pytest.mark.compatibility("ulysses", verdict="exact")
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("stage", ALL)
def test_ulysses(stage: int, ranks: int, pools: Pools, record_errors: Record) -> None:
    """Two ranks share out a sequence; of four, the other two have another one."""
    config = configured(stage, {"train_micro_batch_size_per_gpu": 1})
    del config["train_batch_size"]  # without a sequence's ranks, which count as one, ZeRO-3 would find it wrong
    results = pools[ranks].run(features.train_sequence_parallel, config, 2)
    record_errors("ulysses", stage, **worst(results, "attention"))


@pytest.mark.compatibility("low_masters", verdict="refused")
@pytest.mark.parametrize("stage", ZERO)
def test_the_first_step_refuses_masters_in_bfloat16(stage: int, pools: Pools) -> None:
    """By `register` alone, which sees no configuration. (`initialize`: test_refused_features.py.)"""
    low = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
    for error, _ in pools[2].run(cases.first_step_under_deepspeed, configured(stage, low)):
        assert error.startswith("LayoutError: the slice that ZeRO wants stepped: got torch.bfloat16; allowed: torch.float32")
        assert "bf16.bf16_master_weights_and_grads" in error


UNSEEN_BY_REGISTER = {  # row: its configuration, and what the first step says
    "mesh": (
        {"sequence_parallel_size": 2, "data_parallel_size": 1, "train_micro_batch_size_per_gpu": 8},
        "ConfigError: sequence_parallel_size: got 2 by data_parallel_size or mesh_param; allowed: mpu=",
    ),
    "scaled_3": (
        {"gradient_predivide_factor": 2.0, **zero(reduce_scatter=False)},
        "LayoutError: gradient_predivide_factor: got 2.0, by which DeepSpeed would scale every gradient; allowed: 1.0",
    ),
}


@pytest.mark.parametrize(
    ("row", "stage"),
    [
        pytest.param(row, stage, marks=pytest.mark.compatibility(row, stages=(stage,), verdict="refused"))
        for row, stage in (("mesh", 0), ("mesh", 2), ("mesh", 3), ("scaled_3", 3))
    ],
)
def test_the_first_step_refuses_what_makes_gradients_wrong(row: str, stage: int, pools: Pools) -> None:
    """By `register` alone; with torch.optim.AdamW both train, wrongly. (`initialize`: test_refused_features.py.)"""
    sections, message = UNSEEN_BY_REGISTER[row]
    for error, stepped in pools[2].run(cases.first_step_under_deepspeed, configured(stage, sections)):
        assert error.startswith(message)
        assert not stepped


IGNORED_BY_DEEPSPEED: list[tuple[int, dict[str, Any]]] = [
    (2, {"gradient_cliping": 1.0}),
    (2, {"data_parallel_size": 2}),
    (2, {"checkpoint": {"load_universal": True}}),
    (3, {"hybrid_engine": {"enabled": True}}),
    (3, zero(elastic_checkpoint=True)),
    (2, zero(offload_optimizer={**CPU, "super_offload": True})),
    (2, zero(zero_quantized_weights=True, zero_quantized_gradients=True, zero_quantized_nontrainable_weights=True)),
]


@pytest.mark.parametrize(("stage", "sections"), IGNORED_BY_DEEPSPEED)
def test_what_the_first_step_cannot_see_changes_nothing(stage: int, sections: dict[str, Any], pools: Pools) -> None:
    """Settings that `initialize` and `check` refuse, but that DeepSpeed does not read here, or not in training."""
    worst(pools[2].run(features.train, configured(stage, sections)))
