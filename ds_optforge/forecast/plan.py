"""The answer of ``ds-optforge plan`` as data: what each optimizer and sharding mode costs on each ZeRO stage."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ds_optforge.config.sections import ShardingSettings
from ds_optforge.forecast.forecast import Forecast, forecast_routes
from ds_optforge.forecast.hardware import LAUNCH_SECONDS, Hardware
from ds_optforge.forecast.incumbent import REDUCE_BUCKET_SIZE, incumbent
from ds_optforge.forecast.launches import Launches, step_launches
from ds_optforge.forecast.memory import Memory, adamw_memory, memory, own_memory
from ds_optforge.forecast.step_time import (
    SAVING,
    Seconds,
    Workload,
    adamw_seconds,
    incumbent_seconds,
    modes,
    recommended,
)
from ds_optforge.forecast.topology import Topology
from ds_optforge.routing.roles import Route
from ds_optforge.rules.around import NOTHING, Around

ADAMW, INCUMBENT = "AdamW", "DeepSpeed's Muon"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to step the model.

    Attributes:
        name: "AdamW", "DeepSpeed's Muon", or a sharding mode.
        seconds: of an iteration.
        memory: of the rank that holds most.
        settings: fields of the "sharding" section that choose a mode; None for the other two.
    """

    name: str
    seconds: Seconds
    memory: Memory
    settings: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class StagePlan:
    """The candidates on one ZeRO stage.

    Attributes:
        predicted: the plan of the sharding modes.
        candidates: AdamW, DeepSpeed's Muon, and the sharding modes, the most exact first.
        chosen: the sharding mode that is recommended.
        launches: the kernels of a step of gather.
    """

    predicted: Forecast
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    launches: Launches

    @property
    def host_seconds(self) -> float:
        """Seconds in which the host launches the kernels of a step of gather."""
        return self.launches.kernels * LAUNCH_SECONDS

    @property
    def stage(self) -> int:
        """Of ZeRO."""
        return self.predicted.topology.stage

    @property
    def adamw(self) -> Candidate:
        """The candidate that all others are compared with."""
        return self.candidates[0]

    def over_adamw(self, candidate: Candidate) -> float:
        """Return how much longer an iteration is than AdamW's, as a share of AdamW's."""
        return candidate.seconds.iteration / self.adamw.seconds.iteration - 1.0

    def bytes_over_adamw(self, candidate: Candidate) -> int:
        """Return the bytes of a rank beyond AdamW's."""
        return candidate.memory.total - self.adamw.memory.total

    def tokens_at(self, share: float, workload: Workload) -> int:
        """Return the tokens of a step below which the chosen mode costs more than ``share`` of AdamW's iteration."""
        more = self.chosen.seconds.optimizer - self.adamw.seconds.optimizer
        model = max(more / share - self.adamw.seconds.optimizer, 0.0)
        return int(workload.tokens * model / self.adamw.seconds.model)


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole answer.

    Attributes:
        title: name of the model.
        routes, sharding: the routed parameters and the "sharding" section that were planned.
        hardware, workload: what turns counts into seconds.
        sequence_length: tokens of a sequence.
        stages: the candidates on each stage that was asked for.
        saving: share of an iteration that a less exact mode has to save.
        config: DeepSpeed configuration that the plan was made from; empty for the default.
    """

    title: str
    routes: Sequence[Route]
    sharding: ShardingSettings
    hardware: Hardware
    workload: Workload
    sequence_length: int
    stages: Sequence[StagePlan]
    saving: float = SAVING
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fitting(self) -> StagePlan | None:
        """The lowest stage whose recommendation fits the device, activations aside; None if none does."""
        limit = self.hardware.memory_gb * 1e9
        return next((found for found in self.stages if found.chosen.memory.total < limit), None)

    def configuration(self) -> dict[str, Any]:
        """Return the DeepSpeed configuration with the recommended mode: of the stage that fits, or else of the last one.

        By default its batch has the tokens that were planned, to the next sequence on every rank.
        """
        found = self.fitting or self.stages[-1]
        ranks = found.predicted.topology.world_size
        batch = ranks * -(-self.workload.tokens // (self.sequence_length * ranks))
        made: dict[str, Any] = {"train_batch_size": batch, "bf16": {"enabled": True}, "gradient_clipping": 1.0}
        config = copy.deepcopy(dict(self.config)) or made
        config["zero_optimization"] = {**config.get("zero_optimization", {}), "stage": found.stage}
        default = {"type": "OptForge", "params": {"name": "muon", "lr": 0.02, "adamw": {"lr": 3e-4}}}
        params = config.setdefault("optimizer", default)["params"]
        kept = {key: value for key, value in params.get("sharding", {}).items() if key not in ("mode", "gather_every")}
        params["sharding"] = {**(found.chosen.settings or {}), **kept}
        return config

    def plain(self) -> dict[str, Any]:
        """Return everything as JSON's types; seconds, bytes and shares are not rounded."""
        return {
            "model": self.title,
            "parameters": sum(route.numel for route in self.routes),
            "assumed": {
                **asdict(self.hardware),
                "sequence_length": self.sequence_length,
                "saving": self.saving,
                **asdict(self.workload),
            },
            "stages": [_plain(found) for found in self.stages],
            "fits": self.fitting.stage if self.fitting else None,
            "config": self.configuration(),
        }


