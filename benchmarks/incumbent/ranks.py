"""What the ranks of a pool run for `test_claims`: the same model with DeepSpeed's built-in Muon and with OptForge's."""

from typing import Any

import deepspeed
import torch

import ds_optforge
from tests import models
from tests.distributed.cases import full_parameters, run_steps

# Adam beside the built-in Muon by torch, because DeepSpeed's own would be compiled first.
BUILT_IN = {"type": "Muon", "params": {"lr": 0.02, "momentum": 0.95, "ns_method": "standard", "torch_adam": True}}
OPTFORGE = {"type": "OptForge", "params": {"name": "muon", "lr": 0.02, "momentum": 0.95, "adamw": {"lr": 0.02}}}


def configuration(stage: int, optimizer: dict[str, Any], clipping: float = 0.0, **zero: Any) -> dict[str, Any]:
    """A DeepSpeed configuration with a global batch of 8; ``zero`` goes into zero_optimization."""
    return {
        "train_batch_size": 8,
        "gradient_clipping": clipping,
        "optimizer": optimizer,
        "zero_optimization": {"stage": stage, **zero},
    }


def engine_of(config: dict[str, Any]) -> Any:
    """An engine of either optimizer, by the one line and JSON."""
    model = models.build()
    ds_optforge.register(model)
    return deepspeed.initialize(model=model, config=config)[0]


def first_step(config: dict[str, Any]) -> tuple[float, float]:
    """Take one step.

    Returns:
        The norm of the change of the square matrices, and the global norm that DeepSpeed compared with ``gradient_clipping``.
    """
    engine = engine_of(config)
    try:
        before = _square(engine)
        run_steps(engine, 0, 1)
        norm = engine.get_global_grad_norm()
        return (_square(engine) - before).norm().item(), 0.0 if norm is None else float(norm)
    finally:
        engine.destroy()


def _square(engine: Any) -> torch.Tensor:
    """Every element of the matrices that both optimizers orthogonalize, in one tensor."""
    parameters = full_parameters(engine.module)
    return torch.cat([weight.flatten() for name, weight in parameters.items() if name.startswith("blocks")])


def losses_or_error(config: dict[str, Any], steps: int) -> list[float] | str:
    """The loss of each step, or the error that DeepSpeed raises while it builds the engine."""
    try:
        engine = engine_of(config)
    except ValueError as error:
        return str(error)
    try:
        return run_steps(engine, 0, steps)
    finally:
        engine.destroy()


def save(config: dict[str, Any], folder: str, steps: int) -> list[float]:
    """Train and write an engine checkpoint into ``folder``; return the losses."""
    engine = engine_of(config)
    try:
        losses = run_steps(engine, 0, steps)
        engine.save_checkpoint(folder)
        return losses
    finally:
        engine.destroy()


def loading_error(config: dict[str, Any], folder: str) -> str:
    """What DeepSpeed's own call says of an engine checkpoint that another number of ranks has written; "" if it takes it."""
    engine = engine_of(config)
    try:
        engine.load_checkpoint(folder)
    except Exception as error:  # DeepSpeed raises a class of its own
        return str(error)
    finally:
        engine.destroy()
    return ""


def universal_error(folder: str, target: str) -> str:
    """What `ds_to_universal` says of an engine checkpoint; "" if it converts it."""
    from argparse import Namespace

    from deepspeed.checkpoint.ds_to_universal import main

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    try:
        main(Namespace(input_folder=folder, output_folder=target, inject_missing_state=True, **options))
    except Exception as error:  # as above
        return f"{type(error).__name__}: {error}"
    return ""
