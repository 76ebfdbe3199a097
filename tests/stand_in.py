"""An OptForge on the meta device with a layout of ZeRO that no engine made: one rank of any number, of a model of any size."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_optforge import build_optimizer
from ds_optforge.optimizer import OptForge
from ds_optforge.step.groups import GROUP
from ds_optforge.zero import agreement, exchange, group_plan
from ds_optforge.zero.layout import Binding
from ds_optforge.zero.partition import cuts_of_group, cuts_of_parameters
from tests.launches import Launches

META = torch.device("meta")
Shape = tuple[int, ...]


@dataclass
class Collectives:
    """In place of torch.distributed: nothing travels, what is waited for is noted.

    Attributes:
        hidden: for each exchange that was waited for, the launches between its issue and the wait.
    """

    counter: Launches
    hidden: list[int] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0

    def all_to_all_single(
        self, out: Tensor, into: Tensor, out_splits: list[int], in_splits: list[int], group: Any, async_op: bool
    ) -> "_Work":
        assert (sum(out_splits), sum(in_splits)) == (out.numel(), into.numel())
        assert async_op
        assert out.device == into.device == META
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        return _Work(self, self.counter.launches)

    def all_reduce(self, values: Tensor, **_: Any) -> None:
        assert values.device == META


@dataclass
class _Work:
    collectives: Collectives
    issued: int

    def wait(self) -> None:
        self.collectives.under_way -= 1
        self.collectives.hidden.append(self.collectives.counter.launches - self.issued)


@dataclass
class Stepped:
    """What one steady step of one rank did.

    Attributes:
        counts: of the step.
        hidden: for each collective, the launches between its issue and the wait for it.
        most_under_way: collectives at a time.
        exchanges: that the step has.
        buckets: that travel or do not.
        batches: of matrices in them.
        portions: of them.
        fragments: that the rank holds.
    """

    counts: Launches
    hidden: list[int]
    most_under_way: int
    exchanges: int
    buckets: int
    batches: int
    portions: int
    fragments: int


def model_of(shapes: Sequence[Shape]) -> nn.Module:
    """Layers of (out, in) and banks of (n, out, in) matrices in bfloat16 on ``meta``, and a head, which no test steps."""
    model = nn.Module()
    for index, shape in enumerate(shapes):
        if len(shape) == 2:
            model.add_module(f"layer{index}", nn.Linear(shape[1], shape[0], bias=False, device=META, dtype=torch.bfloat16))
        else:
            model.register_parameter(f"experts{index}", nn.Parameter(torch.empty(shape, device=META, dtype=torch.bfloat16)))
    model.add_module("head", nn.Linear(1, 1, bias=False, device=META))
    return model


@contextmanager
def standing(
    shapes: Sequence[Shape], stage: int, world: int, rank: int = 0, offload: bool = False, **config: Any
) -> Iterator[tuple[OptForge, Collectives]]:
    """An optimizer whose first group is cut as ZeRO ``stage`` cuts it over ``world`` ranks, with a gradient; and a counter.

    Args:
        shapes: of the parameters.
        stage: 1, 2 or 3.
        world: number of ranks.
        rank: which of them.
        offload: whether slices and state are the host's.
        config: of the optimizer.
    """
    model = model_of(shapes)
    optimizer = build_optimizer(model, {"lr": 0.02, **config})
    group = optimizer.param_groups[0]
    for other in optimizer.param_groups[1:]:
        other["params"] = []
    if optimizer._telemetry:  # is not to wait for them
        optimizer._telemetry._members = {group[GROUP]: optimizer._groups.members[group[GROUP]]}
        optimizer._telemetry._begin()
    numels = [parameter.numel() for parameter in group["params"]]
    assert len(numels) >= len(shapes)
    cuts, size = (cuts_of_parameters if stage == 3 else cuts_of_group)(numels, world)
    device = torch.device("cpu") if offload else META
    tensor = torch.zeros(size, dtype=torch.float32, device=device)
    tensor.grad = torch.zeros_like(tensor)
    group["params"] = [tensor]
    binding = Binding(tuple(range(len(numels))), tuple(cuts), world, rank, object(), META)  # type: ignore[arg-type]
    counter = Launches()
    collectives = Collectives(counter)
    stub = SimpleNamespace(
        all_to_all_single=collectives.all_to_all_single,
        all_reduce=collectives.all_reduce,
        is_initialized=lambda: False,
        ReduceOp=dist.ReduceOp,
        Work=dist.Work,
        ProcessGroup=dist.ProcessGroup,
    )
    with (
        mock.patch.object(group_plan, "bind", return_value=binding),
        mock.patch.object(exchange, "dist", stub),
        mock.patch.object(agreement, "dist", stub),
        counter,
    ):
        yield optimizer, collectives


def steady_step(shapes: Sequence[Shape], stage: int, world: int, rank: int = 0, **options: Any) -> Stepped:
    """Step twice, and count the second time; arguments as in `standing`."""
    with standing(shapes, stage, world, rank, **options) as (optimizer, collectives):
        optimizer.step()
        collectives.counter.clear()
        collectives.hidden.clear()
        optimizer.step()
        (slices,) = optimizer._groups.bound
    every = (*slices.travelling, *slices.local)
    return Stepped(
        collectives.counter,
        collectives.hidden,
        collectives.most_under_way,
        len(slices.travelling),
        len(every),
        sum(len(bucket.exchange.batches) for bucket in every),
        sum(len(bucket.portions) for bucket in every),
        sum(len(bucket.exchange.bucket.fragments) for bucket in every),
    )
