"""Reads the YAML of ``accelerate launch`` with its DeepSpeed plugin."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_optforge.migrate.deepspeed_file import read_optimizer
from ds_optforge.migrate.documents import Fields, find, load
from ds_optforge.migrate.schedules import of_deepspeed
from ds_optforge.migrate.source import AUTO, Given, OptimizerSettings, Reason, Source

_OFFLOADS = ("offload_optimizer", "offload_param")
# Of the plugin: these go into DeepSpeed's file, beside which Accelerate refuses them.
_MOVED = (
    "gradient_accumulation_steps", "gradient_clipping", "zero_stage", "zero3_save_16bit_model",
    *(f"{name}_{what}" for name in _OFFLOADS for what in ("device", "nvme_path")),
)  # fmt: skip
_STAY = (
    "zero3_init_flag", "deepspeed_config_file", "deepspeed_multinode_launcher", "deepspeed_hostfile",
    "deepspeed_exclusion_filter", "deepspeed_inclusion_filter", "deepspeed_moe_layer_cls_names",
)  # fmt: skip

_NONE_MADE: tuple[Reason, ...] = ()

_SECTIONS = """In your script `prepare` gets Accelerate's `DummyOptim` and `DummyScheduler` as before. Register the model first:

```python
import ds_optforge

ds_optforge.register(model)
```"""
_GROUPS = "parameter groups of your script's optimizer: OptForge makes its own, in which norms and biases have no decay"
_REAL = """In your script, in place of the AdamW, with its own learning rate and decay:

```python
import ds_optforge
from accelerate.utils import DummyOptim, DummyScheduler

ds_optforge.register(model)
optimizer = DummyOptim(list(model.parameters()), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
```

and in place of a scheduler, with the function that makes it:

```python
scheduler = DummyScheduler(optimizer, lr_scheduler_callable=lambda optimizer: get_scheduler(optimizer, ...))
```"""


def read(values: Mapping[str, Any], file: Path) -> Source:
    """Return what a file for ``accelerate launch --config_file`` says.

    Args:
        values: of the file.
        file: that holds them.

    Raises:
        ConfigError: no DeepSpeed in it, bad values, or a DeepSpeed file that is not there.
    """
    top = Fields(values, file, default_of="Accelerate")
    top.choice("distributed_type", "DEEPSPEED", ("DEEPSPEED",))
    plugin = Fields(top.section("deepspeed_config"), file, "deepspeed_config.", "Accelerate")
    plugin.refuse_unknown((*_MOVED, *_STAY))
    named = plugin.values.get("deepspeed_config_file")
    if named not in (None, "none"):
        config_file: Path | None = find(str(named), file)
        assert config_file is not None
        config, reasons = load(config_file), _NONE_MADE
    else:
        config_file, (config, reasons) = None, _inline(plugin, top)
    section = config.get("scheduler")
    schedule = of_deepspeed(section, config_file or file) if section is not None else None
    if "optimizer" in config:
        optimizer, not_carried = read_optimizer(config, config_file or file, schedule)
    else:
        optimizer, not_carried = _of_the_script(), (_GROUPS,)
    return Source(
        file=file,
        kind="a file for accelerate launch",
        config=config,
        config_file=config_file,
        optimizer=optimizer,
        schedule=schedule,
        reasons=reasons,
        not_carried=not_carried,
        steps=(_plugin_lines(plugin, top), _SECTIONS if "optimizer" in config else _REAL),
    )


def _inline(plugin: Fields, top: Fields) -> tuple[dict[str, Any], tuple[Reason, ...]]:
    """The DeepSpeed configuration that Accelerate makes of the plugin's values, and where each of them is from."""
    stage = plugin.number("zero_stage", 2)
    if stage.value not in (0, 1, 2, 3):
        raise plugin.refuse("zero_stage", "0, 1, 2, 3")
    accumulation = plugin.number("gradient_accumulation_steps", AUTO, auto=True, low=1)
    clipping = plugin.number("gradient_clipping", AUTO, auto=True)
    zero: dict[str, Any] = {"stage": int(stage.value)}
    reasons = [Reason("zero_optimization.stage", zero["stage"], f"from {stage.origin}")]
    for name in _OFFLOADS:
        device = plugin.choice(f"{name}_device", "none", ("none", "cpu", "nvme"))
        if device.value != "none":
            path = {"nvme_path": plugin.values.get(f"{name}_nvme_path")} if device.value == "nvme" else {}
            zero[name] = {"device": device.value, **path}
            reasons.append(Reason(f"zero_optimization.{name}", zero[name], f"from {device.origin}"))
    if plugin.flag("zero3_save_16bit_model", False):
        key = "stage3_gather_16bit_weights_on_model_save"
        zero[key] = True
        reasons.append(Reason(f"zero_optimization.{key}", True, "from deepspeed_config.zero3_save_16bit_model"))
    made: dict[str, Any] = {
        "train_batch_size": AUTO,
        "train_micro_batch_size_per_gpu": AUTO,
        "gradient_accumulation_steps": accumulation.value,
        "gradient_clipping": clipping.value,
        "zero_optimization": zero,
    }
    counted = "of your data loader, which Accelerate counts"
    origins = (counted, counted, f"from {accumulation.origin}", f"from {clipping.origin}")
    reasons += [Reason(key, made[key], origin) for key, origin in zip(made, origins, strict=False)]
    precision = top.choice("mixed_precision", "no", ("no", "bf16", "fp16"))
    if precision.value != "no":
        made[precision.value] = {"enabled": True} if precision.value == "bf16" else {"enabled": True, "auto_cast": True}
        reasons.append(Reason(precision.value, made[precision.value], f"from {precision.origin}"))
    return made, tuple(reasons)


def _of_the_script() -> OptimizerSettings:
    """Accelerate fills rate and decay from the script's DummyOptim; the rest are the values of torch.optim.AdamW."""
    default = "the default of torch.optim.AdamW; if your script has another value, write that"
    lr = Given(AUTO, "lr of your script")
    decay = Given(AUTO, "weight_decay of your script")
    return OptimizerSettings("adamw", lr, decay, Given([0.9, 0.999], default), Given(1e-8, default), rest_lr=lr)


def _plugin_lines(plugin: Fields, top: Fields) -> str:
    kept = {key: value for key, value in plugin.values.items() if key in _STAY and key != "deepspeed_config_file"}
    lines = [
        "deepspeed_config:",
        "  deepspeed_config_file: {out}",
        *(f"  {key}: {_plain(value)}" for key, value in kept.items()),
    ]
    dropped = "" if top.values.get("mixed_precision") in (None, "no") else ", and remove mixed_precision, which is in {out} now"
    block = "\n".join(lines)
    return f"In {top.file}, write the plugin so{dropped}:\n\n```yaml\n{block}\n```"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
