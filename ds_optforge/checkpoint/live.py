"""A live engine, as a checkpoint sees it: what one rank holds of it, and what the manifest says of the whole."""

import hashlib
import math
import platform
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_optforge.checkpoint.chunks import Chunk, flat_chunk
from ds_optforge.checkpoint.logical import (
    State,
    add_members,
    block_cuts,
    buffer_name,
    chunks_of,
    factor_name,
    logical_group,
    owned_chunks,
    weight_name,
)
from ds_optforge.checkpoint.manifest import plain
from ds_optforge.checkpoint.random_states import random_states
from ds_optforge.checkpoint.shards import Shards, shards_of
from ds_optforge.errors import CheckpointError
from ds_optforge.optimizer import OptForge, groups_of, refuse_while_averaged
from ds_optforge.routing.tags import tags_of
from ds_optforge.rules.base import factors_of, statistics_of
from ds_optforge.step.groups import GROUP
from ds_optforge.step.slices import Members, Slices
from ds_optforge.zero.engine import counters, local_part, loss_scale, model_parallelism, stepped_tensors
from ds_optforge.zero.partition import Range
from ds_optforge.zero.pipeline import TIED, from_all_stages, replicated
from ds_optforge.zero.shards import full_shape


@dataclass(frozen=True, slots=True, eq=False)
class Stepped:
    """The tensors that one call of ``step()`` updates: those of a parameter group, or of a sub-group on ZeRO-3."""

    group: dict[str, Any]
    members: Members
    slices: Slices
    states: list[State]

    @property
    def name(self) -> str:
        return logical_group(str(self.group[GROUP]))

    @property
    def buffers(self) -> list[str]:
        return [buffer.name for buffer in self.members.buffers]

    def factor_sizes(self, shards: Shards) -> dict[str, int]:
        """Elements of the logical tensor of each factor of all matrices of the call, whoever owns them, by its name."""
        placement, found = self.slices.placement, {}
        for parameter, name in enumerate(placement.layout.names):
            matrices = placement.matrices_of(parameter)
            for index, factor in product(matrices, factors_of(self.members.rule)):
                number, _ = shards.values(name, Range(index - matrices.start, 1), len(matrices))
                key = factor_name(buffer_name(name, factor.name), number)
                found[key] = math.prod(placement.layout.matrices[index].factor(factor.of))
        return found

    def chunks(self, copies: Container[str], elsewhere: Container[str], shards: Shards) -> Iterator[Chunk]:
        """This rank's chunks: `chunks_of`, and `owned_chunks`.

        Args:
            copies: names of the parameters of which another stage of a pipeline has the chunks.
            elsewhere: these, and names of those of which another tensor rank has the chunks.
            shards: as in `chunks_of`.
        """
        statistics = [(statistic.name, statistic.per) for statistic in statistics_of(self.members.rule)]
        placement, tensors = self.slices.placement, self.slices.tensors
        yield from chunks_of(placement, tensors, self.states, self.buffers, statistics, elsewhere, shards)
        factors = [(factor.name, factor.of) for factor in factors_of(self.members.rule)]
        # Where tensor ranks plan together, any of them may own a matrix that they do not cut.
        without = copies if placement.layout.tensor_ranks > 1 else elsewhere
        yield from owned_chunks(placement, self.states, factors, without, shards)


