"""The settings that every rule reads from the configuration, and the types of their fields.

A rule's own settings stand beside its math, in a subclass with ``@register_rule``.
"""

import importlib.util
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, Strict, field_validator, model_validator

from ds_optforge.rules.base import ElementwiseRule, MatrixRule, Rule
from ds_optforge.validation import Section

DTypeName: TypeAlias = Literal["float32", "bfloat16"]
StateDType: TypeAlias = Literal["float32", "bfloat16", "8bit"]
DecaySchedule: TypeAlias = Literal["constant", "linear", "cosine"]

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]  # of learning; above 10 it is taken for a slip
Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Strict(False)]

# In bfloat16 a moving average stops short of a constant by 2**-9 / (1 - rate) of it, because steps are then less than half
# the spacing of its numbers: by 4% at 0.95, by 20% at 0.99, and at 0.999 it would not move at all.
_SLOWEST_IN_BFLOAT16 = 0.99


# The settings of every registered rule, by the rule's name. `ds_optforge.rules.registry` fills it.
REGISTERED: dict[str, "type[RuleSettings]"] = {}


class RuleSettings(Section):
    """Base of all rules' settings. A subclass adds the rule's own fields, with defaults, and declares the attributes below.

    Attributes:
        rule: name of the rule in the configuration.
        title: name of the rule for people.
        builds: class of the rule that `build` returns.
        decay_rates: names of the fields that are decay rates of state buffers, each a number or several. Rates above 0.99
            are refused with bfloat16 state.
        steady: settings with which gradients that differ by rounding make steps that do, for `ds_optforge.testing`; empty for
            most rules, whose every setting does.
        signs: whether the step of a whole matrix depends on signs of elements, which rounding may turn where one is almost 0;
            `ds_optforge.testing` then allows what a turned sign moves.
        summary: what the rule does to a matrix, and when to use it, in a few words each, for the table of all rules.
    """

    rule: ClassVar[str]
    title: ClassVar[str]
    builds: ClassVar[type[Rule]]
    decay_rates: ClassVar[tuple[str, ...]]
    steady: ClassVar[Mapping[str, Any]] = {}
    signs: ClassVar[bool] = False
    summary: ClassVar[tuple[str, str]] = ("", "")

    lr: Rate = Field(1e-3, description="learning rate; above 10 it is taken for a slip")
    state_dtype: StateDType = Field("float32", description="how the elementwise state is kept; 8bit needs bitsandbytes")

    @field_validator("state_dtype")
    @classmethod
    def _installed(cls, state_dtype: str) -> str:
        if state_dtype == "8bit" and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("'float32' or 'bfloat16', or install bitsandbytes: pip install 'ds-optforge[8bit]'")
        return state_dtype

    @model_validator(mode="after")
    def _representable(self) -> "RuleSettings":
        rates = [rate for name in self.decay_rates for rate in _numbers(getattr(self, name))]
        if self.state_dtype == "bfloat16" and rates and max(rates) > _SLOWEST_IN_BFLOAT16:
            raise ValueError(
                f"state_dtype: got 'bfloat16' with a moving average of decay rate {max(rates):g}, which would stand still in "
                f"its 8 bits; allowed: rates up to {_SLOWEST_IN_BFLOAT16}, or 'float32' or '8bit'"
            )
        return self

    @classmethod
    def needs_matrix(cls) -> bool:
        """Whether the rule steps whole matrices and leaves the other parameters to AdamW."""
        return issubclass(cls.builds, MatrixRule)

    @property
    def needs_schedule(self) -> str:
        """Name of the weight-decay schedule that only an OptForgeSchedule can follow, or "" without one."""
        return ""

    @property
    def matches_adamw(self) -> bool:
        """Whether a matrix rule's updates are as large as AdamW's, so that one learning rate serves both."""
        return False

    @classmethod
    def refuse_key(cls, key: str) -> str:
        """Say why ``key`` is not a key of the rule, and which rules read it."""
        readers = sorted(name for name, settings in REGISTERED.items() if key in settings.model_fields)
        return f"'{cls.rule}' does not read it" + (f" (read by {', '.join(readers)})" if readers else "")

    def build(self) -> ElementwiseRule | MatrixRule:
        """Construct the rule, with everything that no schedule may change.

        Raises:
            NotImplementedError: a subclass that does not define it.
        """
        raise NotImplementedError

    def build_rows(self, share: float) -> MatrixRule:
        """Construct the rule that steps a ``share`` of each matrix's output rows (``sharding.rows``): see `Choice`.

        Raises:
            ValueError: the rule, or these settings of it, can only step whole matrices; the message says what is allowed.
        """
        raise ValueError(f"rule '{self.rule}', which steps whole matrices; allowed: null")

    def scheduled(self) -> dict[str, Any]:
        """Return the values that live in the parameter group, where a schedule may change them, by name."""
        return {name: getattr(self, name) for name in self.builds.scheduled}


class PlainDecaySettings(RuleSettings):
    """Settings of the rules with decoupled weight decay of all elements."""

    weight_decay: NonNegative = Field(0.0, description="decoupled weight decay, times the learning rate")
    weight_decay_schedule: DecaySchedule = Field("constant", description="over the run: linear is 1 - progress")

    @property
    def needs_schedule(self) -> str:
        """Name of the weight-decay schedule, or "" for a constant weight decay."""
        return "" if self.weight_decay_schedule == "constant" else self.weight_decay_schedule


class DecaySettings(PlainDecaySettings):
    """Settings of the rules with decoupled weight decay, plain or cautious."""

    cautious_weight_decay: bool = Field(False, description="decay only where the update points towards zero too")


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