def plan_stage(
    routes: Sequence[Route],
    sharding: ShardingSettings,
    topology: Topology,
    hardware: Hardware,
    workload: Workload,
    saving: float = SAVING,
    reduce_bucket_size: int = REDUCE_BUCKET_SIZE,
    around: Around = NOTHING,
) -> StagePlan:
    """Predict all candidates on one stage; arguments as in `Plan`, `incumbent`, `recommended` and `Members`.

    Raises:
        ConfigError: expert_parallel does not divide the experts.
    """
    predicted = forecast_routes(routes, sharding, topology, around)
    model_bytes = workload.model_bytes
    theirs = incumbent(routes, topology, model_bytes, reduce_bucket_size)
    candidates = [
        Candidate(ADAMW, adamw_seconds(predicted, hardware, workload), adamw_memory(predicted, model_bytes)),
        Candidate(
            INCUMBENT,
            incumbent_seconds(theirs, predicted, hardware, workload),
            memory(predicted, model_bytes, theirs.state_bytes, theirs.workspace_bytes),
        ),
    ]
    found = modes(predicted, hardware, workload)
    for mode in found:
        held = own_memory(predicted, model_bytes, exchanges=mode.seconds.traffic > 0 or mode.name == "gather")
        candidates.append(Candidate(mode.name, mode.seconds, held, mode.settings))
    chosen = recommended(found, saving).name
    best = next(each for each in candidates if each.name == chosen)
    return StagePlan(predicted, tuple(candidates), best, step_launches(predicted))


def _plain(found: StagePlan) -> dict[str, Any]:
    predicted = found.predicted
    return {
        "stage": found.stage,
        "world_size": predicted.topology.world_size,
        "matrices": predicted.matrices,
        "recommended": found.chosen.name,
        "candidates": [
            {
                "name": each.name,
                "sharding": dict(each.settings) if each.settings else None,
                "over_adamw": found.over_adamw(each),
                "bytes_over_adamw": found.bytes_over_adamw(each),
                "seconds": {**asdict(each.seconds), "iteration": each.seconds.iteration},
                "memory_bytes": {**asdict(each.memory), "total": each.memory.total},
            }
            for each in found.candidates
        ],
        "flops_max_over_mean": predicted.balance,
        "path_over_ideal": predicted.path_over_ideal,
        "exchanges": predicted.exchanges,
        "launches": {**asdict(found.launches), "host_seconds": found.host_seconds},
        "teams": {str(ranks): predicted.teams[ranks] for ranks in sorted(predicted.teams)},
        "ranks": [asdict(rank) for rank in predicted.ranks],
    }
