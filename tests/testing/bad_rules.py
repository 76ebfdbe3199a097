"""Rules with one defect each, which the checks must find. Run as a script it has `check_rule` look at one of them.

    python tests/testing/bad_rules.py RULE TIMEOUT_S CHECK ...

Not imported by the test modules: the registry of their process must not hold these rules.
"""

import os
import signal
import sys
import time
from typing import ClassVar

import torch
import torch.distributed as dist

from ds_optforge.rules import Batch, Buffer, Hyperparameters, State, Tensors, register_rule
from ds_optforge.rules.lion import Lion, LionSettings
from ds_optforge.rules.normuon import NorMuon, NorMuonSettings
from ds_optforge.testing import check_rule


class Partial(Lion):
    """Scales each step by the mean of the part of a parameter that it sees."""

    def step(self, parameters: Tensors, gradients: Tensors, state: State, now: Hyperparameters) -> None:
        scaled = [gradient / (gradient.abs().mean() + 1e-8) for gradient in gradients]
        torch._foreach_add_(list(parameters), scaled, alpha=-now["lr"])


class Spoiling(Lion):
    """Writes into the gradients."""

    def step(self, parameters: Tensors, gradients: Tensors, state: State, now: Hyperparameters) -> None:
        super().step(parameters, gradients, state, now)
        torch._foreach_mul_(list(gradients), 2.0)


class Forgetful(Lion):
    """Counts its steps outside of the state."""

    steps: ClassVar[dict[int, int]] = {}

    def step(self, parameters: Tensors, gradients: Tensors, state: State, now: Hyperparameters) -> None:
        self.steps[id(self)] = self.steps.get(id(self), 0) + 1
        super().step(parameters, gradients, state, {**now, "lr": now["lr"] * self.steps[id(self)]})


class Restless(NorMuon):
    """Advances the statistics of idle matrices too."""

    def update(self, batch: Batch, now: Hyperparameters) -> torch.Tensor:
        update = super().update(batch, now)
        batch.statistics["row_second_moment"].mul_(0.9).add_(0.1)
        return update


class Greedy(Lion):
    """Keeps the weights in a buffer that it does not declare to need full precision."""

    buffers: ClassVar[tuple[Buffer, ...]] = (Buffer("exp_avg", momentum=True), Buffer("slow", copies_weight=True))

    def step(self, parameters: Tensors, gradients: Tensors, state: State, now: Hyperparameters) -> None:
        torch._foreach_copy_(list(parameters), list(state["slow"]))
        super().step(parameters, gradients, state, now)
        torch._foreach_copy_(list(state["slow"]), list(parameters))


class Dying(Lion):
    """Ends its process on rank 1."""

    def step(self, parameters: Tensors, gradients: Tensors, state: State, now: Hyperparameters) -> None:
        if dist.is_initialized() and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        super().step(parameters, gradients, state, now)


class Hanging(Lion):
    """Never comes back on rank 1."""

    def step(self, parameters: Tensors, gradients: Tensors, state: State, now: Hyperparameters) -> None:
        if dist.is_initialized() and dist.get_rank() == 1:
            time.sleep(3600)
        super().step(parameters, gradients, state, now)


def registered(defect: type[Lion]) -> None:
    """Under the name of its class."""

    @register_rule
    class Settings(LionSettings):
        rule = defect.__name__.lower()
        title = defect.__name__
        builds = defect

        def build(self) -> Lion:
            return defect(cautious=self.cautious_weight_decay)


@register_rule
class RestlessSettings(NorMuonSettings):
    rule = "restless"
    title = "Restless"
    builds = Restless

    def build(self) -> Restless:
        return Restless(**self.arguments(), beta2=self.beta2)


for each in (Partial, Spoiling, Forgetful, Greedy, Dying, Hanging):
    registered(each)

if __name__ == "__main__":
    check_rule(sys.argv[1], checks=sys.argv[3:], timeout_s=float(sys.argv[2]))
