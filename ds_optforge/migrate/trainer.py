"""Reads TrainingArguments of the HF Trainer, by themselves or in the YAML of LLaMA-Factory or Axolotl."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_optforge.migrate.deepspeed_file import read_optimizer
from ds_optforge.migrate.documents import Fields, find, load
from ds_optforge.migrate.schedules import of_deepspeed, of_trainer
from ds_optforge.migrate.source import AUTO, Family, OptimizerSettings, Reason, Source

# What the Trainer's "optim" names: the family, and whether its state has 8 bits.
_OPTIMIZERS: dict[str, tuple[Family, bool]] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_xla"), ("adamw", False)),
    **dict.fromkeys(("adamw_torch_npu_fused", "paged_adamw_32bit"), ("adamw", False)),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), ("adamw", True)),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit"), ("lion", False)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), ("lion", True)),
}
_READ = (
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "deepspeed",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "max_steps", "bf16", "fp16",
    "per_device_train_batch_size", "gradient_accumulation_steps",
)  # fmt: skip
_OTHERS = ("adam_beta3", "adam_epsilon2", "tf32", "bf16_full_eval", "fp16_full_eval", "per_device_eval_batch_size")

_REGISTER = (
    "In your script, before the Trainer is made: `import ds_optforge` and `ds_optforge.register(model)`. Start it with "
    "`deepspeed`, `torchrun` or `accelerate launch`."
)
_RATES = "The Trainer logs the rate of the first parameter group only; the optimizer's other groups move along the same curve."


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a framework around the Trainer names what TrainingArguments call ``optim`` and ``lr_scheduler_type``.

    Attributes:
        kind: of the file, in words.
        optimizer: its key, and what it is by default.
        scheduler: its key, and what it is by default.
    """

    kind: str = "a file of TrainingArguments"
    optimizer: tuple[str, str] = ("optim", "adamw_torch")
    scheduler: tuple[str, str] = ("lr_scheduler_type", "linear")


def read(values: Mapping[str, Any], file: Path) -> Source:
    """Return what a file of TrainingArguments says.

    Args:
        values: the arguments, by name.
        file: that holds them.

    Raises:
        ConfigError: an optimizer that nothing continues, bad values, or a DeepSpeed file that is not there.
    """
    return replace(read_arguments(Fields(values, file, default_of="TrainingArguments"), Dialect()), steps=(_REGISTER, _RATES))


def read_arguments(fields: Fields, dialect: Dialect) -> Source:
    """Return what TrainingArguments say, whatever file holds them.

    Args:
        fields: of the file.
        dialect: of the framework whose file it is.

    Raises:
        ConfigError: as in `read`.
    """
    fields.refuse_near_misses(_READ, _OTHERS)
    config, config_file, reasons = _deepspeed(fields)
    where = config_file or fields.file
    scheduler = config.get("scheduler")
    schedule = of_deepspeed(scheduler, where) if scheduler is not None else of_trainer(fields, *dialect.scheduler)
    not_carried = [f"{key}: {_UNREAD[key]}" for key in _UNREAD if fields.values.get(key)]
    sharded = [key for key in ("fsdp", "fsdp_config") if fields.values.get(key)]
    not_carried += [f"{key}: ZeRO shards in its place" for key in sharded]
    if "optimizer" in config:
        optimizer, lines = read_optimizer(_filled(config, fields), where, schedule)
        not_carried += lines
    else:
        optimizer = _settings(fields, dialect)
    return Source(
        file=fields.file,
        kind=dialect.kind,
        config=config,
        config_file=config_file,
        optimizer=optimizer,
        schedule=schedule,
        reasons=tuple(reasons),
        not_carried=tuple(not_carried),
        fills={
            "lr": ("learning_rate", fields.number("learning_rate", 5e-5).value),
            "weight_decay": ("weight_decay", fields.number("weight_decay", 0.0).value),
        },
        own_keys=(("deepspeed", "{out}"), *((key, None) for key in sharded)),
    )


_UNREAD = {
    "optim_args": "arguments of the Trainer's own optimizer",
    "optim_target_modules": "an argument of GaLore and APOLLO",
}


def _deepspeed(fields: Fields) -> tuple[dict[str, Any], Path | None, list[Reason]]:
    """The DeepSpeed configuration that the arguments name, its file, and reasons for one that stands in for none."""
    named = fields.values.get("deepspeed")
    if isinstance(named, dict):
        return named, None, []
    if isinstance(named, str):
        path = find(named, fields.file)
        return load(path), path, []
    if named is not None:
        raise fields.refuse("deepspeed", "the path of a JSON file, or an object")
    filled = "your file's value, which the Trainer fills in"
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": AUTO,
        "gradient_accumulation_steps": AUTO,
        "gradient_clipping": AUTO,
        "bf16": {"enabled": AUTO},
        "fp16": {"enabled": AUTO},
        "zero_optimization": {"stage": 2},
    }
    reasons = [Reason(key, made[key], filled) for key in made if key != "zero_optimization"]
    stage = "your file names no DeepSpeed configuration; ZeRO-2 shards gradients and optimizer state, and costs no traffic"
    return made, None, [*reasons, Reason("zero_optimization.stage", 2, stage)]


def _settings(fields: Fields, dialect: Dialect) -> OptimizerSettings:
    key, default = dialect.optimizer
    name = fields.choice(key, default, tuple(_OPTIMIZERS)).value
    family, state_8bit = _OPTIMIZERS[name]
    lr = fields.number("learning_rate", 5e-5)
    betas = [fields.number(f"adam_beta{index}", beta) for index, beta in ((1, 0.9), (2, 0.999))]
    return OptimizerSettings(
        family,
        lr,
        fields.number("weight_decay", 0.0),
        betas[0]._replace(
            value=[beta.value for beta in betas], origin=" and ".join(dict.fromkeys(beta.origin for beta in betas))
        ),
        fields.number("adam_epsilon", 1e-8),
        rest_lr=lr,
        state_8bit=state_8bit,
    )


def _filled(config: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """The configuration with the optimizer's "auto" as the Trainer fills it."""
    section = config["optimizer"]
    params = section.get("params") if isinstance(section, dict) else None
    if not isinstance(params, dict):
        return dict(config)
    values = {
        "lr": fields.number("learning_rate", 5e-5).value,
        "betas": [fields.number("adam_beta1", 0.9).value, fields.number("adam_beta2", 0.999).value],
        "eps": fields.number("adam_epsilon", 1e-8).value,
        "weight_decay": fields.number("weight_decay", 0.0).value,
    }
    filled = {key: values[key] if value == AUTO and key in values else value for key, value in params.items()}
    return {**config, "optimizer": {**section, "params": filled}}
