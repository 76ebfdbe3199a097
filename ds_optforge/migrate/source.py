"""What a file of the user says, in one form whatever kind it is: the readers make it, mapping and writing use it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

Purpose: TypeAlias = Literal["pretrain", "finetune", "lora"]
Family: TypeAlias = Literal["adamw", "lion", "muon"]

AUTO = "auto"  # a framework fills it, from the user's own file or script


class Given(NamedTuple):
    """A value of the source, and where it comes from: a key of the file, or whose default it is."""

    value: Any
    origin: str


_MOMENTUM, _METHOD = Given(0.95, "the default of DeepSpeed"), Given("gram", "the default of DeepSpeed")


class Reason(NamedTuple):
    """A value of the result, at its path there, and why it is what it is."""

    path: str
    value: Any
    why: str


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """The optimizer that the source trains with.

    Attributes:
        family: which update it is; for muon, AdamW steps the rest.
        lr: of all parameters, or of muon's matrices.
        weight_decay: decoupled, times the learning rate.
        betas: of AdamW or Lion.
        eps: of AdamW.
        rest_lr: of what muon leaves to AdamW; the same as ``lr`` for the other families.
        momentum: of muon.
        method: of muon's Newton-Schulz iteration.
        state_8bit: whether its state has 8 bits.
    """

    family: Family
    lr: Given
    weight_decay: Given
    betas: Given
    eps: Given
    rest_lr: Given
    momentum: Given = _MOMENTUM
    method: Given = _METHOD
    state_8bit: bool = False


@dataclass(frozen=True, slots=True)
class Schedule:
    """The learning-rate schedule of the source, as "params" of an OptForgeSchedule section.

    Attributes:
        params: of the section; None where the framework goes on building its own schedule.
        reasons: for each of them.
        not_carried: a line for each thing that they do not say.
        rate: the learning rate that the source's scheduler writes over the optimizer's, if it does.
    """

    params: dict[str, Any] | None
    reasons: tuple[Reason, ...] = ()
    not_carried: tuple[str, ...] = ()
    rate: Given | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Everything that one of the readers found.

    Attributes:
        file: of the user.
        kind: of the file, in words.
        config: the DeepSpeed configuration that it uses, as it is, or the one that stands for its settings.
        config_file: the file of ``config``; None where there is none.
        optimizer: what it trains with.
        schedule: of the learning rate; None without one.
        reasons: for values of ``config`` that no DeepSpeed file of the user has.
        not_carried: a line for each setting that the result cannot have.
        purpose: what the file says that it trains for, if it does.
        fills: what the framework puts in the place of "auto", as (key of the file, its value there), by key of "params".
        own_keys: lines to change in the user's own file, as (key, value); a value of None removes the key.
        steps: what else to do, a paragraph each; may hold a code block. ``{out}`` stands for the name of the new file.
    """

    file: Path
    kind: str
    config: dict[str, Any]
    config_file: Path | None
    optimizer: OptimizerSettings
    schedule: Schedule | None = None
    reasons: tuple[Reason, ...] = ()
    not_carried: tuple[str, ...] = ()
    purpose: Purpose | None = None
    fills: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    own_keys: tuple[tuple[str, Any], ...] = ()
    steps: tuple[str, ...] = ()
