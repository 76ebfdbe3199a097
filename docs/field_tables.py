"""Write the generated tables of optimizers.md: fields from the pydantic models, coefficient sets from their data.

    python docs/field_tables.py

rewrites what stands between `<!-- name -->` and `<!-- end -->`. tests/test_docs.py fails when the committed text is stale.
"""

import json
import re
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import torch
from pydantic import BaseModel
from torch import Tensor

from ds_optforge.config import schedule, sections
from ds_optforge.orthogonalize import COEFFICIENT_SETS, orthogonalize
from ds_optforge.orthogonalize.coefficients import CoefficientSet
from ds_optforge.rules import muon, rule_names, rule_settings

PAGE = Path(__file__).parent / "optimizers.md"
_SECTIONS: dict[str, type[BaseModel]] = {
    **{name: settings for name in rule_names() if (settings := rule_settings(name))},
    "orthogonalization": muon.OrthogonalizationSettings,
    "momentum_warmup": muon.MomentumWarmup,
    "common": sections.CommonSettings,
    "sharding": sections.ShardingSettings,
    "telemetry": sections.TelemetrySettings,
    "overrides": sections.Override,
    "schedule": schedule.ScheduleConfig,
}


def field_table(model: type[BaseModel]) -> str:
    """A row per field: name, default as JSON, what it is and which words it takes."""
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else f"`{_as_json(field.get_default(call_default_factory=True))}`"
        allowed = ", ".join(f"`{word}`" for word in _words(field.annotation))
        meaning = "; ".join(filter(None, [field.description, allowed])) or "a section of its own, below"
        rows.append(f"| `{field.alias or name}` | {default} | {meaning} |")
    return "\n".join(rows)


def _words(annotation: Any) -> tuple[str, ...]:
    """The strings that a field takes, where these are all (one of them, or null)."""
    options = get_args(annotation) if get_origin(annotation) is UnionType else (annotation,)
    literals = [option for option in options if get_origin(option) is Literal]
    return get_args(literals[0]) if len(literals) == 1 else ()


def _as_json(value: Any) -> str:
    """As the configuration would say it; a section that is all defaults is {}."""
    return "{}" if isinstance(value, BaseModel) else json.dumps(value)


def float64_range(chosen: CoefficientSet) -> tuple[float, float]:
    """Smallest and largest output for singular values in [1e-3, 1] of the normalised matrix, by the scalar polynomial."""
    x = torch.logspace(-3, 0, 200_001, dtype=torch.float64) / chosen.safety
    for a, b, c in chosen.triples:
        x = a * x + b * x**3 + c * x**5
    return x.min().item(), x.max().item()


def bfloat16_range(name: str) -> tuple[float, float]:
    """Singular values of `orthogonalize`'s result in bfloat16, on 64 x 96 matrices whose own cover the same interval."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for spectrum in (torch.logspace(-2.6, 0, 64), torch.cat([torch.ones(1), torch.logspace(-3, -1.5, 63)])):
        left, _ = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))
        right, _ = torch.linalg.qr(torch.randn(96, 64, generator=generator, dtype=torch.float64))
        given: Tensor = left @ torch.diag(spectrum.double()) @ right.T
        found.append(torch.linalg.svdvals(orthogonalize(given.float(), name).double()))
    return torch.cat(found).min().item(), torch.cat(found).max().item()


def coefficient_table() -> str:
    """A row per coefficient set, ranges to two digits after the point."""
    rows = ["| `coefficients` | steps | singular values, float64 | singular values, bfloat16 |", "|---|---|---|---|"]
    for name, chosen in COEFFICIENT_SETS.items():
        exact, low = float64_range(chosen), bfloat16_range(name)
        ranges = " | ".join(f"{lowest:.2f} to {highest:.2f}" for lowest, highest in (exact, low))
        rows.append(f"| `{name}` | {len(chosen.triples)} | {ranges} |")
    return "\n".join(rows)


def tables() -> dict[str, str]:
    """Every generated table by the name in its marker."""
    return {name: field_table(model) for name, model in _SECTIONS.items()} | {"coefficients": coefficient_table()}


def committed(text: str) -> dict[str, str]:
    """The tables that a page holds, by name."""
    return dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end -->", text, flags=re.DOTALL))


def rewritten(text: str) -> str:
    """The page with every table made anew."""
    for name, table in tables().items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda found, table=table: found[1] + table + "\n" + found[2], text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
