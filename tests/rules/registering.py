"""Rules of tests, which must not stay in the registry: other tests ask it for all rules there are."""

from collections.abc import Iterator
from contextlib import contextmanager

from ds_optforge.rules import RuleSettings, register_rule, rule_names
from ds_optforge.rules.settings import REGISTERED


@contextmanager
def registered(*rules: type[RuleSettings]) -> Iterator[None]:
    """Inside, these rules are known too, and whatever else is registered there; afterwards only those of before."""
    rule_names()  # imports the package's own rules, which are to stay
    before = dict(REGISTERED)
    try:
        for rule in rules:
            register_rule(rule)
        yield
    finally:
        REGISTERED.clear()
        REGISTERED.update(before)
