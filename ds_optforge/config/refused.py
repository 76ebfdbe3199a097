"""The settings of DeepSpeed with which OptForge would not train exactly, or has not been tested: each with the way out."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ds_optforge.errors import ConfigError


class Refusal(NamedTuple):
    """A setting, which of its values are refused, and what to write in place of them."""

    path: str
    refuses: Callable[[Any], bool]
    allowed: str


_UNTESTED = "which OptForge has not been tested with"
_ROUNDED = "OptForge steps float32 slices: its updates would be lost in the rounding of their weights"
_OFFLOAD = "zero_optimization.offload_optimizer"


def _on(value: Any) -> bool:
    return bool(value) and value != "auto"


def _several(ranks: Any) -> bool:
    return isinstance(ranks, int) and ranks > 1


def _partial(ratio: Any) -> bool:
    return ratio != "auto" and not (isinstance(ratio, int | float) and ratio >= 1.0)


# With a mesh DeepSpeed averages gradients over the data-parallel ranks alone, so those of one sequence drift apart; with
# torch.optim.AdamW too.
ULYSSES = "mpu=deepspeed.runtime.sequence_parallel.parallel_state_sp, after its initialize_sequence_parallel(size)"

# DeepSpeed gives the new parameters to the groups of the optimizer that it is passed, but not their names, shapes and rules.
BUILT_LATER = (
    'an "optimizer" section in the configuration, or a function: '
    "ds_optforge.initialize(..., optimizer=lambda parameters: ds_optforge.OptForge(parameters, **params))"
)

REFUSALS: tuple[Refusal, ...] = (
    Refusal(f"{_OFFLOAD}.device", lambda device: device == "nvme", "'cpu' or 'none'"),
    Refusal(f"{_OFFLOAD}.ratio", _partial, "1.0 (DeepSpeed would step the rest itself)"),
    Refusal(f"{_OFFLOAD}.super_offload", _on, "false"),
    Refusal("zero_optimization.offload_param.device", lambda device: device == "nvme", f"'cpu' or 'none' (NVMe, {_UNTESTED})"),
    Refusal("zero_optimization.zenflow", _on, "none (it replaces the optimizer's step)"),
    Refusal("zero_optimization.elastic_checkpoint", _on, "false"),
    Refusal("zero_optimization.legacy_stage1", _on, "false (DeepSpeed itself has it no more)"),
    Refusal(
        "zero_optimization.mics_shard_size",
        lambda size: isinstance(size, int) and size > 0,
        f"-1 (MiCS, {_UNTESTED}; newer DeepSpeed has it no more)",
    ),
    Refusal("zero_optimization.zero_quantized_weights", _on, f"false (qwZ, {_UNTESTED})"),
    Refusal("zero_optimization.zero_quantized_nontrainable_weights", _on, f"false (quantized weights, {_UNTESTED})"),
    Refusal(
        "zero_optimization.zero_quantized_gradients",
        _on,
        "false (qgZ rounds gradients to a few bits, and orthogonalization makes the error of small directions large)",
    ),
    Refusal("checkpoint.load_universal", _on, "false (DeepSpeed's loader knows only Adam's state)"),
    Refusal("bf16.bf16_master_weights_and_grads", _on, f"false ({_ROUNDED})"),
    Refusal("fp16.fp16_master_weights_and_grads", _on, f"false ({_ROUNDED})"),
    Refusal("compile.deepcompile", _on, f"false (DeepCompile, {_UNTESTED}; torch.compile of the model is no problem)"),
    Refusal("data_parallel_size", _on, f"none beside sequence_parallel_size; {ULYSSES}"),
    Refusal("hybrid_engine.enabled", _on, f"false (it lays the weights out anew for inference, {_UNTESTED})"),
)


def problems_of(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each setting that is refused.

    Args:
        config: a whole DeepSpeed configuration.

    Raises:
        ConfigError: a section that is no object.
    """
    for path, refuses, allowed in REFUSALS:
        value = setting(config, path)
        if value is not None and refuses(value):
            yield f"{path}: got {_shown(value)}; allowed: {allowed}"
    yield from _scaled_gradients(config)
    yield from _unshared_experts(config)


def _scaled_gradients(config: Mapping[str, Any]) -> Iterator[str]:
    """With these settings DeepSpeed refuses to start, or on ZeRO-3 scales every gradient wrongly by the factor."""
    stage = setting(config, "zero_optimization.stage") or 0
    scatters = setting(config, "zero_optimization.reduce_scatter") is not False
    prescales = _on(config.get("prescale_gradients"))
    factor = config.get("gradient_predivide_factor", 1.0)
    if stage not in (2, 3):
        return
    if prescales and scatters:
        yield "prescale_gradients: got true; allowed: false, or zero_optimization.reduce_scatter: false, on ZeRO-2 and ZeRO-3"
    if factor not in (1.0, "auto") and (scatters or (stage == 3 and not prescales)):
        allowed = "1.0, or with zero_optimization.reduce_scatter: false" + (" and prescale_gradients: true" * (stage == 3))
        yield f"gradient_predivide_factor: got {_shown(factor)}; allowed: {allowed}, on ZeRO-{stage}"


def _unshared_experts(config: Mapping[str, Any]) -> Iterator[str]:
    """Experts that every rank has, beside tensor parallelism: DeepSpeed refuses to start."""
    tensor_ranks = setting(config, "tensor_parallel.autotp_size")
    size = setting(config, "expert_parallel.autoep_size")
    if setting(config, "expert_parallel.enabled") and _several(tensor_ranks) and not _several(size):
        found = 1 if size is None else size
        yield f"expert_parallel.autoep_size: got {found!r}; allowed: 2 or more beside tensor_parallel.autotp_size"


def setting(config: Mapping[str, Any], path: str) -> Any:
    """Return what a configuration says at a path, as "zero_optimization.stage"; None where it says nothing.

    Raises:
        ConfigError: a section on the way that is no object.
    """
    return _setting(config, path.split("."), ())


def _setting(owner: Mapping[str, Any], keys: Sequence[str], walked: Sequence[str]) -> Any:
    value = owner.get(keys[0])
    walked = (*walked, keys[0])
    if len(keys) == 1 or value is None:
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{'.'.join(walked)}: got {value!r}; allowed: an object")
    return _setting(value, keys[1:], walked)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a section"
    return json.dumps(value) if isinstance(value, bool) else repr(value)
