"""Learning-rate schedules of DeepSpeed and of the HF Trainer, as "params" of an OptForgeSchedule section."""

from pathlib import Path
from typing import Any

from ds_optforge.errors import ConfigError, did_you_mean
from ds_optforge.migrate.documents import Fields
from ds_optforge.migrate.source import AUTO, Given, Reason, Schedule
from ds_optforge.reading import json_value

_WARMUP = {"warmup_num_steps", "warmup_type", "last_batch_iteration"}
_KEYS: dict[str, set[str]] = {
    "WarmupLR": {*_WARMUP, "warmup_min_lr", "warmup_max_lr"},
    "WarmupDecayLR": {*_WARMUP, "warmup_min_lr", "warmup_max_lr", "total_num_steps"},
    "WarmupCosineLR": {*_WARMUP, "warmup_min_ratio", "cos_min_ratio", "total_num_steps"},
}
_CURVES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


def of_deepspeed(section: Any, file: Path) -> Schedule:
    """Return the schedule that a "scheduler" section of DeepSpeed asks for.

    Raises:
        ConfigError: a scheduler that OptForgeSchedule has no curve for, or bad "params".
    """
    if not isinstance(section, dict):
        raise ConfigError(f'{file}: scheduler: got {section!r}; allowed: an object {{"type": ..., "params": ...}}')
    kind = section.get("type")
    if kind not in _KEYS:
        hint = did_you_mean(str(kind), _KEYS)
        raise ConfigError(
            f"{file}: scheduler.type: got {kind!r}; {hint}allowed: {', '.join(_KEYS)}, or no such section (OptForgeSchedule "
            "has no other curve)"
        )
    fields = Fields(Fields(section, file, "scheduler.").section("params"), file, "scheduler.params.")
    fields.refuse_unknown(_KEYS[kind])
    values = {"warmup_num_steps": fields.number("warmup_num_steps", 1000, auto=True, low=1)}
    if "total_num_steps" in _KEYS[kind]:
        if fields.values.get("total_num_steps") is None:
            raise ConfigError(f"{file}: scheduler.params.total_num_steps: missing; allowed: a number, as '{kind}' needs it")
        values["total_num_steps"] = fields.number("total_num_steps", None, auto=True, low=1)
    if kind == "WarmupCosineLR":
        values["final_lr_fraction"] = fields.number("cos_min_ratio", 0.0001)
    name = _CURVES[kind]
    return Schedule(
        {"name": name, **{key: given.value for key, given in values.items()}},
        (
            Reason("scheduler.params.name", name, f"from scheduler.type, {kind}"),
            *(Reason(f"scheduler.params.{key}", given.value, f"from {given.origin}") for key, given in values.items()),
        ),
        tuple(_not_carried(kind, fields)),
        _written_rate(kind, fields),
    )


def _not_carried(kind: str, fields: Fields) -> list[str]:
    lines = []
    if fields.values.get("warmup_type", "log") != "linear":
        lines.append("scheduler.params.warmup_type log (DeepSpeed's default): the warm-up is linear, and as long")
    for key in ("warmup_min_lr", "warmup_min_ratio"):
        given = fields.values.get(key, 0)
        if given not in (0, AUTO):
            lines.append(f"scheduler.params.{key} {given}: the warm-up begins with one step's share of the rate")
    if fields.values.get("last_batch_iteration", -1) != -1:
        lines.append("scheduler.params.last_batch_iteration: a run begins at its first step, or where its checkpoint is")
    return lines


def _written_rate(kind: str, fields: Fields) -> Given | None:
    """WarmupLR and WarmupDecayLR write their own rate into every group; the latter 0.001 where nothing is said."""
    if kind == "WarmupCosineLR":
        return None
    given = fields.values.get("warmup_max_lr")
    if isinstance(given, list):
        raise fields.refuse(
            "warmup_max_lr", "a number (a list has a rate for each parameter group, of which OptForge makes others)"
        )
    if given is None and kind == "WarmupLR":
        return None
    rate = fields.number("warmup_max_lr", 0.001, auto=True)
    return None if rate.value == AUTO else rate._replace(origin=f"{rate.origin} ({kind} writes it over optimizer.params.lr)")


