"""What the ranks of a pool run to test portable checkpoints."""

import errno
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import numpy
import torch
import torch.distributed as dist

import ds_optforge
from ds_optforge.checkpoint.files import Checkpoint
from ds_optforge.zero.engine import loss_scale
from tests import models
from tests.distributed.cases import MixtureNet, base_optimizer, build_engine, full_parameters, run_steps
from tests.processes import at_call, die_while_saving

HALF = 5  # steps before the checkpoint, and after it


def run_and_save(config: dict[str, Any], folder: str, how: str = "portable", **model_options: Any) -> dict[str, Any]:
    """Half of the steps, a checkpoint, the other half: losses and parameters of the latter."""
    engine = build_engine(config, model_options)
    try:
        run_steps(engine, 0, HALF)
        if how == "engine":
            engine.save_checkpoint(folder)
        else:
            writing = ds_optforge.save_checkpoint(engine, folder, {"next": HALF}, wait=how != "background")
        result = {"losses": run_steps(engine, HALF, HALF), "parameters": full_parameters(engine.module)}
        result["loss_scale"] = loss_scale(engine.optimizer)
        if how == "background":
            assert writing is not None
            writing.result()
        return result
    finally:
        engine.destroy()


def resume(config: dict[str, Any], folder: str, strict: bool = True, **model_options: Any) -> dict[str, Any]:
    """Load into a fresh engine and take the other half of the steps."""
    engine = build_engine(config, model_options)
    try:
        client_state = ds_optforge.load_checkpoint(engine, folder, strict)
        assert client_state in ({"next": HALF}, {})
        return {
            "steps": engine.global_steps,
            "losses": run_steps(engine, HALF, HALF, engine.gradient_accumulation_steps()),
            "parameters": full_parameters(engine.module),
            "loss_scale": loss_scale(engine.optimizer),
        }
    finally:
        engine.destroy()


def resume_each(configs: Sequence[dict[str, Any]], folder: str, **model_options: Any) -> list[dict[str, Any]]:
    return [resume(config, folder, **model_options) for config in configs]


def load_and_save(config: dict[str, Any], source: str, target: str, **model_options: Any) -> None:
    """Nothing but a round trip."""
    engine = build_engine(config, model_options)
    ds_optforge.load_checkpoint(engine, source)
    ds_optforge.save_checkpoint(engine, target, {"next": HALF})
    engine.destroy()


def refused(config: dict[str, Any], folder: str, strict: bool = True, **model_options: Any) -> tuple[str, bool]:
    """Load into an engine that has taken steps: the error, and whether weights and state are what they were."""
    engine = build_engine(config, model_options)
    run_steps(engine, 0, 2)
    before = everything(engine)
    message = ""
    try:
        ds_optforge.load_checkpoint(engine, folder, strict)
    except ds_optforge.CheckpointError as error:
        message = str(error)
    after = everything(engine)
    engine.destroy()
    return message, all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def everything(engine: Any) -> list[torch.Tensor]:
    """Copies of weights and state."""
    base = base_optimizer(engine)
    state = [v for s in base.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return [tensor.detach().clone() for tensor in [*full_parameters(engine.module).values(), *base.state, *state]]


def logical_tensors(folder: str | Path) -> Mapping[str, torch.Tensor]:
    """Everything in a portable checkpoint but the random states."""
    checkpoint = Checkpoint(Path(folder))
    assert not checkpoint.damage()
    return {name: checkpoint.whole(name) for name in checkpoint.tensors if not name.startswith("random/")}


def save_both(config: dict[str, Any], folder: str, **model_options: Any) -> None:
    """The same moment as an engine checkpoint and as a portable one."""
    engine = build_engine(config, model_options)
    run_steps(engine, 0, HALF)
    client_state = {"epoch": 3, "sampler": {"seed": 1, "seen": [0, 2]}}
    engine.save_checkpoint(f"{folder}/engine", client_state=client_state)
    ds_optforge.save_checkpoint(engine, f"{folder}/portable", client_state)
    engine.destroy()


def save_engine(config: dict[str, Any], folder: str, client_state: dict[str, Any]) -> None:
    """After one step, by DeepSpeed."""
    engine = build_engine(config, {})
    run_steps(engine, 0, 1)
    engine.save_checkpoint(folder, client_state=client_state)
    engine.destroy()


def save_and_average(config: dict[str, Any], folder: str) -> dict[str, torch.Tensor]:
    """A checkpoint, and the weights to evaluate with at that moment."""
    engine = build_engine(config, {})
    run_steps(engine, 0, HALF)
    ds_optforge.save_checkpoint(engine, folder)
    engine.save_checkpoint(f"{folder} engine")
    averages = _averages(engine)
    engine.destroy()
    return averages


def load_and_average(config: dict[str, Any], folder: str, how: str = "portable") -> dict[str, Any]:
    """Load into a fresh engine: trained weights, those to evaluate with, the same five steps later, what was logged."""
    engine = build_engine(config, {})
    lines, logger = Lines(), logging.getLogger("ds_optforge")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    try:
        if how == "engine":
            engine.load_checkpoint(folder)
        else:
            ds_optforge.load_checkpoint(engine, folder)
        found: dict[str, Any] = {"trained": full_parameters(engine.module), "averages": _averages(engine)}
        run_steps(engine, HALF, HALF)
        found |= {"later": _averages(engine), "lines": [line for line in lines.found if "goes on from" in line]}
        return found
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)
        engine.destroy()


