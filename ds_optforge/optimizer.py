"""OptForge: a torch optimizer whose matrix rules see whole matrices, wherever ZeRO put their fragments.

This file keeps groups, state dicts and averaged weights; `ds_optforge.step` runs a step.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.errors import ConfigError
from ds_optforge.rules.around import evaluated
from ds_optforge.rules.base import factors_of, statistics_of
from ds_optforge.step.finite import refuse_nonfinite
from ds_optforge.step.group_step import GroupStep
from ds_optforge.step.groups import GROUP, Groups
from ds_optforge.step.qk_clip import QKClip
from ds_optforge.step.saved_state import refuse_missing_rules, refuse_other_surroundings, settings_of
from ds_optforge.step.schedule_check import ScheduleCheck
from ds_optforge.step.slices import Members, Slices, buffer_dtype
from ds_optforge.step.step_counts import StepCounts
from ds_optforge.step.telemetry import Monitor, Telemetry

logger = logging.getLogger("ds_optforge")


# Attributes beside torch's that a copy has.
_COPIED = (
    "_groups",
    "_schedule_check",
    "_warned",
    "_allocated",
    "_training_weights",
    "_telemetry",
    "_step_counts",
    "_qk_clip",
)

# What to do with a checkpoint of another optimizer; the end of messages.
OTHER_OPTIMIZERS_CHECKPOINT = (
    "Two ways out: 'ds-optforge convert FOLDER --out OUT', then ds_optforge.load_checkpoint(engine, OUT), which keeps the "
    "moments and the position; or engine.load_checkpoint(FOLDER, load_optimizer_states=False, load_lr_scheduler_states=False), "
    "which takes the weights alone"
)


class OptForge(torch.optim.Optimizer):
    """Optimizer with every rule of ds_optforge, in any mix by role, in plain PyTorch and on every stage of DeepSpeed's ZeRO.

    The layout of ZeRO is read in the first ``step()``, which raises LayoutError if it cannot be read or ranks disagree.

    Args:
        params: the model's parameters after ``ds_optforge.register(model)``, or groups of them. A group's other keys are
            settings for its parameters; KellerJordan's ``use_muon`` flag is one of them.
        config: the "params" of the optimizer section (see `ds_optforge.config`): ``name``, ``lr``, ...

    Raises:
        ConfigError: a bad configuration, or parameters that were not registered.
    """

    _refresh: Callable[[], None] | None = None  # of an engine's weights, see `reach_model`; copies have no engine

    def __init__(self, params: Iterable[Any], **config: Any) -> None:
        checked = OptimizerConfig(config)
        self._groups = Groups(params, checked)
        self._schedule_check = ScheduleCheck(self._groups)
        self._warned: set[str] = set()
        self._step_counts = StepCounts()
        self._allocated = False  # the state of groups that are stepped in later calls
        self._training_weights: list[tuple[Tensor, Tensor]] | None = None  # while averaged weights are in their place
        super().__init__(self._groups.dicts, defaults={"lr": checked.main.lr})
        # Accelerate reads the defaults, and torch's cyclic schedulers look for a momentum. Given to torch's constructor they
        # would enter the groups of rules that do not read them.
        self.defaults.update(checked.main.scheduled())
        self._schedule_check.remember(self.param_groups)
        asked = checked.common.telemetry
        self._telemetry = Telemetry(asked.every, self._groups.members, self._groups.stage) if asked else None
        bounds = checked.common.qk_clip
        self._qk_clip = QKClip(bounds, self._groups, self._any_steps_taken) if bounds else None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add one of the groups that were made from the configuration; torch's constructor calls it.

        Raises:
            ConfigError: any other group; all parameters must be given when the optimizer is built.
        """
        if GROUP not in param_group:
            raise ConfigError("add_param_group: got a group of its own; allowed: all parameters when OptForge is built")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters of all groups (DeepSpeed narrows them to one), given their ``.grad``. Collective.

        A parameter without a gradient is skipped, as torch.optim does; under ZeRO, where it cannot be told, a missing gradient
        counts as zeros. A matrix whose whole gradient is zero is neither updated nor decayed.

        Args:
            closure: computes the loss and the gradients; None if the gradients are there already.

        Returns:
            The closure's loss; None without a closure.

        Raises:
            LayoutError: ZeRO's layout cannot be read, or ranks disagree about it or about the configuration.
            ConfigError: a schedule that contradicts the configuration, before any change (see `ScheduleCheck.check`).
            RuntimeError: a gradient that is not finite (except under ZeRO, where DeepSpeed decides whether to skip the
                step), before any change; or a step on averaged weights.
        """
        self._refuse_while_averaged("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        shown = [group for group in self.param_groups if group["params"]]
        held = self._held(shown)
        self._step_counts.bring_back(self._states(held))
        self._groups.refuse_unfrozen(shown)
        self._check_schedule(shown, held)
        self._allocate_others(held)
        steps = [step for group in held for step in self._group_steps(group)]
        refuse_nonfinite([gradients for step in steps if (gradients := step.checked)])
        if self._telemetry:
            self._telemetry.report()
            self._telemetry.skip([(step.name, step.size) for step in steps if step.is_idle])
        for step in steps:
            if not step.is_idle:
                step.update_group()
        self._step_counts.remember(self._states(held))
        taken = max((step.steps_taken for step in steps if not step.is_idle), default=0)
        if self._qk_clip and taken:  # else nothing was stepped, or DeepSpeed has only had state allocated
            self._qk_clip.clip([step.slices for step in steps], taken)
        return loss

    def _held(self, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Leave out the groups of which other stages of a pipeline have all parameters."""
        return [group for group in groups if self._groups[group].parameters]

    def _states(self, groups: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield (tensor, its state) of each stepped tensor of ``groups`` that has any."""
        return ((tensor, self.state[tensor]) for group in groups for tensor in group["params"] if tensor in self.state)

    def _allocate_others(self, stepped: Sequence[dict[str, Any]]) -> None:
        """Allocate the state of the groups that ZeRO-1/2 steps later, in the first call. Collective.

        DeepSpeed links all state to the parameters after the first group's first step, for `safe_get_full_optimizer_state`.
        """
        if self._allocated:
            return
        self._allocated = True
        held = [group for group in self._held(self._schedule_check.remembered) if group["params"]]
        if len(held) > len(stepped):
            for group in held:  # in the order of the groups, which is that of the state
                slices = self._groups.slices_of(group)
                slices.allocate(self._groups[group], [self.state[tensor] for tensor in slices.tensors])

    def _group_steps(self, group: dict[str, Any]) -> Iterator[GroupStep]:
        for members, tensors in self._groups.on_devices(group):
            slices = self._groups.slices_of(group, tensors, members)
            yield GroupStep(group, group[GROUP], members, slices, self.state, self._telemetry)

    def _check_schedule(self, shown: Sequence[dict[str, Any]], held: Sequence[Mapping[str, Any]]) -> None:
        """Check on all stages of a pipeline alike, also in a call that shows a group of which this stage has nothing."""
        if shown:
            self._schedule_check.remember(shown)
            self._schedule_check.check(shown, self._steps_taken(held))

    def _steps_taken(self, held: Sequence[Mapping[str, Any]]) -> int:
        """Return the steps of the first group with any; for no group, those that all groups of this stage have taken."""
        if held:
            states = (self.state.get(tensor, {}) for group in held for tensor in group["params"])
            return next((int(state["step"]) for state in states if "step" in state), 0)
        steps = [int(state["step"]) for state in self.state.values() if "step" in state]
        missing = len(steps) < sum(bool(members.parameters) for members in self._groups.members.values())
        return 0 if missing else min(steps)

    def _any_steps_taken(self) -> int:
        return max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            logger.warning(message)
            self._warned.add(message)

    @property
    def telemetry(self) -> dict[str, Any]:
        """The last record of ``"telemetry": {"every": k}``: {"step": n, "groups": {group: {name: value}}}; empty before."""
        return self._telemetry.last if self._telemetry else {}

    @property
    def attention_logits(self) -> dict[str, Any]:
        """What ``"qk_clip"`` saw before the last clip: {"step": n, "max": {module: [of each key head]}}; empty before."""
        return self._qk_clip.logits if self._qk_clip else {}

    @property
    def averages_weights(self) -> bool:
        """Whether weights are averaged, by any group's rule or around it, so that there are averaged weights to evaluate."""
        return any(members.averages for members in self._groups.members.values())

    def eval(self) -> None:
        """Put the averaged weights into the parameters until `train`. With an engine use ``evaluation_weights(engine)``.

        Frameworks call this on an engine's optimizer too, where it would change the slices and not the model: it then only
        logs a warning, but for the HF Trainer with an `OptForgeCallback`, where it reaches the model. Collective there.
        """
        if self._training_weights is not None or not self.averages_weights:
            return
        plain = self._groups.hold([tensor for group in self._held(self.param_groups) for tensor in group["params"]])
        if plain or self._refresh:
            enter_averages(self)
            if self._refresh:
                self._refresh()
        else:
            self._warn_once("optimizer.eval() does not reach an engine's weights: evaluate inside evaluation_weights(engine)")

    def train(self) -> None:
        """Put the trained weights back in place of the averaged ones, bit-exactly. Collective where `eval` is."""
        averaged = self._training_weights is not None
        leave_averages(self)
        if averaged and self._refresh:
            self._refresh()

    def _averages(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (tensor, its averaged values as a new tensor) for each stepped tensor whose weights are averaged."""
        for tensor, state in self.state.items():
            if state and (names := (members := self._groups.members_of(tensor)).averages):
                scalars = {key: value for key, value in state.items() if isinstance(value, float)}
                yield tensor, evaluated(members.rule, tensor.detach(), {name: state[name] for name in names}, scalars)

    def _refuse_while_averaged(self, what: str) -> None:
        if self._training_weights is not None:
            raise RuntimeError(f"{what} on averaged weights; leave evaluation_weights() or call optimizer.train() first")

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict plus, under "optforge", the place of every parameter in the stepped tensors.

        Raises:
            RuntimeError: averaged weights are in the model.
        """
        self._refuse_while_averaged("state_dict()")

        # Between torch's hooks before and the user's hooks after.
        def describe(optimizer: torch.optim.Optimizer, found: dict[str, Any]) -> None:
            found["optforge"] = self._places()

        with self.register_state_dict_post_hook(describe, prepend=True):
            return super().state_dict()

    def _places(self) -> list[dict[str, Any]]:
        """Describe the places of all parameters in the tensors that are in the groups now."""
        stepped = [tensor for group in self.param_groups for tensor in group["params"]]
        index = {id(tensor): number for number, tensor in enumerate(stepped)}
        return [
            {"tensors": [index[id(tensor)] for tensor in slices.tensors], **self._described(slices)}
            for slices in self._groups.bound
            if all(id(tensor) in index for tensor in slices.tensors)
        ]

    def _described(self, slices: Slices) -> dict[str, Any]:
        """Describe the contents of ``slices`` as plain data, which `ds-optforge convert` reads."""
        names = slices.placement.layout.names
        identifier, members = self._groups.members_with(names[0])
        shapes = {route.name: list(route.shape) for route in members.routes}
        factors = [[factor.name, factor.of] for factor in factors_of(members.rule)]
        return {
            "group": identifier,
            "rule": members.settings.rule,
            "buffers": [buffer.name for buffer in members.buffers],
            "statistics": [[statistic.name, statistic.per] for statistic in statistics_of(members.rule)],
            **({"factors": factors} if factors else {}),
            "shapes": [shapes[name] for name in names],
            "placement": slices.placement.to_plain(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned for the same groups.

        Args:
            state_dict: of an optimizer with the same groups, state formats and places of parameters.

        Raises:
            ConfigError: other groups or state formats, or a rule that nothing here offers; before any change.
            RuntimeError: averaged weights are in the model.
        """
        self._refuse_while_averaged("load_state_dict()")
        decays = [group.get("initial_weight_decay") for group in self.param_groups]
        given: list[dict[str, Any]] = []  # what the user's hooks have made of it

        def check(optimizer: torch.optim.Optimizer, found: dict[str, Any]) -> None:
            self._refuse_other_state(found)
            given.append(found)

        def finish(optimizer: torch.optim.Optimizer) -> None:
            for group, initial in zip(self.param_groups, decays, strict=True):
                self._groups.remember(group, group["params"])
                if initial is not None:  # this run has a decay schedule, even if the saved one had none
                    group.setdefault("initial_weight_decay", initial)
            self._schedule_check.remember(self.param_groups)
            self._restore_dtypes(given[0])
            self._groups.expect_owners(given[0].get("optforge", ()))
            remember_steps(self)

        # After the user's hooks before, and before the user's hooks after.
        with self.register_load_state_dict_pre_hook(check), self.register_load_state_dict_post_hook(finish, prepend=True):
            super().load_state_dict(state_dict)

    def _refuse_other_state(self, state_dict: dict[str, Any]) -> None:
        refuse_missing_rules(state_dict)
        self._refuse_other_routes(state_dict)
        found = [group.get(GROUP) for group in state_dict["param_groups"]]
        expected = [group[GROUP] for group in self.param_groups]
        if found != expected and not any(found):
            raise ConfigError(
                f"the checkpoint holds {len(found)} parameter groups of another optimizer, with the settings "
                f"{settings_of(state_dict)}; allowed: OptForge's, {expected}. {OTHER_OPTIMIZERS_CHECKPOINT}"
            )
        if found != expected:
            raise ConfigError(f"the checkpoint holds the parameter groups {found}; allowed: this run's, {expected}")
        self._refuse_other_formats(state_dict)

    def _refuse_other_routes(self, state_dict: Mapping[str, Any]) -> None:
        """Raise ConfigError for a parameter that the checkpoint has in another group: its default rule has changed, say."""
        own = {route.name: identifier for identifier, members in self._groups.members.items() for route in members.routes}
        moved = [
            (name, described["group"], own[name])
            for described in state_dict.get("optforge", ())
            for name in described["placement"]["names"]
            if own.get(name, described["group"]) != described["group"]
        ]
        if moved:
            name, before, now = moved[0]
            raise ConfigError(
                f"{name}: is in the parameter group '{before}' of the checkpoint and in '{now}' of this run, and so are "
                f"{len(moved)} parameters in other groups; allowed: the same groups (a run before version 0.2 had "
                '"max_aspect_ratio": 10), or ds-optforge convert and ds_optforge.load_checkpoint(..., strict=False), which '
                "keeps the weights and starts their state afresh"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds: torch's three entries, and the groups.

        Raises:
            TypeError: under ZeRO, whose slices belong to this process.
            RuntimeError: averaged weights are in the model.
        """
        self._refuse_while_averaged("a copy")
        if self._qk_clip:
            raise TypeError(
                'an OptForge with "qk_clip" cannot be copied or pickled, since it watches this model; allowed: a new one, and '
                "load_state_dict"
            )
        if any(slices.binding.process_group is not None for slices in self._groups.bound):
            raise TypeError(
                "an OptForge whose slices are ZeRO's cannot be copied or pickled, since they belong to this process; allowed: "
                "ds_optforge.save_checkpoint(engine, ...) and load_checkpoint"
            )
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in _COPIED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` returned; or state and groups alone, which torch gives after a load."""
        super().__setstate__(state)
        if "_groups" in state:
            for group in self.param_groups:
                for members, tensors in self._groups.on_devices(group):
                    if any(tensor in self.state for tensor in tensors):
                        self._groups.slices_of(group, tensors, members)

    def _loaded(self, state_dict: Mapping[str, Any]) -> Iterator[tuple[Members, Tensor, Mapping[str, Any]]]:
        """Yield (members, tensor, its saved state) for each tensor that has any."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for tensor, index in zip(group["params"], saved["params"], strict=False):
                if state_dict["state"].get(index):
                    yield self._groups[group], tensor, state_dict["state"][index]

    def _refuse_other_formats(self, state_dict: Mapping[str, Any]) -> None:
        for members, tensor, state in self._loaded(state_dict):
            refuse_other_surroundings(members, state)
            for buffer in members.buffers:
                saved = state.get(buffer.name)
                expected = buffer_dtype(members.settings.state_dtype, buffer, tensor)
                if saved is None or saved.dtype != expected or saved.numel() != tensor.numel():
                    found = "nothing" if saved is None else f"{saved.numel()} elements of {saved.dtype}"
                    raise ConfigError(
                        f"state_dtype: the checkpoint holds {found} for '{buffer.name}' of the group of "
                        f"{members.routes[0].name}; allowed: {tensor.numel()} of {expected}, as this run is configured and cut"
                    )

    def _restore_dtypes(self, state_dict: Mapping[str, Any]) -> None:
        """Undo torch's casts of state to the parameter's dtype, by taking the saved values."""
        for _, tensor, saved in self._loaded(state_dict):
            state = self.state[tensor]
            for key, value in saved.items():
                if isinstance(value, Tensor):
                    device = torch.device("cpu") if key == "step" else tensor.device
                    source = state[key] if state[key].dtype == value.dtype else value
                    state[key] = source.to(device)


def groups_of(optimizer: OptForge) -> Groups:
    """Return the groups of ``optimizer``, for checkpoints and schedules."""
    return optimizer._groups


def remember_steps(optimizer: OptForge) -> None:
    """Tell ``optimizer`` that numbers of steps in its state were written to: see `StepCounts`."""
    optimizer._step_counts.remember(optimizer.state.items())


def send_telemetry(optimizer: OptForge, monitor: Monitor) -> None:
    """Write every later record of ``optimizer`` to ``monitor``, DeepSpeed's ``engine.monitor``, too."""
    if optimizer._telemetry:
        optimizer._telemetry.send_to(monitor)


def reach_model(optimizer: OptForge, refresh: Callable[[], None]) -> None:
    """Let ``eval()`` and ``train()`` of an engine's ``optimizer`` reach the model's weights, which ``refresh()`` writes."""
    optimizer._refresh = refresh


@torch.no_grad()
def enter_averages(optimizer: OptForge) -> None:
    """Point the stepped tensors of ``optimizer`` at their averages.

    Raises:
        RuntimeError: they are there already.
    """
    optimizer._refuse_while_averaged("averaging")
    optimizer._training_weights = []
    for tensor, average in optimizer._averages():
        optimizer._training_weights.append((tensor, tensor.data))
        tensor.data = average


@torch.no_grad()
def leave_averages(optimizer: OptForge) -> None:
    """Undo `enter_averages` of ``optimizer``; does nothing without it."""
    for tensor, weights in optimizer._training_weights or []:
        tensor.data = weights
    optimizer._training_weights = None


def refuse_while_averaged(optimizer: OptForge, what: str) -> None:
    """Refuse an action while averaged weights are in the model.

    Args:
        optimizer: whose weights.
        what: names the action in the message.

    Raises:
        RuntimeError: `enter_averages` was called, and `leave_averages` was not.
    """
    optimizer._refuse_while_averaged(what)
