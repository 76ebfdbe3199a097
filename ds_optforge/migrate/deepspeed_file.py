"""Reads a DeepSpeed configuration with one of DeepSpeed's optimizers, for `ds-optforge init`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_optforge.errors import ConfigError, did_you_mean
from ds_optforge.migrate.documents import Fields
from ds_optforge.migrate.schedules import of_deepspeed
from ds_optforge.migrate.source import AUTO, Family, Given, OptimizerSettings, Schedule, Source

# By the lower-case "type"; DeepSpeed chooses between FusedAdam and CPUAdam itself, and people name them all the same.
_FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("adam", "adamw", "fusedadam", "cpuadam", "deepspeedcpuadam"), "adamw"),
    **dict.fromkeys(("lion", "fusedlion", "cpulion", "deepspeedcpulion"), "lion"),
    "muon": "muon",
}
_NAMES = "AdamW, Adam, FusedAdam, CPUAdam, Lion, Muon"
_ADAM = ("lr", "betas", "eps", "weight_decay")
# Which kernel computes the update, and in what it is computed.
_KERNELS = ("torch_adam", "fused", "foreach", "set_grad_none", "fp32_optimizer_states")
_KEYS: dict[Family, tuple[str, ...]] = {
    "adamw": (*_ADAM, *_KERNELS, "adam_w_mode", "adamw_mode", "bias_correction", "amsgrad"),
    "lion": ("lr", "betas", "weight_decay", *_KERNELS),
    "muon": (*_ADAM, *_KERNELS, "adam_w_mode", "muon_lr", "adam_lr", "momentum", "ns_method", "per_head_muon"),
}
# DeepSpeed's Muon reads neither: it always takes five steps, and looks ahead.
_IGNORED_BY_MUON = ("ns_steps", "nesterov")


def read(values: Mapping[str, Any], file: Path) -> Source:
    """Return what a DeepSpeed configuration says.

    Args:
        values: the configuration.
        file: that holds it.

    Raises:
        ConfigError: an optimizer or a scheduler that no OptForge section continues, or bad values.
    """
    schedule = of_deepspeed(values["scheduler"], file) if values.get("scheduler") is not None else None
    optimizer, not_carried = read_optimizer(values, file, schedule)
    return Source(
        file=file,
        kind="a DeepSpeed configuration",
        config=dict(values),
        config_file=file,
        optimizer=optimizer,
        schedule=schedule,
        not_carried=not_carried,
        steps=(
            "Use {out} as the configuration, and call `ds_optforge.register(model)` before the engine is built; or call "
            '`ds_optforge.initialize(model=model, config="{out}")` in place of `deepspeed.initialize`.',
        ),
    )


def read_optimizer(
    values: Mapping[str, Any], file: Path, schedule: Schedule | None = None
) -> tuple[OptimizerSettings, tuple[str, ...]]:
    """Return the settings of the "optimizer" section, and a line for each of its values that cannot be carried over.

    Args:
        values: the whole configuration.
        file: that holds it.
        schedule: of the configuration, which may write a learning rate of its own.

    Raises:
        ConfigError: no section, another optimizer, or bad values.
    """
    if "optimizer" not in values:
        raise ConfigError(
            f'{file}: optimizer: missing; allowed: {{"type": ..., "params": ...}} with one of {_NAMES}; where the Trainer or '
            "Accelerate builds the optimizer, give --from the file of TrainingArguments or of accelerate launch, which names "
            "this one"
        )
    section = Fields(values, file).section("optimizer")
    kind = section.get("type")
    family = _FAMILIES.get(str(kind).lower())
    if family is None:
        hint = "it is OptForge's already; " if kind == "OptForge" else did_you_mean(str(kind), _NAMES.split(", "))
        raise ConfigError(f"{file}: optimizer.type: got {kind!r}; {hint}allowed: {_NAMES}")
    fields = Fields(Fields(section, file, "optimizer.").section("params"), file, "optimizer.params.")
    fields.refuse_unknown((*_KEYS[family], *(_IGNORED_BY_MUON if family == "muon" else ())))
    rate = schedule.rate if schedule is not None else None
    settings = _muon(fields, rate) if family == "muon" else _elementwise(fields, family, rate, str(kind))
    return settings, tuple(_not_carried(fields, family, str(kind), rate))


def _elementwise(fields: Fields, family: Family, written: Given | None, kind: str) -> OptimizerSettings:
    lr = written or fields.number("lr", 1e-3, auto=True)
    slow = (0.9, 0.999)
    torch_adamw = family == "adamw" and fields.flag("torch_adam", False) and _decoupled(fields, kind)
    decay = fields.number("weight_decay", 0.01 if torch_adamw else 0.0, auto=True)
    betas = fields.pair("betas", slow, auto=True)
    return OptimizerSettings(family, lr, decay, betas, fields.number("eps", 1e-8, auto=True), rest_lr=lr)


def _muon(fields: Fields, written: Given | None) -> OptimizerSettings:
    """Rates that the file names apart are what the user wants, also where a scheduler writes one over both."""
    shared = fields.values.get("lr") is not None

    def rate(key: str, default: float) -> Given:
        if fields.values.get(key) is not None:
            return fields.number(key, default, auto=True)
        return written or (fields.number("lr", default, auto=True) if shared else fields.number(key, default))

    method = fields.values.get("ns_method", "gram")
    if method not in ("gram", "standard"):
        raise fields.refuse("ns_method", "gram, standard")
    origin = "optimizer.params.ns_method" if "ns_method" in fields.values else "the default of DeepSpeed"
    return OptimizerSettings(
        "muon",
        lr=rate("muon_lr", 0.02),
        weight_decay=fields.number("weight_decay", 0.0, auto=True),
        betas=fields.pair("betas", (0.9, 0.95), auto=True),
        eps=fields.number("eps", 1e-10, auto=True),
        rest_lr=rate("adam_lr", 3e-4),
        momentum=fields.number("momentum", 0.95),
        method=Given(method, origin),
    )


def _decoupled(fields: Fields, kind: str) -> bool:
    """DeepSpeed's "Adam" is AdamW too, unless it is told otherwise; its "AdamW" always is."""
    return kind.lower() == "adamw" or (fields.flag("adam_w_mode", True) and fields.flag("adamw_mode", True))


