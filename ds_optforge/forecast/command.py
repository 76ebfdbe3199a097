"""What ``ds-optforge plan`` does."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_optforge.config.deepspeed import load_config, optimizer_section
from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.errors import ConfigError
from ds_optforge.forecast.hardware import UTILISATION, hardware
from ds_optforge.forecast.incumbent import REDUCE_BUCKET_SIZE
from ds_optforge.forecast.model_flops import flops_per_token, geometry_of
from ds_optforge.forecast.plan import Plan, plan_stage
from ds_optforge.forecast.report import report
from ds_optforge.forecast.skeletons import load
from ds_optforge.forecast.step_time import BATCH_TOKENS, SAVING, SEQUENCE_LENGTH, Workload
from ds_optforge.forecast.topology import SUB_GROUP_SIZE, Topology
from ds_optforge.routing.roles import routes_of
from ds_optforge.terminal import progress


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked. None takes a default that depends on the rest.

    Attributes:
        model: see `skeletons.load`.
        world_size, expert_parallel: see `Topology`.
        stage: of ZeRO; None: that of the configuration, or else all of 1, 2 and 3.
        config: path of a DeepSpeed configuration; None: muon as it is by default, in bfloat16.
        device, link, utilisation, tflops, link_gbps: see `hardware`.
        tokens: of a step; None: half a million, or a sequence a rank if that is more.
        sequence_length: tokens of a sequence.
        saving: share of an iteration for which a less exact mode is recommended.
    """

    model: str
    world_size: int
    stage: int | None = None
    expert_parallel: int = 1
    config: str | None = None
    device: str = "h100"
    link: str | None = None
    utilisation: float = UTILISATION
    tflops: float | None = None
    link_gbps: float | None = None
    tokens: int | None = None
    sequence_length: int = SEQUENCE_LENGTH
    saving: float = SAVING


def answer(question: Question) -> Plan:
    """Plan every stage that is asked for.

    Raises:
        ConfigError: a number that no run can have, a configuration that does not fit the model, or an unknown model.
    """
    if not 0 < question.saving < 1:
        raise ConfigError(f"saving: got {question.saving:g}; allowed: a share of the step between 0 and 1")
    if question.sequence_length < 1:
        raise ConfigError(f"sequence length: got {question.sequence_length}; allowed: at least 1")
    loaded = load_config(question.config) if question.config else {}
    config = OptimizerConfig(optimizer_section(loaded) if loaded else {"name": "muon"})
    asked = _stages(question, loaded)
    sub_group_size = _size_of(loaded, "sub_group_size", SUB_GROUP_SIZE)
    topologies = [
        Topology(question.world_size, stage, question.expert_parallel, sub_group_size, device="cuda") for stage in asked
    ]
    tokens = question.tokens
    if tokens is None:
        tokens = max(BATCH_TOKENS, question.world_size * question.sequence_length)
    speeds = hardware(
        question.device, question.link, question.world_size, question.utilisation, question.tflops, question.link_gbps
    )
    model = load(question.model)
    routes = routes_of(model, config)
    per_token = flops_per_token(routes, geometry_of(question.model, model), question.sequence_length)
    workload = Workload(tokens, per_token, _model_bytes(loaded))
    sharding = config.common.sharding
    reduced = _size_of(_without_auto(loaded), "reduce_bucket_size", REDUCE_BUCKET_SIZE)
    stages = []
    with progress("ZeRO stages", len(topologies)) as advance:
        for topology in topologies:
            stages.append(plan_stage(routes, sharding, topology, speeds, workload, question.saving, reduced, config.around))
            advance(1)
    return Plan(
        question.model, routes, sharding, speeds, workload, question.sequence_length, stages, question.saving, _whole(loaded)
    )


def text_of(plan: Plan, as_json: bool) -> str:
    """Return what to print."""
    return json.dumps(plan.plain(), indent=2) + "\n" if as_json else report(plan)


def _stages(question: Question, loaded: Mapping[str, Any]) -> list[int]:
    if question.stage is not None:
        return [question.stage]
    configured = _zero(loaded).get("stage")
    if configured is not None:
        return [configured]
    return [1, 2] if question.expert_parallel > 1 else [1, 2, 3]


def _zero(config: Mapping[str, Any]) -> Mapping[str, Any]:
    section = config.get("zero_optimization")
    return section if isinstance(section, Mapping) else {}


def _without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the bucket size that the HF Trainer will fill in."""
    kept = {key: value for key, value in _zero(config).items() if (key, value) != ("reduce_bucket_size", "auto")}
    return {"zero_optimization": kept}


def _whole(loaded: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration that was read; of a file with the "params" alone, a whole one around them."""
    return loaded if not loaded or "optimizer" in loaded else {"optimizer": {"type": "OptForge", "params": dict(loaded)}}


def _model_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of an element of the model: 2 where the configuration trains in 16 bits, and where there is none."""
    narrow = any(isinstance(config.get(key), Mapping) and config[key].get("enabled", False) for key in ("bf16", "fp16"))
    return 2 if narrow or "optimizer" not in config else 4


def _size_of(config: Mapping[str, Any], key: str, default: int) -> int:
    """Read a size of zero_optimization as DeepSpeed does: 1e9 means 1000000000. Raises ConfigError."""
    found = _zero(config).get(key, default)
    if isinstance(found, bool) or not isinstance(found, int | float) or found < 1:
        raise ConfigError(f"zero_optimization.{key}: got {found!r}; allowed: a number of at least 1")
    return int(found)
