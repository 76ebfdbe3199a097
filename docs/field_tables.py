"""Write what is generated in optimizers.md: the rules and their fields, and coefficient sets; in telemetry.md what is healthy;
and lists of the rules' names.

    python docs/field_tables.py

rewrites what stands between `<!-- name -->` and `<!-- end -->`, and in adding_a_rule.md the code blocks below
`<!-- file: PATH -->`. tests/test_docs.py and test_adding_a_rule.py fail when the committed text is stale.
"""

import json
import re
from collections import Counter
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import torch
from pydantic import BaseModel
from torch import Tensor

from ds_optforge.config import schedule, sections
from ds_optforge.orthogonalize import COEFFICIENT_SETS, healthy, orthogonalize
from ds_optforge.orthogonalize.coefficients import CoefficientSet
from ds_optforge.rules import RuleSettings, around, muon, normalization, rule_names, rule_settings
from ds_optforge.rules.base import MatrixRule

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "optimizers.md"
AUTHORS = ROOT / "docs" / "adding_a_rule.md"
TELEMETRY = ROOT / "docs" / "telemetry.md"
LISTS = (ROOT / "README.md", ROOT / "DESCRIPTION.md")
# Of this package: others may be installed.
RULES: dict[str, type[RuleSettings]] = {
    name: settings
    for name in rule_names()
    if (settings := rule_settings(name)) and settings.__module__.startswith("ds_optforge.")
}
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "8bit": 1.0 + 4.0 / 256.0}  # of a state element; 8bit: a scale per 256

_SECTIONS: dict[str, type[BaseModel]] = {
    **RULES,
    "orthogonalization": muon.OrthogonalizationSettings,
    "momentum_warmup": muon.MomentumWarmup,
    "normalize": normalization.NormalizationSettings,
    "common": sections.CommonSettings,
    "sharding": sections.ShardingSettings,
    "telemetry": sections.TelemetrySettings,
    "average": around.AverageSettings,
    "ema_nesterov": around.EmaNesterovSettings,
    "qk_clip": sections.QKClipSettings,
    "overrides": sections.Override,
    "schedule": schedule.ScheduleConfig,
}


def rule_table() -> str:
    """A row per rule: what it does to a matrix, its state, its learning rate, and when to use it."""
    rows = ["| `name` | matrices | state, bytes per parameter | `lr` | in `ds_configs/` | when |", "|---|---|---|---|---|---|"]
    for name, settings in RULES.items():
        matrices, when = settings.summary
        rate = f"{settings.model_fields['lr'].default:g}"
        presets = ", ".join(f"{rate:g}" for rate in preset_rates(name)) or "-"
        rows.append(f"| `{name}` | {matrices} | {state_bytes(settings)} | {rate} | {presets} | {when} |")
    return "\n".join(rows)


def state_bytes(settings: type[RuleSettings]) -> str:
    """Of each state format that a rule is meant for; what it keeps per row or matrix is beside them."""
    field = settings.model_fields["state_dtype"]
    formats = get_args(field.annotation) if field.default == "float32" else (field.default,)
    buffers = settings.builds.buffers
    factors = Counter(factor.of for factor in settings.builds.factors) if issubclass(settings.builds, MatrixRule) else Counter()
    totals = [
        sum(4.0 if b.full_precision else _BYTES[name] for b in buffers) + 4.0 * factors.pop("matrix", 0) for name in formats
    ]
    text = " / ".join(f"{total:.2f}".removesuffix(".00") for total in totals)
    statistics = settings.builds.statistics if issubclass(settings.builds, MatrixRule) else ()
    kept = Counter(statistic.per for statistic in statistics)
    sides = " + ".join(f"{4 * count} {of}²" for of, count in factors.items())
    return text + "".join(f", and {4 * count} per {per}" for per, count in kept.items()) + (f", and {sides}" if sides else "")


def preset_rates(name: str) -> list[float]:
    """The learning rates of the shipped configurations whose main rule it is."""
    sections = [json.loads(path.read_text())["optimizer"]["params"] for path in sorted((ROOT / "ds_configs").glob("*.json"))]
    return sorted({section["lr"] for section in sections if section["name"] == name})


def name_list() -> str:
    """A sentence for the front pages."""
    return f"Rules: {', '.join(f'`{name}`' for name in RULES)}, in any mix."


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


def healthy_table() -> str:
    """A row per coefficient set: the highest error and the factors of the update, for three sizes of matrices."""
    sides = (64, 1024, 4096)
    errors, factors = (" | ".join(f"{what}, {side}" for side in sides) for what in ("error", "factor"))
    rows = [f"| `coefficients` | {errors} | {factors} |", "|---" * (1 + 2 * len(sides)) + "|"]
    for name, chosen in COEFFICIENT_SETS.items():
        found = [healthy(chosen.triples, chosen.safety, side, torch.finfo(torch.bfloat16).bits) for side in sides]
        highest = " | ".join(f"{bounds.error:.2f}" for bounds in found)
        sizes = " | ".join(f"{bounds.smallest:.2f} to {bounds.largest:.2f}" for bounds in found)
        rows.append(f"| `{name}` | {highest} | {sizes} |")
    return "\n".join(rows)


def tables() -> dict[str, str]:
    """Everything generated by the name in its marker; "rule_names" is for the front pages, "healthy" for telemetry.md."""
    fields = {name: field_table(model) for name, model in _SECTIONS.items()}
    made = {"coefficients": coefficient_table(), "healthy": healthy_table(), "rule_names": name_list()}
    return {"rules": rule_table(), **fields, **made}


def committed(text: str) -> dict[str, str]:
    """The tables that a page holds, by name."""
    return dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end -->", text, flags=re.DOTALL))


def rewritten(text: str) -> str:
    """A page with everything made anew that it has a marker for."""
    for name, table in tables().items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda found, table=table: found[1] + table + "\n" + found[2], text, flags=re.DOTALL)
    return text


def with_files(text: str) -> str:
    """A page with its code blocks made anew that are whole files of the repository."""
    pattern = r"(<!-- file: (\S+) -->\n```\w+\n).*?(^```$)"
    return re.sub(
        pattern, lambda found: found[1] + (ROOT / found[2]).read_text() + found[3], text, flags=re.DOTALL | re.MULTILINE
    )


if __name__ == "__main__":
    AUTHORS.write_text(with_files(AUTHORS.read_text(encoding="utf-8")), encoding="utf-8")
    for path in (PAGE, TELEMETRY, *LISTS):
        path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
