"""Seconds of an iteration with AdamW, with DeepSpeed's Muon and with each sharding mode, from counted FLOPs and bytes.

An iteration with AdamW lasts as long as its forward and backward pass at the stated utilisation, or as ZeRO's own traffic
(that of one micro-batch) if that is longer, and then reads and writes its slices once. Other optimizers add their time
to it; what they save beside AdamW counts for them. Launches and waiting of the host are not part of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_optforge.errors import ConfigError
from ds_optforge.forecast.forecast import Forecast
from ds_optforge.forecast.hardware import Hardware
from ds_optforge.forecast.incumbent import Incumbent

BATCH_TOKENS = 2**19  # half a million, as for models up to 1.3 billion parameters in Brown et al. 2020 (arXiv 2005.14165)
SEQUENCE_LENGTH = 4096
SAVING = 0.05  # of an iteration: the least for which a less exact mode is recommended

_ADAMW_BYTES = 28  # of an element: the gradient read; weight and both moments read and written
_PERIODS = (2, 5, 10)


@dataclass(frozen=True, slots=True)
class Workload:
    """What an iteration computes beside the optimizer.

    Attributes:
        tokens: of a step, on all ranks together.
        flops_per_token: of the forward and backward pass.
        model_bytes: of an element of weights and gradients: 2 in bfloat16.

    Raises:
        ConfigError: no tokens.
    """

    tokens: int
    flops_per_token: float
    model_bytes: int = 2

    def __post_init__(self) -> None:
        """Check the number of tokens."""
        if self.tokens < 1:
            raise ConfigError(f"tokens per step: got {self.tokens}; allowed: at least 1")


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds of a step on the slowest rank.

    Attributes:
        orthogonalization, traffic, elementwise: of the optimizer, each for itself.
        optimizer: of them together, as far as they do not overlap.
        model: the rest of the iteration.
    """

    orthogonalization: float
    traffic: float
    elementwise: float
    optimizer: float
    model: float

    @property
    def iteration(self) -> float:
        """Seconds of the whole iteration."""
        return self.model + self.optimizer


@dataclass(frozen=True, slots=True)
class Mode:
    """A sharding mode and its predicted time, the mean over its steps.

    Attributes:
        name: title of the mode.
        settings: fields of the "sharding" section that choose it.
        seconds: of a step.
    """

    name: str
    settings: Mapping[str, Any]
    seconds: Seconds


def model_seconds(predicted: Forecast, hardware: Hardware, workload: Workload) -> float:
    """Return the seconds of an iteration without its optimizer."""
    ranks = predicted.topology.world_size
    compute = workload.tokens * workload.flops_per_token / (ranks * hardware.model_tflops * 1e12)
    return max(compute, _on_link(workload.model_bytes * predicted.zero_numel, hardware))


def adamw_seconds(predicted: Forecast, hardware: Hardware, workload: Workload) -> Seconds:
    """Return the seconds with torch's fused AdamW on the same slices: bound by memory."""
    elementwise = _in_memory(_ADAMW_BYTES * max(rank.slice_numel for rank in predicted.ranks), hardware)
    return Seconds(0.0, 0.0, elementwise, elementwise, model_seconds(predicted, hardware, workload))


def incumbent_seconds(found: Incumbent, predicted: Forecast, hardware: Hardware, workload: Workload) -> Seconds:
    """Return the seconds with DeepSpeed's Muon, whose products and collectives wait for each other.

    Its products are taken to be as fast as ours, though it makes them matrix by matrix, and its elementwise work to be ours.
    """
    products = found.flops / (hardware.tflops * 1e12)
    traffic = _on_link(found.sent_bytes, hardware)
    elementwise = _elementwise(predicted, hardware)
    model = model_seconds(predicted, hardware, workload)
    return Seconds(products, traffic, elementwise, products + traffic + elementwise, model)


def modes(predicted: Forecast, hardware: Hardware, workload: Workload) -> list[Mode]:
    """Predict the sharding modes in order of exactness: gather, a gather every few steps, shard_local alone.

    Gather alone where no matrix is cut, since every mode then does the same, and for a rule with sums over whole matrices.
    """
    whole = _gathered(predicted, hardware, workload)
    result = [Mode("gather", {"mode": "gather"}, whole)]
    if predicted.gathers_only or not predicted.shard_rows:
        return result
    alone = _alone(predicted, hardware, workload)
    for period in _PERIODS:
        settings = {"mode": "shard_local", "gather_every": period}
        result.append(Mode(f"gather every {period}", settings, _mean(whole, alone, period)))
    return [*result, Mode("shard_local", {"mode": "shard_local"}, alone)]


def recommended(candidates: Sequence[Mode], saving: float = SAVING) -> Mode:
    """Choose the most exact mode from which no less exact one saves ``saving`` of the iteration.

    Exactness comes first because only a training run can tell what less of it costs in loss.
    """
    for index, mode in enumerate(candidates):
        longest = (1 - saving) * mode.seconds.iteration
        if all(other.seconds.iteration > longest for other in candidates[index + 1 :]):
            return mode
    raise AssertionError("the last mode has none after it")


def _gathered(predicted: Forecast, hardware: Hardware, workload: Workload) -> Seconds:
    products = predicted.critical_path / (hardware.tflops * 1e12)
    gathers = _on_link(max(rank.gathered_bytes for rank in predicted.ranks), hardware)
    exchanges = _on_link(max(rank.sent_bytes - rank.gathered_bytes for rank in predicted.ranks), hardware)
    traffic = _on_link(max(rank.sent_bytes for rank in predicted.ranks), hardware)
    elementwise = _elementwise(predicted, hardware)
    # One exchange travels while another is orthogonalized, but for the first to go out and the last to come back. What a team
    # gathers its products wait for.
    busy = products + gathers
    together = max(busy, exchanges) + min(busy, exchanges) / max(predicted.exchanges, 1)
    return Seconds(products, traffic, elementwise, together + elementwise, model_seconds(predicted, hardware, workload))


def _alone(predicted: Forecast, hardware: Hardware, workload: Workload) -> Seconds:
    products = max(rank.shard_flops for rank in predicted.ranks) / (hardware.tflops * 1e12)
    elementwise = _elementwise(predicted, hardware)
    return Seconds(products, 0.0, elementwise, products + elementwise, model_seconds(predicted, hardware, workload))


def _mean(whole: Seconds, alone: Seconds, period: int) -> Seconds:
    def mean(one: float, others: float) -> float:
        return (one + (period - 1) * others) / period

    return Seconds(
        mean(whole.orthogonalization, alone.orthogonalization),
        mean(whole.traffic, alone.traffic),
        whole.elementwise,
        mean(whole.optimizer, alone.optimizer),
        whole.model,
    )


def _elementwise(predicted: Forecast, hardware: Hardware) -> float:
    return _in_memory(max(rank.elementwise_bytes for rank in predicted.ranks), hardware)


def _on_link(number: int, hardware: Hardware) -> float:
    return number * 8 / (hardware.link_gbps * 1e9)


def _in_memory(number: int, hardware: Hardware) -> float:
    return number / (hardware.memory_tbps * 1e12)
