"""The "params" of an OptForgeSchedule section."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ds_optforge.validation import Section, refuse_auto, validate


class ScheduleConfig(Section):
    """The "params" of an OptForgeSchedule section; the fields are named as frameworks fill them.

    The curve runs from the end of the warm-up to the last step; a cool-down replaces its end.
    """

    name: Literal["none", "constant", "linear", "cosine", "wsd", "rex"] = Field(
        "constant", description="the curve after the warm-up; wsd is constant with a cool-down"
    )
    warmup_num_steps: int = Field(0, ge=0, description="steps of linear warm-up; the first step is not zero")
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="the same as a fraction of all steps")
    total_num_steps: int | None = Field(None, ge=1, description="optimizer steps of the whole run, warm-up included")
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="of the initial rate, at the last step")
    cooldown_num_steps: int = Field(0, ge=0, description="steps at the end that fall from where the curve is")
    cooldown_ratio: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="the same as a fraction of all steps")
    cooldown_shape: Literal["linear", "cosine", "1-sqrt"] = Field("linear", description="how the cool-down falls")
    exponent: Annotated[float, Field(gt=0)] = Field(0.5, description="of rex: (1 - progress) ** exponent")

    @model_validator(mode="after")
    def _consistent(self) -> "ScheduleConfig":
        if self.name == "none" and (self.warmup_num_steps or self.warmup_ratio or self.cools_down):
            raise ValueError("name: got 'none' with a warm-up or cool-down; allowed: 'constant', or 'none' alone")
        for part in ("warmup", "cooldown"):
            if getattr(self, f"{part}_num_steps") and getattr(self, f"{part}_ratio"):
                raise ValueError(f"{part}_ratio: got both {part}_num_steps and {part}_ratio; allowed: one of them")
        if self.name == "wsd" and not self.cools_down:
            raise ValueError("cooldown_ratio: missing; allowed: cooldown_num_steps or cooldown_ratio ('wsd' needs one)")
        falls = self.name in ("linear", "cosine", "rex") or self.cools_down
        if self.total_num_steps is None and (falls or self.warmup_ratio):
            raise ValueError(f"total_num_steps: missing; allowed: an integer of at least 1 ('{self.name}' needs it)")
        falling = max(self.cooldown, 1 if falls else 0)
        if self.total_num_steps is not None and self.warmup + falling > self.total_num_steps:
            needed = f"{self.warmup} steps of warm-up and {falling} to fall"
            raise ValueError(f"total_num_steps: got {self.total_num_steps}; allowed: at least {needed}")
        return self

    @property
    def cools_down(self) -> bool:
        """Whether a cool-down is configured."""
        return bool(self.cooldown_num_steps or self.cooldown_ratio)

    @property
    def decays(self) -> bool:
        """Whether the rate ever falls."""
        return self.name not in ("none", "constant") or self.cools_down

    @property
    def warmup(self) -> int:
        """Steps of warm-up, given as a number or as a ratio."""
        return self.warmup_num_steps or round(self.warmup_ratio * (self.total_num_steps or 0))

    @property
    def cooldown(self) -> int:
        """Steps of cool-down, given as a number or as a ratio."""
        if self.cooldown_num_steps or not self.cooldown_ratio:
            return self.cooldown_num_steps
        return max(int(self.cooldown_ratio * (self.total_num_steps or 0)), 1)  # rounded down; a warm-up to the nearest


def schedule_config(section: Mapping[str, Any], path: str = "scheduler.params") -> ScheduleConfig:
    """Validate the "params" of an OptForgeSchedule section.

    Args:
        section: the "params".
        path: of the section, for messages.

    Raises:
        ConfigError: unknown keys, bad or contradictory values, or an "auto" that is left.
    """
    refuse_auto(section, path)
    return validate(ScheduleConfig, section, path)