class LiveEngine:
    """A live engine, as a checkpoint sees it. Making it is collective: all ranks do it together.

    Raises:
        CheckpointError: OptForge does not train the engine, or parallelism other than that of data cuts its parameters.
        RuntimeError: inside ``evaluation_weights``.
    """

    def __init__(self, engine: Any) -> None:
        self.engine, self.module, self.wrapper = engine, engine.module, engine.optimizer
        base = self.wrapper
        while base is not None and not isinstance(base, OptForge):
            base = getattr(base, "optimizer", None)
        if base is None:
            raise CheckpointError(f"got an engine with {type(self.wrapper).__name__}; allowed: one that OptForge trains")
        self.optimizer: OptForge = base
        self._refuse_model_parallel()
        self.shards = shards_of(list(self._named_parameters()))
        refuse_while_averaged(base, "a checkpoint")
        groups, self._stage = groups_of(base), groups_of(base).stage
        self.stepped = [
            self._stepped(group, tensors)
            for group, tensors in stepped_tensors(self.wrapper, base.param_groups)
            if groups[group].parameters  # else other stages of a pipeline have them
        ]
        self._refuse_blocks_and_parts()
        self._copies = {name for name, parameter in self._named_parameters() if replicated(parameter)}
        shared = self._from_all_stages((self._own_shapes(), self._own_groups(), self._own_block_cuts(), self._unsynchronized()))
        self.shapes, self.groups, self._block_cuts = _merged([part[:3] for part in shared])
        _refuse_other_copies([part[3] for part in shared])

    def _refuse_model_parallel(self) -> None:
        """Raise CheckpointError where ranks have different tensors under the same name."""
        if found := model_parallelism(self.engine):
            raise CheckpointError(f"got {found}; allowed: data parallelism alone (engine.save_checkpoint saves the others)")

    def _stepped(self, group: dict[str, Any], tensors: list[Tensor]) -> Stepped:
        groups = groups_of(self.optimizer)
        slices = groups.slices_of(group, tensors)
        states: list[State] = [self.optimizer.state.get(tensor, {}) for tensor in tensors]
        return Stepped(group, groups[group], slices, states)

    def _refuse_blocks_and_parts(self) -> None:
        """Raise CheckpointError for state of shards that is no range of the whole parameter's state."""
        for stepped in self.stepped if self.shards.of else ():
            if stepped.members.settings.state_dtype == "8bit":
                raise CheckpointError(
                    f"parameter group '{stepped.name}': got 8-bit state, whose blocks model parallelism cuts; allowed: "
                    "state_dtype float32 or bfloat16 (engine.save_checkpoint saves the others)"
                )
            rule = stepped.members.rule
            for route in stepped.members.routes if statistics_of(rule) or factors_of(rule) else ():
                if route.name not in self.shards.of or route.name in self.shards.experts:
                    continue
                # The owner of a matrix that is cut part by part has its rows in an order of its own.
                if len(route.matrices) > 1 or (factors_of(rule) and self.shards.of[route.name].parts):
                    raise CheckpointError(
                        f"'{route.name}': got state of the matrices of a fused weight that tensor parallelism cuts; allowed: "
                        "no split (engine.save_checkpoint saves the others)"
                    )

    def _from_all_stages(self, value: Any) -> list[Any]:
        return from_all_stages(self._stage, value) if self._stage else [value]

    def on_any_stage(self, names: set[str]) -> set[str]:
        """Return the names that any stage of a pipeline has. Collective over its ranks."""
        return set().union(*self._from_all_stages(names))

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the model's parameters, without the placeholders."""
        return (item for item in self.module.named_parameters() if not tags_of(item[1]).placeholder)

    def _unsynchronized(self) -> dict[str, str]:
        """Digests of parameters that other stages may have under the same name, but that DeepSpeed does not keep the same.

        A TiedLayerSpec ties the weights that it names; the other parameters of its module are each stage's own.
        """
        tied = {id(parameter) for parameter in self._stage.tied} if self._stage else set()
        return {
            name: hashlib.sha256(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, parameter in (self._named_parameters() if self._stage else ())
            if name.startswith(TIED) and id(parameter) not in tied
        }

    @property
    def untrained(self) -> dict[str, tuple[Tensor, int, int]]:
        """(values, start, elements of the whole) of the frozen parameters and persistent buffers that this rank holds."""
        trained = set(chain.from_iterable(stepped.slices.placement.layout.names for stepped in self.stepped))
        named = {n: local_part(p) for n, p in self._named_parameters() if n not in trained and full_shape(p).numel()}
        return named | {
            name: (buffer, 0, buffer.numel()) for name, buffer in _persistent_buffers(self.module) if buffer.numel()
        }

    def _own_shapes(self) -> dict[str, list[int]]:
        shapes = {name: list(full_shape(parameter)) for name, parameter in self._named_parameters()}
        shapes |= {name: list(self.shards.of[name].whole) for name in self.shards.experts}
        return shapes | {name: list(buffer.shape) for name, buffer in _persistent_buffers(self.module)}

    def chunks(self) -> list[Chunk]:
        """All chunks of this rank: weights, state, frozen parameters, buffers and random states.

        Of a parameter that several stages of a pipeline hold, the first has them, for others are cut elsewhere.
        """
        elsewhere = self._copies
        if self.shards.rank > 0:  # the first tensor rank has what is not cut
            elsewhere = elsewhere | (self.shapes.keys() - self.shards.of.keys())
        chunks = [chunk for stepped in self.stepped for chunk in stepped.chunks(self._copies, elsewhere, self.shards)]
        for name, (values, start, numel) in self.untrained.items():
            if values.numel() and name not in elsewhere:
                chunk = flat_chunk(weight_name(name), numel, start, values.reshape(-1))
                chunks += self.shards.whole_chunks(name, chunk)
        for kind, state in random_states().items():
            chunks.append(flat_chunk(f"random/{rank()}/{kind}", state.numel(), 0, state))
        return chunks

    def manifest(self, client_state: Mapping[str, Any] | None) -> dict[str, Any]:
        """All data that are no tensors. Raises CheckpointError for values that JSON cannot hold."""
        scheduler = getattr(self.engine, "lr_scheduler", None)
        return {
            "shapes": self.shapes,
            "groups": plain(self.groups, "the parameter groups"),
            "block_cuts": self._block_cuts,
            "counters": counters(self.engine),
            "loss_scale": loss_scale(self.wrapper),
            "scheduler": plain(scheduler.state_dict(), f"the state of {type(scheduler).__name__}") if scheduler else None,
            "client_state": plain(dict(client_state or {}), "client_state"),
            "written_by": {
                "world_size": dist.get_world_size() if dist.is_initialized() else 1,
                "zero_stage": self.engine.zero_optimization_stage(),
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
        }

    def _own_groups(self) -> dict[str, Any]:
        groups: dict[str, Any] = {}
        for stepped in self.stepped:
            members = [name for name in stepped.slices.placement.layout.names if name not in self._copies]
            add_members(groups, stepped.name, stepped.members.settings.rule, stepped.group, stepped.states[0], members)
        return groups

    def _own_block_cuts(self) -> dict[str, list[int]]:
        cuts: dict[str, list[int]] = {}
        for stepped in self.stepped:
            if stepped.members.settings.state_dtype == "8bit":
                placement = stepped.slices.placement
                cuts |= {name: block_cuts(placement, index) for index, name in enumerate(placement.layout.names)}
        return {name: found for name, found in cuts.items() if found and name not in self._copies}


def _merged(parts: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Merge what stages tell each other: shapes, groups, block cuts. A group's members are those of all stages."""
    shapes: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    cuts: dict[str, Any] = {}
    for own_shapes, own_groups, own_cuts in parts:
        shapes |= own_shapes
        cuts |= own_cuts
        for name, group in own_groups.items():
            known = groups.setdefault(name, {**group, "members": []})
            known["members"] = known["members"] + group["members"]
    return [shapes, groups, cuts]


def _refuse_other_copies(digests: Sequence[Mapping[str, str]]) -> None:
    """Raise CheckpointError where stages of a pipeline have different values under one name."""
    first: dict[str, str] = {}
    for own in digests:
        for name, digest in own.items():
            if first.setdefault(name, digest) != digest:
                raise CheckpointError(
                    f"'{name}' has other values on another stage of the pipeline, since its TiedLayerSpec does not tie it; "
                    "allowed: tied_weight_attr with every parameter of the layer (engine.save_checkpoint saves the others)"
                )


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def rank() -> int:
    """The number of this rank."""
    return dist.get_rank() if dist.is_initialized() else 0
