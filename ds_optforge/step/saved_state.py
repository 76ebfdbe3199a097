"""Refuses the state dicts that this run cannot take: of other rules, or of runs with something else around them."""

from collections.abc import Mapping
from typing import Any

from ds_optforge.errors import ConfigError
from ds_optforge.rules.around import KEYS
from ds_optforge.rules.registry import rule_settings
from ds_optforge.step.slices import Members


def settings_of(state_dict: Mapping[str, Any]) -> list[str]:
    """What the groups of a saved optimizer say of it."""
    return sorted({key for group in state_dict["param_groups"] for key in group} - {"params"})


def refuse_other_surroundings(members: Members, state: Mapping[str, Any]) -> None:
    """Raise ConfigError where the saved state of a tensor has what is not around this run's rules, or lacks what is."""
    own = {buffer.name for buffer in members.around.buffers}
    for buffer, key in KEYS.items():
        if (buffer in state) != (buffer in own):
            found, allowed = (f"'{buffer}'", "the same") if buffer in state else (f"no '{buffer}'", "no")
            raise ConfigError(
                f'{key}: the checkpoint holds {found} of the group of {members.routes[0].name}; allowed: {allowed} "{key}", as '
                "in the run that saved it; or ds-optforge convert and ds_optforge.load_checkpoint, which says what it begins "
                "and what it leaves out"
            )


def refuse_missing_rules(state_dict: Mapping[str, Any]) -> None:
    """Raise ConfigError for a rule of another package that is not installed here."""
    for described in state_dict.get("optforge", ()):
        if rule_settings(described["rule"]) is None:
            raise ConfigError(
                f"the checkpoint holds the state of the rule '{described['rule']}' (parameter group "
                f"'{described['group']}'), which nothing here offers; allowed: install the package of that rule, or import it"
            )
