"""Optimizers for DeepSpeed that know where ZeRO put each weight matrix."""

from ds_optforge.checkpoint.files import CheckpointError
from ds_optforge.checkpoint.portable import load_checkpoint, save_checkpoint
from ds_optforge.integrations.deepspeed import evaluation_weights, initialize, publish_names, register
from ds_optforge.integrations.plain import MuonWithAuxAdam, build_optimizer, build_scheduler, explain
from ds_optforge.optimizer import OptForge
from ds_optforge.orthogonalize import orthogonalize
from ds_optforge.schedules import OptForgeSchedule
from ds_optforge.validation import ConfigError
from ds_optforge.zero.layout import LayoutError

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "LayoutError",
    "MuonWithAuxAdam",
    "OptForge",
    "OptForgeSchedule",
    "build_optimizer",
    "build_scheduler",
    "evaluation_weights",
    "explain",
    "initialize",
    "load_checkpoint",
    "orthogonalize",
    "register",
    "save_checkpoint",
]

# A script that imports the package but forgets register(model) then gets OptForge's own message, which names that line.
publish_names()