class Lines(logging.Handler):
    """Collects what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


def _averages(engine: Any) -> dict[str, torch.Tensor]:
    with ds_optforge.evaluation_weights(engine):
        return full_parameters(engine.module)


def run_incumbent(config: dict[str, Any], folder: str) -> dict[str, Any]:
    """DeepSpeed's built-in Muon: losses, weights at the end, and the momenta that it must have, computed on the side."""
    model, reference = models.build(), models.build()
    names = [name for name, _ in reference.named_parameters() if name.startswith("blocks")]
    momenta = {name: torch.zeros_like(reference.get_parameter(name)) for name in names}
    for name, parameter in model.named_parameters():
        parameter.use_muon = name in names  # type: ignore[attr-defined]
    engine = deepspeed.initialize(model=model, config=config)[0]
    try:
        losses = []
        for step in range(HALF):
            reference.load_state_dict(full_parameters(model))
            reference.zero_grad()
            reference(*models.batch(step)).backward()
            for name, momentum in momenta.items():
                momentum.lerp_(reference.get_parameter(name).grad, 1 - 0.95)
            losses += run_steps(engine, step, 1)
        engine.save_checkpoint(folder)
        return {"losses": losses, "parameters": full_parameters(model), "momenta": momenta}
    finally:
        engine.destroy()


def killed_while_saving(config: dict[str, Any], folder: str, rank: int) -> None:
    """One rank dies by SIGKILL."""
    engine = build_engine(config, {})
    run_steps(engine, 0, 1)
    if dist.get_rank() == rank:
        die_while_saving(Path(folder))
    ds_optforge.save_checkpoint(engine, folder)


def resume_late(config: dict[str, Any], folder: str) -> dict[str, Any]:
    """Rank 1 takes its time before it loads."""
    if dist.get_rank() == 1:
        time.sleep(2.0)
    return resume(config, folder)


def resume_suspended(config: dict[str, Any], folder: str) -> dict[str, Any]:
    """Rank 1 is stopped by SIGSTOP inside the first exchange of a step, for two seconds."""
    if dist.get_rank() == 1:
        go_on = ["sh", "-c", f"sleep 2; kill -CONT {os.getpid()}"]
        at_call("exchange.py", "give_back", 1, lambda: (subprocess.Popen(go_on), os.kill(os.getpid(), signal.SIGSTOP)))
    try:
        return resume(config, folder)
    finally:
        sys.setprofile(None)


def save_where_the_disk_is_full(config: dict[str, Any], folder: str) -> None:
    """The disk that rank 1 writes to."""

    def fail(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(folder) and "w" in str(arguments[1]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    if dist.get_rank() == 1:
        sys.addaudithook(fail)
    run_and_save(config, folder)


def impatient_engine(config: dict[str, Any]) -> Any:
    """After a step, as of which its ranks wait 3 s for each other."""
    engine = build_engine(config, {})
    run_steps(engine, 0, 1)
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3), group)
    return engine


def step_without_rank_1(config: dict[str, Any]) -> None:
    """Rank 1 goes away after a step, without ending."""
    engine = impatient_engine(config)
    if dist.get_rank() == 0:
        run_steps(engine, 1, 1)


