"""Recognises which kind of file a user has, by its content, and reads it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ds_optforge.errors import ConfigError
from ds_optforge.migrate import accelerate_file, axolotl, deepspeed_file, llama_factory, trainer
from ds_optforge.migrate.documents import load
from ds_optforge.migrate.source import Source


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        name: of the kind.
        needs: keys of which it always has one.
        marks: keys of which it has one too, which another kind has not; () for none.
        read: reads it.
    """

    name: str
    needs: tuple[str, ...]
    marks: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Path], Source]


# The first that fits is taken.
KINDS = (
    Kind(
        "the YAML of accelerate launch",
        ("deepspeed_config", "distributed_type", "compute_environment"),
        (),
        accelerate_file.read,
    ),
    Kind("the YAML of Axolotl", ("base_model",), ("micro_batch_size", "datasets", "sequence_len"), axolotl.read),
    Kind(
        "the YAML of LLaMA-Factory",
        ("model_name_or_path",),
        ("finetuning_type", "template", "stage", "cutoff_len"),
        llama_factory.read,
    ),
    Kind(
        "a DeepSpeed configuration",
        ("zero_optimization", "optimizer", "train_batch_size", "train_micro_batch_size_per_gpu"),
        (),
        deepspeed_file.read,
    ),
    Kind(
        "TrainingArguments",
        ("output_dir", "learning_rate", "per_device_train_batch_size", "num_train_epochs", "max_steps", "lr_scheduler_type"),
        (),
        trainer.read,
    ),
)


def read(path: Path) -> Source:
    """Return what a file says.

    Raises:
        ConfigError: a file that cannot be read, or is of no known kind, or has bad values.
    """
    values = load(path)
    for kind in KINDS:
        if _has_one(values, kind.needs) and (not kind.marks or _has_one(values, kind.marks)):
            return kind.read(values, path)
    kinds = "; ".join(f"{kind.name} ({', '.join(kind.needs)})" for kind in KINDS)
    raise ConfigError(
        f"{path}: got an object with the keys {', '.join(values) or '(none)'}; allowed, by a key of theirs: {kinds}"
    )


def _has_one(values: Mapping[str, Any], keys: tuple[str, ...]) -> bool:
    return any(key in values for key in keys)
