"""Reads the YAML with which Axolotl trains."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ds_optforge.migrate.documents import Fields
from ds_optforge.migrate.source import Purpose, Reason, Schedule, Source
from ds_optforge.migrate.trainer import Dialect, read_arguments

# Rates of their own for some parameters, in groups that the Trainer would have built.
_GROUPS = ("embedding_lr", "embedding_lr_scale", "lr_groups", "loraplus_lr_ratio", "loraplus_lr_embedding")
# Changes of the cosine that Axolotl makes when it builds the schedule itself.
_OWN_CURVES = ("cosine_constant_lr_ratio", "lr_quadratic_warmup")

_PLUGIN = """Axolotl builds the model itself, so a plugin registers it. Save this as optforge_plugin.py where you start Axolotl:

```python
import ds_optforge
from axolotl.integrations.base import BasePlugin


class Register(BasePlugin):
    def post_model_load(self, cfg, model):
        ds_optforge.register(model)
```

and start it with that folder on the path: `PYTHONPATH=. axolotl train FILE.yaml`."""


def read(values: Mapping[str, Any], file: Path) -> Source:
    """Return what a file for ``axolotl train`` says.

    Args:
        values: of the file.
        file: that holds them.

    Raises:
        ConfigError: an optimizer that nothing continues, bad values, or a DeepSpeed file that is not there.
    """
    dialect = Dialect("a file for Axolotl", ("optimizer", "adamw_torch_fused"), ("lr_scheduler", "cosine"))
    fields = Fields(values, file, default_of="Axolotl")
    source = read_arguments(fields, dialect)
    plugins = [*(values.get("plugins") or []), "optforge_plugin.Register"]
    groups = tuple(
        f"{key}: a rate of its own for some parameters; OptForge has roles and overrides" for key in _GROUPS if values.get(key)
    )
    return replace(
        source,
        schedule=_own_curve(source, fields),
        not_carried=(*source.not_carried, *groups),
        own_keys=(*source.own_keys, ("plugins", plugins)),
        purpose=_purpose(fields),
        steps=(_PLUGIN,),
    )


def _own_curve(source: Source, fields: Fields) -> Schedule | None:
    """The schedule with what Axolotl has beyond the Trainer's."""
    schedule = source.schedule
    if "scheduler" in source.config or schedule is None:
        return schedule
    own = [key for key in _OWN_CURVES if fields.values.get(key)]
    if own:
        why = f"{', '.join(own)}: no curve of OptForgeSchedule; Axolotl goes on building it, and every group's rate follows it"
        return Schedule(None, (Reason("scheduler", None, why),))
    floor = fields.number("cosine_min_lr_ratio", 0.0)
    if not floor.value or schedule.params is None or schedule.params["name"] != "cosine":
        return schedule
    reason = Reason("scheduler.params.final_lr_fraction", floor.value, f"from {floor.origin}")
    return replace(schedule, params={**schedule.params, "final_lr_fraction": floor.value}, reasons=(*schedule.reasons, reason))


def _purpose(fields: Fields) -> Purpose:
    if fields.values.get("adapter") is not None:
        fields.choice("adapter", "", ("lora", "qlora"))
        return "lora"
    return "pretrain" if fields.values.get("reinit_weights") is True else "finetune"