# Of the HF Trainer. What stands for none of ours multiplies each group's own rate, so the Trainer may go on building it.
_TRAINERS = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"} | {
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
    "warmup_stable_decay": "wsd",
}
_LEFT_TO_TRAINER = ("cosine_with_restarts", "polynomial", "inverse_sqrt")
# Arguments of these that OptForgeSchedule has too; others, such as num_cycles, only the Trainer's function has.
_ARGUMENTS = {
    "cosine_with_min_lr": {"min_lr", "min_lr_rate"},
    "cosine_warmup_with_min_lr": {"min_lr", "min_lr_rate"},
    "warmup_stable_decay": {"num_decay_steps", "min_lr_ratio", "decay_type"},
}
_NEEDS = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}


def of_trainer(fields: Fields, key: str = "lr_scheduler_type", default: str = "linear") -> Schedule:
    """Return the schedule that TrainingArguments ask for; its lengths are "auto", which the Trainer fills.

    Args:
        fields: the arguments.
        key: that names the schedule.
        default: of it.

    Raises:
        ConfigError: a schedule that neither OptForgeSchedule has nor the Trainer can keep, or bad arguments.
    """
    kind = fields.choice(key, default, (*_TRAINERS, *_LEFT_TO_TRAINER))
    given = _arguments(fields)
    if kind.value in _LEFT_TO_TRAINER or not given.keys() <= _ARGUMENTS.get(kind.value, set()):
        named = f"{key} {kind.value}" + (f" with {', '.join(given)}" if given else "")
        why = f"{named} is no curve of OptForgeSchedule: the Trainer goes on building it, and every group's rate follows it"
        return Schedule(None, (Reason("scheduler", None, why),))
    params: dict[str, Any] = {"name": _TRAINERS[kind.value]}
    if kind.value != "constant":
        params["warmup_num_steps"] = AUTO
    if not kind.value.startswith("constant"):
        params["total_num_steps"] = AUTO
    needs = _NEEDS.get(kind.value, ())
    if needs and not any(name in given for name in needs):
        raise fields.refuse("lr_scheduler_kwargs", f"{' or '.join(needs)} in it, as this schedule needs it")
    floor = _floor(fields, given)
    if floor:
        params["final_lr_fraction"] = floor
    if kind.value == "warmup_stable_decay":
        params["cooldown_num_steps"] = given["num_decay_steps"]
        params["cooldown_shape"] = given.get("decay_type", "cosine")
    reasons = {name: f"from {kind.origin}, {kind.value}" for name in params} | {
        "warmup_num_steps": "your file's warm-up, which the Trainer fills in as a number of steps",
        "total_num_steps": "the steps of the run, which the Trainer counts",
    }
    return Schedule(params, tuple(Reason(f"scheduler.params.{name}", params[name], reasons[name]) for name in params))


def _floor(fields: Fields, given: dict[str, Any]) -> float:
    """The rate at the end, as a fraction of the first."""
    inside = Fields(given, fields.file, "lr_scheduler_kwargs.", "TrainingArguments")
    if "min_lr" in given:
        lr = fields.number("learning_rate", 5e-5).value
        return float(f"{inside.number('min_lr', 0.0).value / lr:.6g}") if lr else 0.0
    return float(inside.number("min_lr_rate" if "min_lr_rate" in given else "min_lr_ratio", 0.0).value)


def _arguments(fields: Fields) -> dict[str, Any]:
    """lr_scheduler_kwargs, which may be JSON in a string."""
    found = fields.values.get("lr_scheduler_kwargs")
    try:
        found = json_value(found) if isinstance(found, str) else found
    except ValueError:
        found = 0
    if found is not None and not isinstance(found, dict):
        raise fields.refuse("lr_scheduler_kwargs", "an object")
    return found or {}