def _not_carried(fields: Fields, family: Family, kind: str, written: Given | None) -> list[str]:
    given = fields.values
    kernels = ", ".join(f"optimizer.params.{key}" for key in _KERNELS[:4] if key in given)
    lines = [f"{kernels}: the kernel that computes the update; OptForge's is torch's fused one"] if kernels else []
    if given.get("weight_decay"):
        lines.append(
            f"weight decay of norms and biases: DeepSpeed's {kind} decays every parameter, OptForge no vectors, unless "
            '"roles": {"scalar": {"weight_decay": ...}} says so'
        )
    if given.get("fp32_optimizer_states") is False:
        lines.append('optimizer.params.fp32_optimizer_states false: the state is float32; "state_dtype": "bfloat16" halves it')
    if given.get("bias_correction") is False:
        lines.append("optimizer.params.bias_correction false: OptForge's AdamW always corrects its moments")
    if given.get("amsgrad"):
        lines.append("optimizer.params.amsgrad: OptForge's AdamW has no maximum of second moments")
    if family != "lion" and not _decoupled(fields, kind) and given.get("weight_decay"):
        lines.append(
            "optimizer.params.adam_w_mode false: that decay is a part of the gradient (L2), and OptForge's is decoupled: "
            "choose weight_decay anew"
        )
    if given.get("per_head_muon"):
        lines.append(
            'optimizer.params.per_head_muon: say which projections and how many heads: "overrides": [{"match": "q_proj", '
            '"heads": 32}, ...]'
        )
    ignored = ", ".join(f"optimizer.params.{key}" for key in _IGNORED_BY_MUON if key in given)
    if ignored:
        lines.append(f"{ignored}: DeepSpeed's Muon never reads it; it takes 5 steps, with Nesterov, and so does this one")
    if family == "muon" and written is not None and ("muon_lr" in given or "adam_lr" in given):
        lines.append(
            f"{written.origin}: {written.value:g} for both halves; the rates that optimizer.params names are kept apart"
        )
    if family == "muon" and AUTO in (given.get("muon_lr"), given.get("adam_lr")):
        raise fields.refuse("muon_lr" if given.get("muon_lr") == AUTO else "adam_lr", "a number (nobody fills it)")
    return lines
