"""Reads the YAML with which LLaMA-Factory trains: TrainingArguments, and what it adds to them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ds_optforge.migrate.documents import Fields
from ds_optforge.migrate.source import Purpose, Source
from ds_optforge.migrate.trainer import Dialect, read_arguments

# Each puts another optimizer in the place of the Trainer's, which DeepSpeed's section would contradict.
_OTHER_OPTIMIZERS = ("use_muon", "use_galore", "use_apollo", "use_badam", "use_adam_mini", "loraplus_lr_ratio")

_LAUNCH = """LLaMA-Factory builds the model itself, so a script of yours registers it. Save this as train_optforge.py:

```python
import ds_optforge
from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback


class Register(TrainerCallback):
    def on_init_end(self, args, state, control, model=None, **kwargs):
        ds_optforge.register(model)


if __name__ == "__main__":
    run_exp(callbacks=[Register()])
```

and start it in place of `llamafactory-cli train`: `torchrun --nproc-per-node 8 train_optforge.py FILE.yaml`."""


def read(values: Mapping[str, Any], file: Path) -> Source:
    """Return what a file for ``llamafactory-cli train`` says.

    Args:
        values: of the file.
        file: that holds them.

    Raises:
        ConfigError: an optimizer that nothing continues, bad values, or a DeepSpeed file that is not there.
    """
    fields = Fields(values, file, default_of="TrainingArguments")
    source = read_arguments(fields, Dialect(kind="a file for LLaMA-Factory"))
    replaced = [key for key in _OTHER_OPTIMIZERS if values.get(key)]
    return replace(
        source,
        not_carried=(*source.not_carried, *(f"{key}: OptForge takes the place of that optimizer" for key in replaced)),
        own_keys=(*source.own_keys, *((key, None) for key in replaced)),
        purpose=_purpose(fields),
        steps=(_LAUNCH,),
    )


def _purpose(fields: Fields) -> Purpose:
    kind = fields.choice("finetuning_type", "lora", ("lora", "oft", "freeze", "full")).value
    if kind == "lora":
        return "lora"
    return "pretrain" if fields.values.get("train_from_scratch") is True else "finetune"
