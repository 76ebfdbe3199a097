"""OptForge: a torch optimizer whose matrix rules see whole matrices, wherever ZeRO put their pieces.

It owns groups and state and walks the way of a step; the math is in ``rules/``, the layout, plan and collectives in
``zero/``.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ds_optforge.config import ConfigError, OptimizerConfig
from ds_optforge.roles import Route, log_routing, route, routing_table
from ds_optforge.rules.base import ElementwiseRule, MatrixRule, Rule
from ds_optforge.zero.exchange import BucketExchange, require_agreement
from ds_optforge.zero.layout import Binding, bind
from ds_optforge.zero.plan import Matrix, PartitionLayout, RankBucket, exchange_buckets, local_buckets, make_plan

_GROUP = "optforge_group"  # the key of a parameter group that says which of our groups it is
_GROUP_KEYS_OF_OTHERS = ("params", "moe", "name")  # what frameworks put into a parameter group


@dataclass(frozen=True, slots=True)
class _Group:
    """What a parameter group stands for. The group's dict holds only what a schedule may change."""

    parameters: tuple[Tensor, ...]
    routes: tuple[Route, ...]
    rule: Rule


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """A contiguous stretch of one slice, made of whole fragments of the given sizes."""

    piece: int
    start: int
    sizes: list[int]

    def of(self, pieces: Sequence[Tensor]) -> Tensor:
        return pieces[self.piece].narrow(0, self.start, sum(self.sizes))


