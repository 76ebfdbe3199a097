"""The keys of an OptForge section that belong to no rule."""

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Field, Strict, field_validator, model_validator

from ds_optforge.rules.around import AverageSettings, EmaNesterovSettings
from ds_optforge.rules.settings import DTypeName
from ds_optforge.validation import Section

Role: TypeAlias = Literal["matrix", "embedding", "unembedding", "scalar"]
ROLES: tuple[Role, ...] = ("matrix", "embedding", "unembedding", "scalar")

# Which factors of an adapter's change B A a matrix rule takes.
Lora: TypeAlias = Literal["both", "b_only", "adamw"]

# With fewer whole rows on a rank, shard_local is row normalisation rather than Muon.
THIN_ROWS = 32


class ShardingSettings(Section):
    """Settings of the orthogonalization of matrices that ZeRO has cut."""

    mode: Literal["gather", "shard_local"] = Field(
        "gather", description="gather: whole, by the rank that owns the matrix; shard_local: each rank its own rows, no traffic"
    )
    gather_every: int | None = Field(
        None, ge=2, description="shard_local: every how many steps to gather, from the first on (block-periodic); null: never"
    )
    rows: float | None = Field(
        None,
        gt=0,
        le=1,
        description="gather: share of each matrix's output rows that a step orthogonalizes and sends, those with the largest "
        "momentum, by error feedback (Dion2, Dion3); null or 1: all",
    )
    wire_dtype: DTypeName = Field("bfloat16", description="fragments and updates are rounded to it, travelling or not")
    bucket_numel: int = Field(
        2**26, ge=1, description="elements of a bucket's send and of its receive buffer; a step works in two buckets"
    )

    @model_validator(mode="after")
    def _periodic(self) -> "ShardingSettings":
        if self.gather_every and self.mode == "gather":
            raise ValueError(f"gather_every: got {self.gather_every} with mode 'gather'; allowed: mode 'shard_local'")
        if self.share < 1 and self.mode != "gather":
            raise ValueError(f"rows: got {self.share:g} with mode '{self.mode}'; allowed: mode 'gather', or null")
        return self

    @property
    def share(self) -> float:
        """Of each matrix's output rows, those that a step updates."""
        return 1.0 if self.rows is None else self.rows

    @property
    def travels(self) -> bool:
        """Whether matrices are ever gathered."""
        return self.mode == "gather" or self.gather_every is not None

    def gathers(self, step: int) -> bool:
        """Whether matrices are gathered in this ``step``, counted from 1."""
        return self.mode == "gather" or (self.gather_every is not None and (step - 1) % self.gather_every == 0)


class TelemetrySettings(Section):
    """Settings of the per-group statistics of steps."""

    every: int = Field(ge=1, description="steps from one record to the next; 10 cost less than 1% of a step's time")


class QKClipSettings(Section):
    """Settings of QK-clip, which bounds the attention logits (MuonClip of Kimi K2, arXiv 2507.20534, section 2.1)."""

    tau: Annotated[float, Field(gt=0)] = Field(100.0, description="the largest attention logit that a head is to have")
    every: int = Field(1, ge=1, description="steps from one look at the logits, and clip, to the next")


class Override(Section):
    """Settings for the parameters whose name matches a regular expression (searched anywhere in the name)."""

    model_config = ConfigDict(extra="allow")

    match: str = Field(description="a regular expression")
    role: Role | None = None
    stored: Literal["out_in", "in_out"] | None = Field(
        None, description="order of the last two dimensions, where the module does not tell: Linears are out_in"
    )
    split: Literal["auto"] | Annotated[tuple[Annotated[int, Field(ge=1)], ...], Strict(False)] | None = Field(
        None, description="rows of each matrix that is fused into the parameter; auto: as its module tells"
    )
    heads: Literal["auto"] | int | tuple[int, ...] | None = Field(
        None, description="equal row blocks that each matrix is cut into; a list: one count per entry of split; auto: by head"
    )

    @field_validator("split", mode="wrap")
    @classmethod
    def _parts(cls, value: Any, handler: Any) -> Any:
        if value is None or value == "auto":
            return value
        if not isinstance(value, list | tuple) or not value or any(type(rows) is not int or rows < 1 for rows in value):
            raise ValueError("'auto', or a list of integers of at least 1")
        return tuple(value)

    @field_validator("heads", mode="wrap")
    @classmethod
    def _counts(cls, value: Any, handler: Any) -> Any:
        if value is None or value == "auto":
            return value
        counts = value if isinstance(value, list | tuple) else [value]
        if not counts or any(type(count) is not int or count < 1 for count in counts):
            raise ValueError("'auto', an integer of at least 1, or a list of them")
        return value if isinstance(value, int) else tuple(value)

    @field_validator("match")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"a regular expression ({error})") from None
        return pattern

    @property
    def settings(self) -> dict[str, Any]:
        """The keys that are settings of a rule, with their values; "name" is one of them."""
        return dict(self.model_extra or {})


class CommonSettings(Section):
    """The keys of "params" that belong to no rule."""

    name: str = Field(description="the rule of the model's matrices, or of all parameters")
    adamw: dict[str, Any] = Field(default_factory=dict, description="for parameters that a matrix rule does not take")
    roles: dict[Role, dict[str, Any]] = Field(default_factory=dict, description="settings by role, name included")
    overrides: Annotated[tuple[Override, ...], Strict(False)] = Field((), description="settings by parameter name")
    sharding: ShardingSettings = ShardingSettings()
    telemetry: TelemetrySettings | None = Field(None, description='numbers about every k-th step: {"every": 10}')
    average: AverageSettings | None = Field(None, description="an average of the trained weights, to evaluate and to export")
    ema_nesterov: EmaNesterovSettings | None = Field(
        None, description="gradients at weights that are ahead of the trained ones, along the average of their changes"
    )
    qk_clip: QKClipSettings | None = Field(
        None, description='bound the attention logits: {"tau": 100, "every": 1}; see docs/qk_clip.md'
    )
    split: Literal["auto"] | None = Field(None, description="auto: cut every weight whose fused matrices are known into them")
    heads: Literal["auto"] | None = Field(None, description="auto: cut the projections of attention into their heads")
    max_aspect_ratio: Annotated[float, Field(ge=1)] | None = Field(
        None, description="a longer, thinner matrix falls back to adamw; null: 10 for what is no known hidden linear map"
    )
    lora: Lora | None = Field(
        None, description="the factors of LoRA adapters that the rule takes, whatever their aspect ratio; null: both, if any"
    )
