"""A matrix rule for tests that keeps what it is given: every sum, for each element that got it, beside what was summed.

All of it is state, so a checkpoint shows it by parameter, however ZeRO has cut the parameters.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ds_optforge.rules import (
    Batch,
    Buffer,
    Hyperparameters,
    MatrixRule,
    RuleSettings,
    State,
    Statistic,
    Sum,
    Sums,
    Tensors,
    Values,
)

GRADIENT_SUMS = (
    Sum("gradient"),
    Sum("weight_square"),
    Sum("weight_rows", per="row"),
    Sum("product", per="row"),  # of weight and gradient
    Sum("change", per="row"),  # of the gradient and the one of the step before
)
UPDATE_SUMS = (
    Sum("update_square", of_update=True),
    Sum("update_rows", per="row", of_update=True),
    Sum("update_weight", per="row", of_update=True),
    Sum("update_change", of_update=True),  # of the update and the one of the step before
)
SUMS = GRADIENT_SUMS + UPDATE_SUMS


@dataclass(frozen=True, slots=True)
class Summing(MatrixRule):
    """W <- W - 2 lr g, and nothing but copies beside it. ``got_SUM`` is what an element was given of a sum."""

    buffers: ClassVar[tuple[Buffer, ...]] = (
        Buffer("gradient", momentum=True),
        Buffer("gradient_before"),
        Buffer("weight"),
        *(Buffer(f"got_{item.name}") for item in GRADIENT_SUMS),
        Buffer("update", of_update=True),
        Buffer("update_before", of_update=True),
        *(Buffer(f"got_{item.name}", of_update=True) for item in UPDATE_SUMS),
        *(Buffer(f"later_{item.name}", of_update=True) for item in GRADIENT_SUMS),
    )
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("kept_weight_square", per="matrix"),
        Statistic("kept_product", per="row"),
        Statistic("steps", per="matrix"),
        Statistic("row_steps", per="row"),
    )
    sums: ClassVar[tuple[Sum, ...]] = SUMS
    scheduled: ClassVar[tuple[str, ...]] = ("lr",)
    reads_weights: ClassVar[bool] = True

    def cost(self, rows: int, cols: int) -> int:
        return rows * cols

    def direction(self, gradients: Tensors, weights: Tensors, state: State, sums: Sums, now: Hyperparameters) -> Tensors:
        copy(state["gradient_before"], state["gradient"])
        copy(state["gradient"], gradients)
        copy(state["weight"], weights)
        for name, given in sums.items():
            copy(state[f"got_{name}"], given)
        return list(gradients)

    def update(self, batch: Batch, now: Hyperparameters) -> Tensor:
        active = batch.active.view(-1, 1) != 0
        for kept, found in (("kept_weight_square", "weight_square"), ("kept_product", "product")):
            value = batch.statistics[kept]
            value.copy_(torch.where(active, batch.sums[found], value))
        for name in ("steps", "row_steps"):
            batch.statistics[name].add_(active.float())
        return 2.0 * batch.matrices * batch.active.view(-1, 1, 1)

    def rms(self, rows: int, cols: int, transposed: bool) -> float:
        return 1.0

    def summand(self, name: str, weights: Tensors, values: Tensors, state: State, now: Hyperparameters) -> Tensors:
        terms = {
            "gradient": lambda w, v, before: v,
            "weight_square": lambda w, v, before: w * w,
            "weight_rows": lambda w, v, before: w,
            "product": lambda w, v, before: w * v,
            "change": lambda w, v, before: v * before,
            "update_square": lambda w, v, before: v * v,
            "update_rows": lambda w, v, before: v,
            "update_weight": lambda w, v, before: v * w,
            "update_change": lambda w, v, before: v * before,
        }
        before = state["update" if name.startswith("update") else "gradient"]  # not yet advanced
        return [terms[name](*given) for given in zip(weights, values, before, strict=True)]

    def apply(
        self, parameters: Tensors, updates: Tensors, active: Tensor, state: State, sums: Sums, now: Hyperparameters
    ) -> None:
        if not active.any():
            return
        copy(state["update_before"], state["update"])
        copy(state["update"], updates)
        for name, given in sums.items():
            kind = "got" if f"got_{name}" in state else "later"
            copy(state[f"{kind}_{name}"], given)
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.sub_(now["lr"] * update)


@dataclass(frozen=True, slots=True)
class Silent(Summing):
    """The same without sums."""

    buffers: ClassVar[tuple[Buffer, ...]] = Summing.buffers[:1]
    statistics: ClassVar[tuple[Statistic, ...]] = ()
    sums: ClassVar[tuple[Sum, ...]] = ()
    summand = MatrixRule.summand  # type: ignore[assignment]

    def direction(self, gradients: Tensors, weights: Tensors, state: State, sums: Sums, now: Hyperparameters) -> Tensors:
        return list(gradients)

    def update(self, batch: Batch, now: Hyperparameters) -> Tensor:
        return 2.0 * batch.matrices * batch.active.view(-1, 1, 1)

    def apply(
        self, parameters: Tensors, updates: Tensors, active: Tensor, state: State, sums: Sums, now: Hyperparameters
    ) -> None:
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.sub_(now["lr"] * update)


@dataclass(frozen=True, slots=True)
class Settling(Silent):
    """The same with statistics that all ranks get. ``got_NAME`` is what an element was given."""

    buffers: ClassVar[tuple[Buffer, ...]] = (Buffer("got_thirds"), Buffer("got_last", of_update=True))
    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic("thirds", given="direction"),  # of the steps before, in float32
        Statistic("last", given="apply"),  # sum of the update's row
        Statistic("before", given="apply"),  # what that was in the step before
    )
    sums: ClassVar[tuple[Sum, ...]] = (Sum("rows", per="row", of_update=True),)

    def summand(self, name: str, weights: Tensors, values: Tensors, state: State, now: Hyperparameters) -> Tensors:
        return [value * 1.0 for value in values]

    def settle(self, of_update: bool, values: Values, now: Hyperparameters) -> Values:
        if not of_update:
            return {"given_thirds": values["thirds"]}
        active = values["active"] != 0
        moved = {"thirds": values["thirds"] + 1 / 3, "last": values["rows"], "before": values["last"]}
        kept = {name: torch.where(active, value, values[name]) for name, value in moved.items()}
        return {**kept, "given_last": values["last"]}

    def direction(self, gradients: Tensors, weights: Tensors, state: State, sums: Sums, now: Hyperparameters) -> Tensors:
        copy(state["got_thirds"], sums["given_thirds"])
        return list(gradients)

    def apply(
        self, parameters: Tensors, updates: Tensors, active: Tensor, state: State, sums: Sums, now: Hyperparameters
    ) -> None:
        copy(state["got_last"], sums["given_last"])
        Silent.apply(self, parameters, updates, active, state, sums, now)


class SummingSettings(RuleSettings):
    """Fields of ``summing``."""

    rule = "summing"
    title = "Summing"
    builds = Summing
    decay_rates = ()

    def build(self) -> Summing:
        return Summing()


class SilentSettings(RuleSettings):
    """Fields of ``silent``."""

    rule = "silent"
    title = "Silent"
    builds = Silent
    decay_rates = ()

    def build(self) -> Silent:
        return Silent()


class SettlingSettings(RuleSettings):
    """Fields of ``settling``."""

    rule = "settling"
    title = "Settling"
    builds = Settling
    decay_rates = ()

    def build(self) -> Settling:
        return Settling()


RULES = (SummingSettings, SilentSettings, SettlingSettings)
PARAMS = {"name": "summing", "lr": 0.01, "adamw": {"lr": 3e-3, "eps": 1e-5}, "sharding": {"wire_dtype": "float32"}}


def copy(targets: Tensors, values: Tensors) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)  # a sum per matrix, of one element, broadcasts


class Net(nn.Module):
    """Linears of odd shapes, a bank of three, convolution filters, and two weights that are stored (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 24)
        self.up = nn.Linear(24, 40)
        self.odd = nn.Linear(40, 33, bias=False)
        self.back = nn.ConvTranspose1d(33, 24, 1, bias=False)
        self.wide = nn.ConvTranspose1d(24, 8, 3, bias=False)
        self.bank = nn.Parameter(0.2 * torch.randn(3, 24, 17))
        self.filters = nn.Conv1d(8, 24, 3, bias=False)
        self.lm_head = nn.Linear(24, 50)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = F.gelu(self.odd(F.gelu(self.up(self.embed(tokens)))))
        x = self.back(x.unsqueeze(-1))
        x = x + self.filters(F.gelu(self.wide(x)))
        x = x.squeeze(-1)
        x = x + torch.einsum("bi,eij,ekj->bk", x, self.bank, self.bank)
        return F.cross_entropy(self.lm_head(x).float(), targets)


# By parameter: how many matrices it is, their rows and columns as they are stored, and whether the columns are outputs.
MATRICES = {
    "up.weight": (1, 40, 24, False),
    "odd.weight": (1, 33, 40, False),
    "back.weight": (1, 33, 24, True),
    "wide.weight": (1, 24, 24, True),
    "bank": (3, 24, 17, False),
    "filters.weight": (1, 24, 24, False),
}
