"""Training through the Hugging Face Trainer, and the trainers of TRL: an optimizer for its argument, and a callback.

```python
trainer = Trainer(..., optimizer_cls_and_kwargs=(TrainerOptimizer, {"name": "muon", "lr": 0.02}))
trainer.add_callback(OptForgeCallback(trainer))
```
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from ds_optforge.checkpoint.portable import save_checkpoint
from ds_optforge.config.deepspeed_values import without_fillable
from ds_optforge.config.refused import setting
from ds_optforge.errors import ConfigError
from ds_optforge.integrations.deepspeed import beside_object, reach_weights, register
from ds_optforge.integrations.plain import build_optimizer
from ds_optforge.optimizer import OptForge, groups_of
from ds_optforge.step.groups import GROUP

try:
    from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} is not installed; allowed: pip install 'ds-optforge[hf]'", name=error.name
    ) from error

PORTABLE = "optforge"  # the folder of a portable checkpoint inside one of the Trainer's


class TrainerOptimizer:
    """Factory of an OptForge, for the Trainer's argument ``optimizer_cls_and_kwargs=(TrainerOptimizer, {"name": ...})``.

    The Trainer calls it with the model that it trains, so that nothing has to be registered, whatever a trainer has wrapped or
    added. The settings are the "params" of an optimizer section; "auto" is not filled, and ``TrainingArguments`` give none of
    them. Under DeepSpeed the file has no "optimizer" section.

    Raises:
        ConfigError: a transformers that hands parameter groups to its optimizers (before 5.2).
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        if arguments or settings:
            raise ConfigError(
                "optimizer_cls_and_kwargs: this transformers hands parameter groups to TrainerOptimizer and not the model; "
                'allowed: transformers>=5.2, or DeepSpeed with an "optimizer" section in its file, or '
                "optimizers=(ds_optforge.build_optimizer(model, {...}), None)"
            )

    def __call__(self, model: nn.Module, **config: Any) -> OptForge:
        """Build the optimizer of ``model``; under DeepSpeed, check its configuration and allow CPU offload in it.

        Args:
            model: that is trained.
            config: the "params" of an optimizer section.

        Raises:
            ConfigError: the settings are invalid or do not fit the model, or DeepSpeed's configuration contradicts them.
        """
        optimizer = build_optimizer(model, config)
        plugin = AcceleratorState().deepspeed_plugin
        if plugin is not None:
            file = plugin.deepspeed_config
            _refuse_replacement(file)
            beside_object(without_fillable(file), optimizer)
            file["zero_force_ds_cpu_optimizer"] = False  # else Accelerate trains with DeepSpeed's Adam under CPU offload
        return optimizer


def _refuse_replacement(file: Mapping[str, Any]) -> None:
    """Raise ConfigError where Accelerate is told to put DeepSpeed's Adam in the optimizer's place."""
    device = setting(file, "zero_optimization.offload_optimizer.device")
    if setting(file, "zero_force_ds_cpu_optimizer") and device not in (None, "none"):
        raise ConfigError(
            "zero_force_ds_cpu_optimizer: got true with offload_optimizer, for which Accelerate trains with DeepSpeed's Adam; "
            "allowed: false, or no such key"
        )


def _refuse_left_out(model: nn.Module, optimizer: OptForge) -> None:
    """Raise ConfigError where a trainer has wrapped or changed its model after the optimizer was built for it."""
    held = {id(parameter) for members in groups_of(optimizer).members.values() for parameter in members.parameters}
    left = [name for name, found in model.named_parameters() if found.requires_grad and id(found) not in held]
    if left:
        raise ConfigError(
            f"optimizer: holds none of {len(left)} parameters that the model trains ({left[0]}, ...); allowed: one that is "
            "built for the model as the trainer has made it (optimizer_cls_and_kwargs or DeepSpeed's file, and not optimizers)"
        )


class OptForgeCallback(TrainerCallback):
    """Callback for ``trainer.add_callback(OptForgeCallback(trainer))``, before ``trainer.train()``.

    Under DeepSpeed it registers the trainer's model. Each record of training in the Trainer's log gets the learning rate of
    every parameter group in its last step, as ``learning_rate/GROUP``, and, with ``"telemetry": {"every": k}``, the record of
    telemetry since the one before, as ``optforge/GROUP/NAME``. Evaluation and prediction are of the averaged weights, where a
    rule averages, and training goes on with its own.

    Args:
        trainer: whose callback this is, of transformers or derived from it.
        portable: whether to write a portable checkpoint into the folder ``optforge`` of each checkpoint of the Trainer.

    Raises:
        ConfigError: ``portable`` without DeepSpeed or in a search of hyperparameters, or an optimizer in DeepSpeed's file
            beside ``optimizer_cls_and_kwargs``; when training begins, an optimizer that is no OptForge, or that was built
            before the trainer added parameters.
    """

    def __init__(self, trainer: Any, portable: bool = False) -> None:
        self._trainer, self._portable = trainer, portable
        self._optimizer: OptForge | None = None  # of the training that runs
        self._rates: dict[str, float] = {}
        self._told = 0  # the step of the last record of telemetry in the log
        plugin = trainer.accelerator.state.deepspeed_plugin
        if portable and plugin is None:
            raise ConfigError(
                "portable: got True without DeepSpeed; allowed: False (the Trainer's checkpoint resumes anywhere)"
            )
        asked = getattr(trainer, "optimizer_cls_and_kwargs", None)
        if plugin is not None and asked is not None and "optimizer" in plugin.deepspeed_config:
            raise ConfigError(
                'optimizer: got an "optimizer" section in DeepSpeed\'s file and optimizer_cls_and_kwargs, which the Trainer '
                "ignores then; allowed: one of them"
            )
        if plugin is not None:
            register(trainer.model)

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **keywords: Any) -> None:
        """Find the optimizer, and go before the callbacks that report, so that they see what this one adds to the log."""
        if self._portable and state.is_hyper_param_search:
            raise ConfigError("portable: got True in a search of hyperparameters; allowed: False")
        self._optimizer = reach_weights(optimizer)
        _refuse_left_out(self._trainer.model, self._optimizer)
        callbacks = self._trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Note the learning rates of the step."""
        if self._optimizer is not None:
            self._rates = {group[GROUP]: float(group["lr"]) for group in self._optimizer.param_groups}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **keywords: Any) -> None:
        """Add to a record of training."""
        if logs is None or "loss" not in logs or self._optimizer is None:
            return
        found = {f"learning_rate/{group}": rate for group, rate in self._rates.items()}
        record = self._optimizer.telemetry
        if record and record["step"] != self._told:
            self._told = record["step"]
            found |= {
                f"optforge/{group}/{name}": value
                for group, numbers in record["groups"].items()
                for name, value in numbers.items()
            }
        logs.update(found)
        state.log_history[-1].update(found)

    def on_evaluate(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Go on with the training weights: the Trainer has called the optimizer's ``eval()``, and calls no ``train()`` here."""
        if self._optimizer is not None:
            self._optimizer.train()

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **keywords: Any) -> None:
        """Do as after an evaluation."""
        self.on_evaluate(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Write the portable checkpoint beside the Trainer's own; one that is there is replaced, as the Trainer's is."""
        if not self._portable:
            return
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}", PORTABLE)
        if state.is_world_process_zero:
            shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()
        save_checkpoint(self._trainer.model_wrapped, folder)
