"""Logical tensors: weights and optimizer state under the names of the model's parameters and of their state buffers.

All are flat. ``model/NAME`` is a weight (the float32 one, where ZeRO keeps one); ``optimizer/NAME/BUFFER`` an elementwise
buffer, a statistic of all its matrices, or the codes of 8-bit blocks with their scales in ``BUFFER_absmax``. A factor of the
first matrix of a parameter is ``optimizer/NAME/FACTOR.0``: each is whole in one rank's file.
"""

import math
import re
from collections.abc import Callable, Container, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_optforge.checkpoint.chunks import Chunk, Request, flat_chunk
from ds_optforge.checkpoint.files import Checkpoint
from ds_optforge.checkpoint.shards import WHOLE, Shards
from ds_optforge.rules.base import Buffer, Rule, factors_of, statistics_of
from ds_optforge.state import BLOCK, EightBit, block_edges, dequantize, recut
from ds_optforge.step.groups import GROUP, KEYS_OF_FRAMEWORKS
from ds_optforge.step.slices import Members, Slices
from ds_optforge.zero.partition import Of, Per
from ds_optforge.zero.placement import Held, Placement

State = MutableMapping[str, Any]

_NO_HYPERPARAMETERS = (GROUP, *KEYS_OF_FRAMEWORKS)


def add_members(
    groups: dict[str, Any], name: str, rule: str, group: Mapping[str, Any], state: Mapping[str, Any], members: Sequence[str]
) -> None:
    """Enter what one call of ``step()`` updates into a parameter group of the manifest, which its first call makes.

    Args:
        groups: the manifest's groups, which are changed.
        name, rule, group: name, rule's name and dict of the parameter group.
        state: the state of the call's first tensor.
        members: names of the parameters.
    """
    made = {
        "rule": rule,
        "step": int(state.get("step", 0)),
        "scalars": {key: value for key, value in state.items() if isinstance(value, float)},
        "hyperparameters": {key: value for key, value in group.items() if key not in _NO_HYPERPARAMETERS},
        "members": [],
    }
    groups.setdefault(name, made)["members"] += members


def logical_group(name: str) -> str:
    """The name of a parameter group in a checkpoint: of experts without the number of ranks that share them out."""
    return re.sub(r"\.ep_size_\d+$", ".experts", name)


def weight_name(parameter: str) -> str:
    """The name of a parameter's logical tensor."""
    return f"model/{parameter}"