def refused_where_the_disk_fails(config: dict[str, Any], folder: str) -> tuple[str, bool]:
    """On rank 1, which finds its share of the files to be sound and then cannot list the folder to read their headers."""

    def fail(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.listdir", "os.scandir") and str(arguments[0]) == folder:
            raise OSError(errno.EIO, os.strerror(errno.EIO), folder)

    if dist.get_rank() == 1:
        sys.addaudithook(fail)
    return refused(config, folder)


def refused_of_each_its_own(config: dict[str, Any], folders: Sequence[str]) -> tuple[str, bool]:
    """As on hosts that have different folders under one name."""
    return refused(config, folders[dist.get_rank()])


def save_without_rank_1(config: dict[str, Any], folder: str) -> None:
    """Rank 1 goes away before it saves, without ending."""
    engine = impatient_engine(config)
    if dist.get_rank() == 0:
        ds_optforge.save_checkpoint(engine, folder)


def draw_and_save(config: dict[str, Any], folder: str) -> dict[str, Any]:
    """A checkpoint in the middle of a random stream that is each rank's own; and what comes next."""
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(dist.get_rank())
    engine = build_engine(config, {})
    run_steps(engine, 0, HALF)
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(10 + dist.get_rank())
    draw()
    ds_optforge.save_checkpoint(engine, folder)
    return next_of(engine)


def load_and_draw(config: dict[str, Any], folder: str) -> dict[str, Any]:
    engine = build_engine(config, {})
    ds_optforge.load_checkpoint(engine, folder)
    return next_of(engine)


def next_of(engine: Any) -> dict[str, Any]:
    groups = base_optimizer(engine).param_groups
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    engine.destroy()
    return {"numbers": draw(), "settings": settings}


def draw() -> list[float]:
    return [torch.rand(()).item(), torch.randn(()).item(), random.random(), random.gauss(0, 1), numpy.random.normal()]


def save_mixture(config: dict[str, Any], folder: str) -> None:
    """Experts on two ranks."""
    engine = ds_optforge.initialize(model=MixtureNet(expert_parallel_size=2), config=config)[0]
    run_steps(engine, 0, 1)
    ds_optforge.save_checkpoint(engine, folder)


def save_unsavable(config: dict[str, Any], folder: str, odd: Any) -> None:
    """Rank 1 alone asks for what JSON cannot hold."""
    engine = build_engine(config, {})
    ds_optforge.save_checkpoint(engine, folder, {"position": odd if dist.get_rank() == 1 else 1})


ADAMW = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
CLIENT_STATE = {"epoch": 3}


def adamw_engine(config: dict[str, Any], how: str = "groups", **model_options: Any) -> Any:
    """An engine of an AdamW that is not ours.

    Args:
        how: what torch's AdamW is given: "groups" (vectors without decay, then the rest), "named" (the same with their names),
            or "all" in the model's order, frozen ones too; "ramp" is "groups" with a scheduler that is torch's. "section"
            takes the optimizer section of ``config``.
    """
    model = models.build(**model_options)
    if how == "section":
        return deepspeed.initialize(model=model, config=config)[0]
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if how == "all":
        given: Any = list(model.parameters())
    else:
        members = [[item for item in trained if (item[1].ndim < 2) == small] for small in (True, False)]
        listed = members if how == "named" else [[parameter for _, parameter in items] for items in members]
        given = [{"params": listed[0], "weight_decay": 0.0}, {"params": listed[1]}]
    optimizer = torch.optim.AdamW(given, **ADAMW)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, ramp) if how == "ramp" else None
    return deepspeed.initialize(model=model, config=config, optimizer=optimizer, lr_scheduler=scheduler)[0]


def ramp(step: int) -> float:
    """The Trainer's own warm-up, a LambdaLR."""
    return (step + 1) / 20


def run_adamw(config: dict[str, Any], folder: str, how: str = "groups", **model_options: Any) -> dict[str, Any]:
    """Half of the steps, a checkpoint, the other half: losses, weights when it was saved, a step later and in the end."""
    engine = adamw_engine(config, how, **model_options)
    try:
        run_steps(engine, 0, HALF)
        engine.save_checkpoint(folder, client_state=CLIENT_STATE)
        saved = full_parameters(engine.module)
        losses = run_steps(engine, HALF, 1)
        after = full_parameters(engine.module)
        losses += run_steps(engine, HALF + 1, HALF - 1)
        last = full_parameters(engine.module)
        return {"losses": losses, "saved": saved, "after": after, "last": last, "loss_scale": loss_scale(engine.optimizer)}
    finally:
        engine.destroy()


def go_on_from_adamw(config: dict[str, Any], folder: str, copy: str | None = None, **model_options: Any) -> dict[str, Any]:
    """Load what was converted into one of our engines, save it again if asked for, and take the other half of the steps."""
    engine = build_engine(config, model_options)
    try:
        client_state = ds_optforge.load_checkpoint(engine, folder)
        assert (engine.global_steps, client_state) == (HALF, CLIENT_STATE)
        if copy:
            ds_optforge.save_checkpoint(engine, copy)
        rates = [group["lr"] for group in base_optimizer(engine).param_groups]
        losses = run_steps(engine, HALF, 1)
        after = full_parameters(engine.module)
        losses += run_steps(engine, HALF + 1, HALF - 1)
        return {"losses": losses, "after": after, "last": full_parameters(engine.module), "rates": rates}
    finally:
        engine.destroy()


def rates_from_adamw(config: dict[str, Any], folder: str) -> list[list[float]]:
    """The rates of each group after what was converted has been loaded, and a step later, with a scheduler that is torch's."""
    model = models.build()
    optimizer = ds_optforge.build_optimizer(model, config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, ramp)
    given = {key: value for key, value in config.items() if key != "optimizer"}
    engine = ds_optforge.initialize(model=model, config=given, optimizer=optimizer, lr_scheduler=scheduler)[0]
    try:
        ds_optforge.load_checkpoint(engine, folder)
        found = [[group["lr"] for group in optimizer.param_groups]]
        run_steps(engine, HALF, 1)
        return [*found, [group["lr"] for group in optimizer.param_groups]]
    finally:
        engine.destroy()


def refused_by_the_engine(config: dict[str, Any], folder: str, **options: bool) -> str:
    """What DeepSpeed's own call says of another optimizer's checkpoint; "" if it takes it."""
    engine = build_engine(config, {})
    try:
        engine.load_checkpoint(folder, **options)
    except (ds_optforge.ConfigError, RuntimeError) as error:
        return str(error)
    finally:
        engine.destroy()
    return ""
