"""What is wrong in a DeepSpeed configuration by itself: an "auto" that nobody fills, values that contradict each other."""

from collections.abc import Iterator, Mapping
from typing import Any

BATCH_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_OFFLOADS = ("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device")

# What the HF Trainer and Accelerate put in the place of "auto" (their HfTrainerDeepSpeedConfig and DeepSpeedPlugin). What they
# fill in "params" is the business of the optimizer's and scheduler's sections.
FILLED_BY_FRAMEWORKS = (
    *BATCH_SIZES,
    "gradient_clipping",
    "fp16.enabled",
    "bf16.enabled",
    "zero_optimization.stage",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    *_OFFLOADS,
)
# In these sections "auto" is one of DeepSpeed's own values; the optimizer and the scheduler are checked apart.
_OWN_AUTO = ("pipeline", "data_types", "expert_parallel", "tensor_parallel", "compile", "autotuning", "optimizer", "scheduler")


def autos_of(config: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield the path of every "auto" that DeepSpeed itself has no meaning for."""
    for key, value in config.items():
        if value == "auto":
            yield path + key
        elif isinstance(value, Mapping) and path + key not in _OWN_AUTO:
            yield from autos_of(value, f"{path}{key}.")


def without(config: Mapping[str, Any], paths: frozenset[str], at: str = "") -> dict[str, Any]:
    """Return a configuration without the values at these paths."""
    return {
        key: without(value, paths, f"{at}{key}.") if isinstance(value, Mapping) else value
        for key, value in config.items()
        if at + key not in paths
    }


def without_fillable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without each "auto" that a framework fills later, in its ``prepare``."""
    return without(config, frozenset(autos_of(config)).intersection(FILLED_BY_FRAMEWORKS))


def problems_of_auto(config: Mapping[str, Any], filled: bool) -> Iterator[str]:
    """Yield a line for each "auto" that stays one.

    Args:
        config: a whole configuration.
        filled: whether frameworks have filled theirs.
    """
    for path in autos_of(config):
        if filled:
            yield f'{path}: got "auto" that no framework filled; allowed: a value'
        elif path not in FILLED_BY_FRAMEWORKS:
            yield f'{path}: got "auto", which neither Accelerate nor the HF Trainer fills here; allowed: a value'


def problems_of_precision(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line where two kinds of training in low precision are on."""
    on = [key for key in ("bf16", "fp16") if isinstance(config.get(key), Mapping) and config[key].get("enabled") is True]
    if len(on) == 2:
        yield "fp16.enabled: got true beside bf16.enabled: true; allowed: one of them"


def problems_of_batch(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the batch sizes on any number of ranks: train = micro x accumulation x ranks.

    Args:
        config: a whole configuration.
    """
    sizes = {key: config[key] for key in BATCH_SIZES if config.get(key) not in (None, "auto")}
    wrong = {key: size for key, size in sizes.items() if type(size) is not int or size < 1}
    for key, size in wrong.items():
        yield f"{key}: got {size!r}; allowed: a whole number of at least 1"
    if wrong:
        return
    train = sizes.pop("train_batch_size", None)
    if train is None:
        return
    per_rank = 1
    for size in sizes.values():
        per_rank *= size
    if train % per_rank:
        shown = " x ".join(f"{key} {size}" for key, size in sizes.items())
        yield f"train_batch_size: got {train}; allowed: a multiple of {per_rank} ({shown}), by the number of ranks"