def misfits(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a line for each weight whose tensor is not there, or has not as many elements as its shape."""
    for name, shape in checkpoint.manifest["shapes"].items():
        needed, (found, _) = math.prod(shape), checkpoint.tensors.get(weight_name(name), (0, None))
        if found != needed:
            yield f"{checkpoint.folder}: '{name}' has {found} elements; allowed: {needed}, of the shape {shape}"


def buffer_name(parameter: str, buffer: str) -> str:
    """The name of the logical tensor of a parameter's state buffer, statistic or factor."""
    return f"optimizer/{parameter}/{buffer}"


def factor_name(name: str, matrix: int) -> str:
    """The name of the logical tensor of a parameter's factor, for the matrix of that number."""
    return f"{name}.{matrix}"


def absmax_of(name: str) -> str:
    """The name of the block scales of an 8-bit buffer."""
    return f"{name}_absmax"


def view(tensor: Tensor, held: Held) -> Tensor:
    """A flat view, (held.numel,), of what a rank holds of a parameter in the tensor that it steps."""
    return tensor.detach().view(-1).narrow(0, held.tensor_start, held.numel)


def chunks_of(
    placement: Placement,
    tensors: Sequence[Tensor],
    states: Sequence[State],
    buffers: Sequence[str],
    statistics: Sequence[tuple[str, Per]],
    without: Container[str] = (),
    shards: Shards = WHOLE,
) -> Iterator[Chunk]:
    """Yield views of one rank's weights and state, for the parameters that one call of ``step()`` updates.

    Args:
        placement: where the parameters lie in the tensors.
        tensors, states: the tensors that are stepped, and the state of each.
        buffers: names of the rule's elementwise buffers.
        statistics: (name, per) of each of the rule's statistics.
        without: names of parameters to leave out.
        shards: what tensor parallelism leaves this rank of the parameters; the call is then collective over tensor ranks.
    """
    places = {per: placement.value_places(per) for _, per in statistics}
    formats = [EightBit(fragments) for fragments in placement.held_fragments()]
    for parameter, name in enumerate(placement.layout.names):
        if name in without:
            continue
        numel = placement.numel(parameter)
        held = placement.held(parameter)
        if held is not None:
            weights = view(tensors[held.tensor], held)
            yield from shards.whole_chunks(name, flat_chunk(weight_name(name), numel, held.within.start, weights))
            state = states[held.tensor]
            for key in (buffer_name(name, buffer) for buffer in buffers if buffer in state):
                buffer = key.rpartition("/")[2]
                yield from shards.whole_chunks(name, flat_chunk(key, numel, held.within.start, view(state[buffer], held)))
                if absmax_of(buffer) in state:
                    edges = block_edges(numel, block_cuts(placement, parameter))
                    first = int(torch.searchsorted(edges, held.within.start))
                    scales = state[absmax_of(buffer)][formats[held.tensor].blocks(held.tensor_start, held.numel)]
                    yield flat_chunk(absmax_of(key), len(edges) - 1, first, scales)
        for statistic, per in statistics:
            kept = placement.held_values(parameter, per, places[per])
            if kept is not None and statistic in states[kept.tensor]:
                values, own = view(states[kept.tensor][statistic], kept), placement.values(parameter, per)
                _, count = shards.values(name, kept.within, own)
                for start, part in shards.value_ranges(name, per, kept.within, own):
                    found = values.narrow(0, part.start - kept.within.start, part.numel)
                    yield flat_chunk(buffer_name(name, statistic), count, start, found)


def owned_chunks(
    placement: Placement,
    states: Sequence[State],
    factors: Sequence[tuple[str, Of]],
    without: Container[str] = (),
    shards: Shards = WHOLE,
) -> Iterator[Chunk]:
    """Yield views of what one rank keeps of the matrices that it owns; arguments as in `chunks_of`.

    Args:
        factors: (name, of) of each of the rule's factors.
    """
    for factor, of in factors:
        for parameter, number, count, place in placement.owned_matrices(of):
            name = placement.layout.names[parameter]
            if name not in without and factor in states[place.tensor]:
                values = view(states[place.tensor][factor], Held(place.tensor, place.within.start, place.within))
                first, _ = shards.values(name, number, count)
                yield flat_chunk(factor_name(buffer_name(name, factor), first), values.numel(), 0, values)


def block_cuts(placement: Placement, parameter: int) -> list[int]:
    """Elements of a parameter at which fragments meet, on any rank, inside a block of 8-bit state; sorted."""
    layout = placement.layout
    cut, numel = layout.cuts[parameter], placement.numel(parameter)
    cuts = {layout.matrices[index].start for index in placement.matrices_of(parameter)}
    cuts |= {at - cut.base for at in range(-(-cut.base // cut.size) * cut.size, cut.base + numel, cut.size)}
    return sorted(at for at in cuts if 0 < at < numel and at % BLOCK)


class Loading:
    """Collects what to read of a checkpoint, and where to.

    Call the ``into`` methods, fill `requests` (`Checkpoint.read`), then call `finish`, which converts what was read.

    Args:
        cuts: by parameter, the elements at which the saved blocks of its 8-bit state restart (`block_cuts`).
        shards: what tensor parallelism leaves this rank of the parameters.
    """

    def __init__(self, checkpoint: Checkpoint, cuts: Mapping[str, Sequence[int]], shards: Shards = WHOLE) -> None:
        self._shards = shards
        self.requests: list[Request] = []
        self._stored, self._cuts = checkpoint.tensors, cuts
        self._conversions: list[Callable[[], object]] = []

    def finish(self) -> None:
        """Convert what was read to the format of the state. Call it once the requests are filled."""
        for convert in self._conversions:
            convert()

    def _elements(self, parameter: str, key: str, start: int, values: Tensor) -> None:
        """Request elements that this rank holds of a parameter, or of a buffer like it, from element ``start`` on."""
        requests, convert = self._shards.requests(parameter, key, start, values)
        self.requests += requests
        if convert is not None:
            self._conversions.append(convert)

    def into(self, target: Tensor, parameter: str, start: int) -> None:
        """Request a tensor of the model that the optimizer does not step.

        Args:
            target: of any shape, filled from element ``start`` of the ``parameter``, or buffer, of that name on.
        """
        if target.is_contiguous():
            self._elements(parameter, weight_name(parameter), start, target.view(-1))
        else:
            values = torch.empty(target.numel(), dtype=target.dtype)
            self._elements(parameter, weight_name(parameter), start, values)
            self._conversions.append(lambda: target.copy_(values.view(target.shape)))

    def into_weights(self, slices: Slices) -> None:
        """Request the weights that one call of ``step()`` updates."""
        placement = slices.placement
        for parameter, name in enumerate(placement.layout.names):
            held = placement.held(parameter)
            if held is not None:
                self._elements(name, weight_name(name), held.within.start, view(slices.tensors[held.tensor], held))

    def into_state(
        self, slices: Slices, states: Sequence[State], members: Members, saved: Callable[[str, str], str | None]
    ) -> None:
        """Request the state buffers, statistics and factors for ``states``, which must have been allocated.

        Args:
            slices: of one call of ``step()``.
            states: of its tensors.
            members: theirs.
            saved: function of (parameter, name of what is kept) that names the logical tensor to fill it from; None leaves it.
        """
        placement = slices.placement
        places = {statistic: placement.value_places(statistic.per) for statistic in statistics_of(members.rule)}
        for parameter, name in enumerate(placement.layout.names):
            held = placement.held(parameter)
            if held is not None:
                for buffer in members.buffers:
                    if (key := saved(name, buffer.name)) is not None:
                        self._into_buffer(slices, states[held.tensor], buffer, parameter, held, key)
            for statistic, found in places.items():
                kept = placement.held_values(parameter, statistic.per, found)
                if kept is not None and (key := saved(name, statistic.name)) is not None:
                    values, own = view(states[kept.tensor][statistic.name], kept), placement.values(parameter, statistic.per)
                    for start, part in self._shards.value_ranges(name, statistic.per, kept.within, own):
                        self.requests.append(Request(key, start, values.narrow(0, part.start - kept.within.start, part.numel)))
        self._into_factors(placement, states, members.rule, saved)

    def _into_factors(
        self, placement: Placement, states: Sequence[State], rule: Rule, saved: Callable[[str, str], str | None]
    ) -> None:
        for factor in factors_of(rule):
            for parameter, number, count, place in placement.owned_matrices(factor.of):
                name = placement.layout.names[parameter]
                if (key := saved(name, factor.name)) is not None:
                    values = view(states[place.tensor][factor.name], Held(place.tensor, place.within.start, place.within))
                    first, _ = self._shards.values(name, number, count)
                    self.requests.append(Request(factor_name(key, first), 0, values))

    def _into_buffer(self, slices: Slices, state: State, buffer: Buffer, parameter: int, held: Held, key: str) -> None:
        name = slices.placement.layout.names[parameter]
        stored = view(state[buffer.name], held)
        style = slices.format_of(held.tensor, buffer)
        if absmax_of(key) not in self._stored:
            if not isinstance(style, EightBit):
                self._elements(name, key, held.within.start, stored)
                return
            values = torch.empty(held.numel, dtype=torch.float32)  # not where 8-bit state was chosen to save memory
            self.requests.append(Request(key, held.within.start, values))
            self._conversions.append(lambda: style.write(state, buffer, held.tensor_start, values.to(stored.device)))
            return
        codes = stored if isinstance(style, EightBit) else torch.empty(held.numel, dtype=torch.uint8, device=stored.device)
        saved = block_edges(slices.placement.numel(parameter), self._cuts.get(name, ()))
        first = int(torch.searchsorted(saved, held.within.start, right=True)) - 1
        end = int(torch.searchsorted(saved, held.within.start + held.numel))
        scales = torch.empty(end - first, dtype=torch.float32, device=stored.device)
        self.requests += [Request(key, held.within.start, codes), Request(absmax_of(key), first, scales)]
        around = saved[first : end + 1] - held.within.start
        if not isinstance(style, EightBit):
            self._conversions.append(lambda: stored.copy_(dequantize(codes, scales, around, buffer.signed)))
            return
        cuts = block_cuts(slices.placement, parameter)
        edges = _within(block_edges(slices.placement.numel(parameter), cuts), held)
        own = state[absmax_of(buffer.name)][style.blocks(held.tensor_start, held.numel)]
        self._conversions.append(lambda: own.copy_(recut(codes, scales, around, edges, buffer.signed)))


def _within(edges: Tensor, held: Held) -> Tensor:
    """Edges of the blocks inside what a rank holds, counted from its first element."""
    inside = (edges >= held.within.start) & (edges <= held.within.start + held.numel)
    return edges[inside] - held.within.start
