"""OptForge: a torch optimizer whose matrix rules see whole matrices, wherever ZeRO put their pieces.

It owns groups and state and walks the way of a step; the math is in ``rules/``, the layout, plan and collectives in
``zero/``.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ds_optforge.config import OptimizerConfig
from ds_optforge.roles import Route, log_routing, route, routing_table
from ds_optforge.rules.base import ElementwiseRule, Hyperparameters, MatrixRule, Tensors, row_buffer_of
from ds_optforge.rules.schedule_free_adamw import ScheduleFreeAdamW
from ds_optforge.settings import RuleSettings
from ds_optforge.slices import Bucket, Members, Run, Slices, bind_slices, buffer_dtype
from ds_optforge.telemetry import Monitor, Telemetry, Watch
from ds_optforge.validation import ConfigError
from ds_optforge.zero.layout import expert_group_name, full_shape

logger = logging.getLogger("ds_optforge")

GROUP = "optforge_group"  # the key of a parameter group that says which of our groups it is
KEYS_OF_FRAMEWORKS = ("params", "moe", "name")
_FALLING_RATE = (
    "schedule_free_adamw: the learning rate is below an earlier one, but averaging replaces a falling schedule; allowed: a "
    'constant one, as of {"type": "OptForgeSchedule", "params": {"name": "none"}} (without a "scheduler" section the HF '
    "Trainer adds a falling one)"
)


class OptForge(torch.optim.Optimizer):
    """Every rule of ds_optforge, in any mix by role, on plain PyTorch and on every stage of DeepSpeed's ZeRO.

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
        asked = self._config.common.telemetry
        self._routing = f"{routing_table(item[1] for item in routed)}\n{asked!r}"  # what ranks must agree on
        self._members: dict[str, Members] = {}
        self._bound: dict[Tensor, Slices] = {}
        self._rates_seen: dict[str, tuple[int, float, float]] = {}  # by group: step, configured lr, lr found
        self._told: set[str] = set()
        self._training_weights: list[tuple[Tensor, Tensor]] | None = None  # inside eval()
        super().__init__(self._build_groups(routed), defaults={"lr": self._config.main.lr})  # Accelerate reads it
        self._telemetry = Telemetry(asked.every, self._members) if asked else None

    def _routed(self, index: int, group: dict[str, Any]) -> list[tuple[Tensor, Route, str, dict[str, Any]]]:
        """(parameter, route, our group's identifier, what frameworks keep in the group) for one given group."""
        own = {key: value for key, value in group.items() if key not in KEYS_OF_FRAMEWORKS}
        kept: dict[str, Any] = {key: group[key] for key in ("moe", "name") if key in group}
        prefix = f"group{index}." if own else ""
        routed = []
        for position, parameter in enumerate(group["params"]):
            if not (parameter.requires_grad and parameter.is_floating_point() and full_shape(parameter).numel()):
                continue
            decided = route(parameter, self._config, own, f"param_groups[{index}].params[{position}]")
            experts = expert_group_name(parameter)
            keys = {**kept, "moe": True, "name": experts} if experts else kept
            routed.append((parameter, decided, prefix + decided.group + (f".{experts}" if experts else ""), keys))
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
            self._members[identifier] = Members(parameters, routes, settings, settings.build())
            groups.append({"params": list(parameters), GROUP: identifier, **kept[identifier], **settings.scheduled()})
        return groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's constructor adds the groups that were made from the configuration; others cannot follow."""
        if GROUP not in param_group:
            raise ConfigError("add_param_group: got a group of its own; allowed: all parameters when OptForge is built")
        super().add_param_group(param_group)

    def settings_of(self, group: Mapping[str, Any]) -> RuleSettings:
        """The configuration of one of ``param_groups``."""
        return self._members[group[GROUP]].settings

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters of all groups (DeepSpeed narrows them to one), given their ``.grad``.

        A missing gradient counts as zeros; a matrix whose whole gradient is zero is neither updated nor decayed.

        Raises:
            LayoutError: see the class.
            ConfigError: a scheduler that broke what the configuration asks for.
            RuntimeError: a gradient that is not finite (where DeepSpeed does not skip such a step), before any change;
                or a step on averaged weights.
        """
        self.refuse_while_averaged("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        steps = [_GroupStep(self, group) for group in self.param_groups if group["params"]]
        for step in steps:
            step.check()
        for step in steps:
            step.run()
        return loss

    def members_of(self, group: Mapping[str, Any]) -> Members:
        """What one of ``param_groups`` stands for."""
        return self._members[group[GROUP]]

    def slices_of(self, group: Mapping[str, Any]) -> Slices:
        """The group's tensors, bound to their places; all ranks of the group must ask together the first time."""
        tensors = group["params"]
        bound = self._bound.get(tensors[0])
        if bound is None or len(bound.tensors) != len(tensors):
            members = self._members[group[GROUP]]
            bound = bind_slices(members, tensors, self._config.common.sharding, self._routing)
            self._bound[tensors[0]] = bound
        return bound

    def check_schedule(self, group: Mapping[str, Any]) -> None:
        """Raise ConfigError, or warn of what merely trains worse.

        DeepSpeed's own schedulers write one learning rate into all groups; its groups come here one at a time.
        """
        settings = self.settings_of(group)
        if settings.needs_schedule and "initial_weight_decay" not in group:
            raise ConfigError(
                f"weight_decay_schedule: got '{settings.needs_schedule}' without its scheduler; allowed: 'constant', or "
                '{"type": "OptForgeSchedule"} (build_scheduler) with total_num_steps'
            )
        state = self.state[group["params"][0]]
        if group["lr"] < state.get("lr_max", 0.0):
            self._warn_once(_FALLING_RATE)
        if "initial_lr" in group or group["lr"] == 0:  # a torch scheduler keeps the ratios; zero tells nothing yet
            return
        step = int(state.get("step", 0))
        self._rates_seen[group[GROUP]] = (step, settings.lr, group["lr"])
        for other, (its_step, configured, rate) in self._rates_seen.items():
            if its_step == step and configured != settings.lr and rate == group["lr"]:
                raise ConfigError(
                    f"scheduler: the groups '{other}' and '{group[GROUP]}' are configured with lr {configured:g} and "
                    f"{settings.lr:g}, but something set both to {rate:g}; allowed: a scheduler that keeps the ratio, "
                    'such as {"type": "OptForgeSchedule"}'
                )

    @property
    def telemetry(self) -> dict[str, Any]:
        """What ``"telemetry": {"every": k}`` last recorded: {"step": n, "groups": {group: {name: value}}}; empty before."""
        return self._telemetry.last if self._telemetry else {}

    def send_telemetry(self, monitor: Monitor) -> None:
        """Write every record to DeepSpeed's ``engine.monitor`` too. (``ds_optforge.initialize`` calls this.)"""
        if self._telemetry:
            self._telemetry.send_to(monitor)

    @property
    def averages_weights(self) -> bool:
        """Whether any group is trained by Schedule-Free, so that there are averaged weights to evaluate."""
        return any(isinstance(members.rule, ScheduleFreeAdamW) for members in self._members.values())

    def _averages(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(tensor, its averaged values as a new tensor) for each stepped tensor of a Schedule-Free group."""
        for piece, state in self.state.items():
            if "z" in state:
                yield piece, ScheduleFreeAdamW.averaged(piece.detach(), state["z"], state["beta1"])

    def eval(self) -> None:
        """Put the averaged weights into the parameters until `train`. (With an engine: ``evaluation_weights(engine)``.)

        Frameworks call this on an engine's optimizer too, where it would reach the slices and not the model: there it does
        nothing but say so.
        """
        if self._steps_parameters():
            if self._training_weights is None:
                self.enter_averages()
        elif self.averages_weights and self._training_weights is None:
            self._warn_once("optimizer.eval() does not reach an engine's weights: evaluate inside evaluation_weights(engine)")

    def _warn_once(self, message: str) -> None:
        if message not in self._told:
            logger.warning(message)
            self._told.add(message)

    def train(self) -> None:
        """Take the averaged weights out again, bit-exactly."""
        self.leave_averages()

    @torch.no_grad()
    def enter_averages(self) -> None:
        """Point the stepped tensors at their averages. Raises RuntimeError when they are there already."""
        self.refuse_while_averaged("averaging")
        self._training_weights = []
        for piece, average in self._averages():
            self._training_weights.append((piece, piece.data))
            piece.data = average

    @torch.no_grad()
    def leave_averages(self) -> None:
        """Point them back."""
        for piece, weights in self._training_weights or []:
            piece.data = weights
        self._training_weights = None

    def _steps_parameters(self) -> bool:
        """Whether the groups hold the model's own parameters, not slices or clones of them."""
        own = {id(parameter) for members in self._members.values() for parameter in members.parameters}
        pieces = [piece for group in self.param_groups for piece in group["params"]]
        return bool(pieces) and all(id(piece) in own for piece in pieces)

    def refuse_while_averaged(self, what: str) -> None:
        """Raise RuntimeError between `enter_averages` and `leave_averages`."""
        if self._training_weights is not None:
            raise RuntimeError(f"{what} on averaged weights; leave evaluation_weights() or call optimizer.train() first")

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and under "optforge" where every parameter lies in the stepped tensors, for ``ds-optforge convert``.

        Raises RuntimeError while the averaged weights are in the model.
        """
        self.refuse_while_averaged("state_dict()")
        stepped = [piece for group in self.param_groups for piece in group["params"]]
        index = {id(piece): number for number, piece in enumerate(stepped)}
        described = [
            {"tensors": [index[id(piece)] for piece in slices.tensors], **self._described(slices)}
            for slices in self._bound.values()
            if all(id(piece) in index for piece in slices.tensors)
        ]
        return {**super().state_dict(), "optforge": described}

    def _described(self, slices: Slices) -> dict[str, Any]:
        """What the slices hold, as plain data."""
        first = slices.placement.layout.names[0]
        identifier, members = next(
            item for item in self._members.items() if any(route.name == first for route in item[1].routes)
        )
        shapes = {route.name: list(route.shape) for route in members.routes}
        return {
            "group": identifier,
            "rule": members.settings.rule,
            "buffers": [buffer.name for buffer in members.rule.buffers],
            "row_buffer": row_buffer_of(members.rule),
            "shapes": [shapes[name] for name in slices.placement.layout.names],
            "placement": slices.placement.to_plain(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned for the same groups. Raises ConfigError, before any change, for others."""
        self.refuse_while_averaged("load_state_dict()")
        found = [group.get(GROUP) for group in state_dict["param_groups"]]
        expected = [group[GROUP] for group in self.param_groups]
        if found != expected:
            raise ConfigError(f"the checkpoint holds the parameter groups {found}; allowed: this run's, {expected}")
        self._refuse_other_formats(state_dict)
        decays = [group.get("initial_weight_decay") for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, initial in zip(self.param_groups, decays, strict=True):
            if initial is not None:  # this run has a decay schedule, also where the saved one had none
                group.setdefault("initial_weight_decay", initial)
        self._restore_dtypes(state_dict)

    def _loaded(self, state_dict: Mapping[str, Any]) -> Iterator[tuple[Members, Tensor, Mapping[str, Any]]]:
        """(members, tensor, its saved state) of each tensor that has any."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for piece, index in zip(group["params"], saved["params"], strict=False):
                if state_dict["state"].get(index):
                    yield self._members[group[GROUP]], piece, state_dict["state"][index]

    def _refuse_other_formats(self, state_dict: Mapping[str, Any]) -> None:
        for members, piece, state in self._loaded(state_dict):
            for buffer in members.rule.buffers:
                saved = state.get(buffer.name)
                expected = buffer_dtype(members.settings.state_dtype, buffer, piece)
                if saved is None or saved.dtype != expected or saved.numel() != piece.numel():
                    found = "nothing" if saved is None else f"{saved.numel()} elements of {saved.dtype}"
                    raise ConfigError(
                        f"state_dtype: the checkpoint holds {found} for '{buffer.name}' of the group of "
                        f"{members.routes[0].name}; allowed: {piece.numel()} of {expected}, as this run is configured and cut"
                    )

    def _restore_dtypes(self, state_dict: Mapping[str, Any]) -> None:
        """torch casts state to the parameter's dtype; take the saved values where that changed anything."""
        for _, piece, saved in self._loaded(state_dict):
            state = self.state[piece]
            for key, value in saved.items():
                if isinstance(value, Tensor):
                    device = torch.device("cpu") if key == "step" else piece.device
                    source = state[key] if state[key].dtype == value.dtype else value
                    state[key] = source.to(device)


class _GroupStep:
    """One group's step: elementwise in chunks, or matrices in buckets to their owners, orthogonalized, and back."""

    def __init__(self, optimizer: OptForge, group: Mapping[str, Any]) -> None:
        optimizer.check_schedule(group)
        self._group = group
        self._telemetry = optimizer._telemetry
        self._watch: Watch | None = None
        self._members = optimizer._members[group[GROUP]]
        self._slices = optimizer.slices_of(group)
        self._states: list[MutableMapping[str, Any]] = [optimizer.state[piece] for piece in self._slices.tensors]
        self._slices.binding.discard_left_overs(self._slices.tensors)
        self._gradients = [_flat_gradient(piece) for piece in self._slices.tensors]

    def check(self) -> None:
        """Refuse gradients that are not finite, where no DeepSpeed wrapper has skipped the step."""
        if self._slices.binding.process_group is not None:
            return
        norms = torch.stack(torch._foreach_norm(self._gradients))
        suspects = norms.isfinite().logical_not().nonzero().flatten().tolist()  # or the square of a value overflows
        index = next((index for index in suspects if not self._gradients[index].isfinite().all()), None)
        if index is not None:
            route = self._members.routes[self._slices.binding.indices[index]]
            raise RuntimeError(f"{route.name}: its gradient is not finite; nothing was changed")

    def run(self) -> None:
        fresh = not self._states[0]
        self._slices.allocate(self._members.rule, self._states)
        if fresh and self._is_rehearsal():
            return
        now = self._begin()
        if self._telemetry:
            self._watch = self._telemetry.watch(self._group[GROUP], self._slices, self._states)
        self._parameters = [piece.detach().view(-1) for piece in self._slices.tensors]
        rule = self._members.rule
        if isinstance(rule, ElementwiseRule):
            for runs in self._watch.chunks if self._watch else self._slices.chunks:
                self._step_chunk(rule, now, runs)
        elif isinstance(rule, MatrixRule):
            self._run_matrices(rule, now)
        if self._telemetry and self._watch:
            self._telemetry.add(self._group[GROUP], self._watch, now, int(self._states[0]["step"]))
        self._slices.binding.clear_spent_gradients(self._slices.tensors)

    def _is_rehearsal(self) -> bool:
        """DeepSpeed's stage 0 in fp16 and bf16 steps its clones once with zero gradients, only to allocate state."""
        clones = self._slices.tensors[0] is not self._members.parameters[0] and self._slices.binding.process_group is None
        return clones and not any(gradient.any() for gradient in self._gradients)

    def _begin(self) -> Hyperparameters:
        """Count the step, the same for all of the group's tensors."""
        for state in self._states:
            state["step"] += 1
        step = int(self._states[0]["step"])
        first = self._states[0]
        scalars = {key: value for key, value in first.items() if isinstance(value, float)}
        now = self._members.rule.begin(self._group, scalars, step)
        for state in self._states:
            state.update(scalars)
        return now

    def _step_chunk(self, rule: ElementwiseRule, now: Hyperparameters, runs: Sequence[Run]) -> None:
        parameters, gradients = ([run.of(pieces) for run in runs] for pieces in (self._parameters, self._gradients))
        with self._slices.opened(rule, self._states, runs) as state:
            with self._changes(runs, parameters):
                rule.step(parameters, gradients, state, now)
            if self._watch:
                self._watch.momentum(runs, gradients, state)

    def _changes(self, runs: Sequence[Run], parameters: Tensors) -> AbstractContextManager[None]:
        return self._watch.changes(runs, parameters) if self._watch else nullcontext()

    def _run_matrices(self, rule: MatrixRule, now: Hyperparameters) -> None:
        slices = self._slices
        if slices.sharding.gathers(int(self._states[0]["step"])):
            self._run_exchanges(rule, now)
        else:
            self._step_alone(rule, now, (*slices.local, *slices.shards))

    def _run_exchanges(self, rule: MatrixRule, now: Hyperparameters) -> None:
        """Keep one exchange returning and one travelling out while another is orthogonalized; local matrices fill the gaps.

        The order of the collectives is the same on every rank: collect(k + 1) is issued before give_back(k).
        """
        travelling, local = self._slices.travelling, self._slices.local
        last = len(travelling) - 1
        shares = [local[k :: last + 2] for k in range(last + 2)]
        if travelling:
            self._collect(rule, now, travelling[0])
        for k, bucket in enumerate(travelling):
            bucket.exchange.arrive()
            if k < last:
                self._collect(rule, now, travelling[k + 1])
            self._step_alone(rule, now, shares[k])
            self._update(rule, bucket)
            if k > 0:
                self._apply(rule, now, travelling[k - 1])
            bucket.exchange.give_back()
        self._step_alone(rule, now, shares[-1])
        if travelling:
            self._apply(rule, now, travelling[-1])

    def _step_alone(self, rule: MatrixRule, now: Hyperparameters, buckets: Sequence[Bucket]) -> None:
        """Step buckets that do not travel."""
        for bucket in buckets:
            self._collect(rule, now, bucket)
            self._update(rule, bucket)
            self._apply(rule, now, bucket)

    def _collect(self, rule: MatrixRule, now: Hyperparameters, bucket: Bucket) -> None:
        bucket.exchange.open()
        for part in bucket.parts:
            gradients = part.views(self._gradients)
            with self._slices.opened(rule, self._states, part.runs) as state:
                directions = rule.direction(gradients, state, now)
                torch._foreach_copy_(part.places(bucket.exchange.outgoing), part.split(directions))
                if self._watch:
                    self._watch.momentum(part.runs, gradients, state)
        active = _nonzero([self._gradients[piece].narrow(0, start, numel) for piece, start, numel in bucket.fragments])
        bucket.exchange.collect(active, self._rows(rule, bucket))

    def _update(self, rule: MatrixRule, bucket: Bucket) -> None:
        for index in bucket.exchange.batches:
            batch = bucket.exchange.matrices(index)
            watch = self._watch.orthogonality(bucket.exchange, index, batch.active) if self._watch else None
            updates = rule.update(batch.matrices, batch.active, batch.rows, batch.transposed, watch)
            bucket.exchange.put(index, updates, batch)

    def _apply(self, rule: MatrixRule, now: Hyperparameters, bucket: Bucket) -> None:
        updates, active = bucket.exchange.updates()
        if bucket.norms is not None:
            scale_to(updates, bucket.norms)
        bucket.exchange.returned_rows(self._rows(rule, bucket))
        for part in bucket.parts:
            views = part.views(self._parameters)
            parameters = part.split(views)
            device = parameters[0].device  # with offload not where the buckets are
            updates = [update.to(device) for update in part.places(bucket.exchange.outgoing)]
            with self._changes(part.runs, views):
                rule.apply(parameters, updates, active[part.fragments].to(device), now)
        bucket.exchange.release()

    def _rows(self, rule: MatrixRule, bucket: Bucket) -> list[Tensor]:
        """The row statistics of the bucket's fragments, as views."""
        return [self._states[piece][rule.row_buffer].narrow(0, start, count) for piece, start, count in bucket.rows]


def _as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Parameters, or groups of them, as groups."""
    items = list(params)
    if items and all(isinstance(item, Mapping) for item in items):
        return [
            {**item, "params": [item["params"]] if isinstance(item["params"], Tensor) else list(item["params"])}
            for item in items
        ]
    if items and all(isinstance(item, tuple) for item in items):  # model.named_parameters()
        items = [parameter for _, parameter in items]
    return [{"params": items}]


def _flat_gradient(piece: Tensor) -> Tensor:
    if piece.grad is None:
        return torch.zeros_like(piece).view(-1)
    gradient = piece.grad.to_dense() if piece.grad.is_sparse else piece.grad
    return gradient.reshape(-1).to(piece.dtype)


def _nonzero(fragments: Sequence[Tensor]) -> Tensor:
    """(fragments,) 1 where the norm in float32 is not zero (NaN is not), else 0."""
    if not fragments:
        return torch.empty(0)
    return (torch.stack(torch._foreach_norm(list(fragments))) != 0).float()


def scale_to(updates: Sequence[Tensor], norms: Tensor) -> None:
    """Give each update its element of ``norms``; zeros stay zeros."""
    found = torch.stack(torch._foreach_norm(list(updates), dtype=torch.float32))
    factors = torch.where(found > 0, norms / found, torch.zeros_like(found))
    torch._foreach_mul_(list(updates), list(factors.view(-1, 1).unbind()))
