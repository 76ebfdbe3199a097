"""Optimizers for DeepSpeed that know where ZeRO put each weight matrix.

In a script that has imported torch, the names below are imported with this package. Otherwise they are imported when one of
them is used, or DeepSpeed is imported: ``ds-optforge --help`` and ``--version`` need none of them, and torch takes seconds.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_optforge.checkpoint.portable import load_checkpoint, save_checkpoint
    from ds_optforge.errors import CheckpointError, ConfigError
    from ds_optforge.integrations.deepspeed import evaluation_weights, initialize, register
    from ds_optforge.integrations.explanation import explain
    from ds_optforge.integrations.plain import MuonWithAuxAdam, build_optimizer, build_scheduler
    from ds_optforge.integrations.trainer import OptForgeCallback as OptForgeCallback
    from ds_optforge.integrations.trainer import TrainerOptimizer as TrainerOptimizer
    from ds_optforge.optimizer import OptForge
    from ds_optforge.orthogonalize import orthogonalize
    from ds_optforge.routing.attention import register_attention
    from ds_optforge.schedules import OptForgeSchedule
    from ds_optforge.zero.layout import LayoutError

__version__ = "0.1.0"  # setup.cfg reads it here

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
    "register_attention",
    "save_checkpoint",
]

_HOMES = {
    "checkpoint.portable": ("load_checkpoint", "save_checkpoint"),
    "errors": ("CheckpointError", "ConfigError"),
    "integrations.deepspeed": ("evaluation_weights", "initialize", "register"),
    "integrations.explanation": ("explain",),
    "integrations.plain": ("MuonWithAuxAdam", "build_optimizer", "build_scheduler"),
    "optimizer": ("OptForge",),
    "orthogonalize": ("orthogonalize",),
    "routing.attention": ("register_attention",),
    "schedules": ("OptForgeSchedule",),
    "zero.layout": ("LayoutError",),
}
# Imported when one of them is used, and not by `from ds_optforge import *`: transformers takes seconds, and is an extra.
_OF_THE_TRAINER = ("OptForgeCallback", "TrainerOptimizer")


def _import_names() -> None:
    """Import everything in ``__all__``, once.

    A script that forgets register(model) then gets OptForge's own message, which names that line: see `publish_names`.
    """
    if "OptForge" in globals():
        return
    homes = {home: import_module(f"{__name__}.{home}") for home in _HOMES}
    globals().update({name: getattr(homes[home], name) for home, names in _HOMES.items() for name in names})
    homes["integrations.deepspeed"].publish_names()


class _Package(ModuleType):
    """Class of this module, in which importing the sub-package ``orthogonalize`` does not hide the function of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


class _BeforeDeepSpeed(MetaPathFinder):
    """Finder that finds nothing, but imports the names when DeepSpeed is about to be imported."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "deepspeed":
            _import_names()


if not TYPE_CHECKING:  # a type checker would accept every name

    def __getattr__(name: str) -> Any:
        if name not in (*__all__, *_OF_THE_TRAINER):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        _import_names()
        if name in _OF_THE_TRAINER:
            home = import_module(f"{__name__}.integrations.trainer")
            globals().update({found: getattr(home, found) for found in _OF_THE_TRAINER})
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_OF_THE_TRAINER})


if "torch" in sys.modules:
    _import_names()
else:
    sys.modules[__name__].__class__ = _Package
    sys.meta_path.insert(0, _BeforeDeepSpeed())
