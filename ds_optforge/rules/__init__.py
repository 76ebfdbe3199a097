"""The update rules, and the base classes of a rule of another package: see docs/adding_a_rule.md."""

from ds_optforge.rules.base import (
    Batch,
    Buffer,
    Choice,
    ElementwiseRule,
    Hyperparameters,
    MatrixRule,
    State,
    Statistic,
    Sum,
    Sums,
    Tensors,
    Values,
)
from ds_optforge.rules.factor import Factor
from ds_optforge.rules.flat import decay
from ds_optforge.rules.registry import RuleError, register_rule, rule_names, rule_settings
from ds_optforge.rules.settings import DecaySettings, RuleSettings

__all__ = [
    "Batch",
    "Buffer",
    "Choice",
    "DecaySettings",
    "ElementwiseRule",
    "Factor",
    "Hyperparameters",
    "MatrixRule",
    "RuleError",
    "RuleSettings",
    "State",
    "Statistic",
    "Sum",
    "Sums",
    "Tensors",
    "Values",
    "decay",
    "register_rule",
    "rule_names",
    "rule_settings",
]