@dataclass(frozen=True, slots=True, eq=False)
class _Bucket:
    exchange: BucketExchange
    runs: tuple[_Run, ...]

    def views(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """The bucket's part of flat tensors that are laid out like the slices."""
        return [run.of(pieces) for run in self.runs]

    def fragments(self, views: Sequence[Tensor]) -> list[Tensor]:
        """``views`` cut into fragments."""
        return [part for view, run in zip(views, self.runs, strict=True) for part in torch.split(view, run.sizes)]


@dataclass(frozen=True, slots=True, eq=False)
class _Bound:
    """One call's slices, the buckets of matrices that travel between ranks and of those that do not."""

    binding: Binding
    slices: tuple[Tensor, ...]
    travelling: tuple[_Bucket, ...]
    local: tuple[_Bucket, ...]


class OptForge(torch.optim.Optimizer):
    """Muon with AdamW for the rest, or either alone, on plain PyTorch and on every stage of DeepSpeed's ZeRO.

    Args:
        params: the model's parameters after ``ds_optforge.register(model)``, or groups of them. A group's other keys are
            settings for its parameters; KellerJordan's ``use_muon`` flag is one of them.
        config: the "params" of the optimizer section (see `ds_optforge.config`): ``name``, ``lr``, ...

    Raises:
        ConfigError: a bad configuration, or parameters that were not registered.

    ``step()`` raises LayoutError when ZeRO's layout cannot be read or ranks disagree about it.
    """

    def __init__(self, params: Iterable[Any], **config: Any) -> None:
        self._config = OptimizerConfig(config)
        routed = [item for index, group in enumerate(_as_groups(params)) for item in self._routed(index, group)]
        log_routing([item[1] for item in routed], self._config)
        self._routing = routing_table(item[1] for item in routed)
        self._groups: dict[str, _Group] = {}
        self._bound: dict[Tensor, _Bound] = {}
        self._rates_seen: dict[str, tuple[float, float]] = {}
        super().__init__(self._build_groups(routed), defaults={})

    def _routed(self, index: int, group: dict[str, Any]) -> list[tuple[Tensor, Route, str, dict[str, Any]]]:
        """(parameter, route, our group's identifier, what frameworks keep in the group) for one given group."""
        own = {key: value for key, value in group.items() if key not in _GROUP_KEYS_OF_OTHERS}
        kept: dict[str, Any] = {key: group[key] for key in ("moe", "name") if key in group}
        prefix = f"group{index}." if own or kept else ""
        routed = []
        for position, parameter in enumerate(group["params"]):
            if not (parameter.requires_grad and parameter.is_floating_point()):
                continue
            place = f"param_groups[{index}].params[{position}]"
            decided = route(parameter, self._config, own, place)
            routed.append((parameter, decided, prefix + decided.group, kept))
        return routed

    def _build_groups(self, routed: Sequence[tuple[Tensor, Route, str, dict[str, Any]]]) -> list[dict[str, Any]]:
        if not routed:
            raise ConfigError("params: got no trainable floating-point parameter; allowed: at least one")
        members: dict[str, list[tuple[Tensor, Route]]] = {}
        kept: dict[str, dict[str, Any]] = {}
        for parameter, decided, identifier, keys in routed:
            members.setdefault(identifier, []).append((parameter, decided))
            kept[identifier] = keys
        groups = []
        for identifier, group in members.items():
            parameters, routes = zip(*group, strict=True)
            settings = routes[0].settings
            self._groups[identifier] = _Group(parameters, routes, settings.build())
            values = {**kept[identifier], **settings.scheduled()}
            groups.append({"params": list(parameters), _GROUP: identifier, **values})
        return groups

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters of all groups (DeepSpeed narrows them to one), given their ``.grad``.

        A missing gradient counts as zeros; a matrix whose whole gradient is zero is neither updated nor decayed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["params"]:
                self._refuse_flattened_rates(group)
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        known = self._groups[group[_GROUP]]
        bound = self._bind(known, group["params"])
        gradients = [_flat_gradient(piece) for piece in bound.slices]
        fresh = not self.state[bound.slices[0]]
        state = {buffer.name: [self._buffer(piece, buffer.name) for piece in bound.slices] for buffer in known.rule.buffers}
        steps = [self._counter(piece) for piece in bound.slices]
        if fresh and self._is_rehearsal(known, bound, gradients):
            return
        parameters = [piece.detach().view(-1) for piece in bound.slices]
        if isinstance(known.rule, ElementwiseRule):
            known.rule.step(parameters, gradients, state, steps, group)
        elif isinstance(known.rule, MatrixRule):
            torch._foreach_add_(steps, 1)
            _MatrixStep(known.rule, group, parameters, gradients, state).run(bound)
        bound.binding.clear_spent_gradients(bound.slices)

    def _buffer(self, piece: Tensor, name: str) -> Tensor:
        state = self.state[piece]
        if name not in state:
            state[name] = torch.zeros_like(piece)
        buffer: Tensor = state[name]
        return buffer.view(-1)

    def _counter(self, piece: Tensor) -> Tensor:
        state = self.state[piece]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=piece.device)
        counter: Tensor = state["step"]
        return counter

    def _is_rehearsal(self, known: _Group, bound: _Bound, gradients: Sequence[Tensor]) -> bool:
        """DeepSpeed's stage 0 in fp16 and bf16 steps its clones once with zero gradients, only to allocate state."""
        clones = len(bound.slices) == len(known.parameters) and bound.slices[0] is not known.parameters[0]
        return clones and bound.slices[0].shape == known.parameters[0].shape and not any(g.any() for g in gradients)

    def _bind(self, known: _Group, slices: Sequence[Tensor]) -> _Bound:
        bound = self._bound.get(slices[0])
        if bound is not None and len(bound.slices) == len(slices):
            return bound
        names = [r.name for r in known.routes]
        binding = bind(known.parameters, names, slices)
        routes = [known.routes[i] for i in binding.indices]
        matrices = [Matrix(p, *place) for p, r in enumerate(routes) for place in r.matrices]
        layout = PartitionLayout(binding.world_size, tuple(r.name for r in routes), binding.cuts, tuple(matrices))
        sharding, rule = self._config.common.sharding, known.rule

        def cost(matrix: Matrix) -> int:
            return rule.cost(matrix.rows, matrix.cols) if isinstance(rule, MatrixRule) else 0

        plan = make_plan(layout, cost, sharding.bucket_numel)
        require_agreement(plan, self._routing, binding)
        wire = getattr(torch, sharding.wire_dtype)
        starts = list(accumulate((piece.numel() for piece in slices), initial=0))[:-1]

        def build(buckets: Sequence[RankBucket]) -> tuple[_Bucket, ...]:
            return tuple(_Bucket(BucketExchange(layout, b, binding, wire), _runs(b, starts)) for b in buckets)

        travelling, local = exchange_buckets(plan, binding.rank), local_buckets(plan, binding.rank)
        bound = self._bound[slices[0]] = _Bound(binding, tuple(slices), build(travelling), build(local))
        return bound

    def _refuse_flattened_rates(self, group: Mapping[str, Any]) -> None:
        """DeepSpeed's own schedulers write one learning rate into all groups; its groups come here one at a time."""
        configured = self._groups[group[_GROUP]].routes[0].settings.lr
        if "initial_lr" in group or group["lr"] == 0:  # a torch scheduler keeps the ratios; zero tells nothing yet
            return
        self._rates_seen[group[_GROUP]] = (configured, group["lr"])
        for other, (its_configured, its_rate) in self._rates_seen.items():
            if its_configured != configured and its_rate == group["lr"]:
                raise ConfigError(
                    f"scheduler: the groups '{other}' and '{group[_GROUP]}' are configured with lr {its_configured:g} and "
                    f"{configured:g}, but something set both to {its_rate:g}; allowed: a scheduler that keeps the ratio, "
                    'such as {"type": "OptForgeSchedule"}'
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned for the same groups. Raises ConfigError, before any change, for others."""
        found = [group.get(_GROUP) for group in state_dict["param_groups"]]
        expected = [group[_GROUP] for group in self.param_groups]
        if found != expected:
            raise ConfigError(f"the checkpoint holds the parameter groups {found}; allowed: this run's, {expected}")
        super().load_state_dict(state_dict)
        for piece, state in self.state.items():
            if "step" in state:  # torch leaves the counter where the file had it
                state["step"] = state["step"].to(piece.device)


class _MatrixStep:
    """One group's step of a matrix rule: buckets out to the owners, orthogonalized, and back."""

    def __init__(
        self,
        rule: MatrixRule,
        group: Mapping[str, Any],
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        state: Mapping[str, Sequence[Tensor]],
    ) -> None:
        self._rule = rule
        self._group = group
        self._parameters = parameters
        self._gradients = gradients
        self._state = state

    def run(self, bound: _Bound) -> None:
        """Keep one exchange travelling while another is orthogonalized; local matrices fill the gaps.

        The order of the collectives is the same on every rank: collect(k + 1) is issued before give_back(k).
        """
        travelling = bound.travelling
        last = len(travelling) - 1
        shares = [bound.local[k :: last + 2] for k in range(last + 2)]
        if travelling:
            self._collect(travelling[0])
        for k, bucket in enumerate(travelling):
            if k < last:
                self._collect(travelling[k + 1])
            self._step_locally(shares[k])
            self._orthogonalize(bucket)
            if k > 0:
                self._apply(travelling[k - 1])
        self._step_locally(shares[-1])
        if travelling:
            self._apply(travelling[-1])

    def _step_locally(self, buckets: Sequence[_Bucket]) -> None:
        for bucket in buckets:
            self._collect(bucket)
            self._orthogonalize(bucket)
            self._apply(bucket)

    def _collect(self, bucket: _Bucket) -> None:
        gradients = bucket.views(self._gradients)
        state = {name: bucket.views(buffers) for name, buffers in self._state.items()}
        directions = self._rule.direction(gradients, state, self._group) if gradients else []
        bucket.exchange.collect(bucket.fragments(directions), _nonzero(bucket.fragments(gradients)))

    def _orthogonalize(self, bucket: _Bucket) -> None:
        batches = bucket.exchange.matrices()
        bucket.exchange.give_back([(self._rule.update(matrices, active), active) for matrices, active in batches])

    def _apply(self, bucket: _Bucket) -> None:
        updates, active = bucket.exchange.updates()
        if updates:
            parameters = bucket.fragments(bucket.views(self._parameters))
            self._rule.apply(parameters, updates, active, self._group)
        bucket.exchange.release()


def _as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Parameters, or groups of them, as groups."""
    items = list(params)
    if items and all(isinstance(item, Mapping) for item in items):
        return [
            {**item, "params": [item["params"]] if isinstance(item["params"], Tensor) else list(item["params"])}
            for item in items
        ]
    return [{"params": items}]


def _flat_gradient(piece: Tensor) -> Tensor:
    if piece.grad is None:
        return torch.zeros_like(piece).view(-1)
    return piece.grad.reshape(-1).to(piece.dtype)


def _nonzero(fragments: Sequence[Tensor]) -> Tensor:
    """(fragments,) 1 where any element is not zero (NaN is not), else 0."""
    if not fragments:
        return torch.empty(0)
    return (torch.stack(torch._foreach_norm(list(fragments), float("inf"))) != 0).float()


def _runs(bucket: RankBucket, starts: Sequence[int]) -> tuple[_Run, ...]:
    """Merge fragments that lie side by side in one slice."""
    runs: list[tuple[int, int, list[int]]] = []
    end = -1
    for fragment in bucket.fragments:
        piece = bisect_right(starts, fragment.offset) - 1
        if runs and runs[-1][0] == piece and end == fragment.offset:
            runs[-1][2].append(fragment.numel)
        else:
            runs.append((piece, fragment.offset - starts[piece], [fragment.numel]))
        end = fragment.offset + fragment.numel
    return tuple(_Run(piece, start, sizes) for piece, start, sizes in runs)
