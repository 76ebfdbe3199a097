"""What a configuration does to each parameter of a model, and why: the table of ``ds-optforge explain``."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from ds_optforge.config.deepspeed import load_config, optimizer_section
from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.routing.roles import Route, routes_of, warnings_of
from ds_optforge.rules.base import MatrixRule

_WIDTH = 250  # enough for every name; the table takes what it needs
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Row:
    """Parameters that are alike but for the numbers in their names: the same place in every layer.

    Attributes:
        name: of the parameters, with the range of each number.
        count: of the parameters.
        route: of the first of them.
    """

    name: str
    count: int
    route: Route

    def plain(self) -> dict[str, Any]:
        """Return the row as JSON can hold it."""
        route, settings = self.route, self.route.settings
        return {
            "parameters": self.name,
            "count": self.count,
            "shape": list(route.shape),
            "role": route.role,
            "rule": settings.rule,
            "matrices": [[rows, cols] for rows, cols in route.stepped],
            "stored": "in_out" if route.transposed else "out_in",
            "scale": scale_of(route),
            "state_dtype": settings.state_dtype,
            "lr": settings.lr,
            "weight_decay": getattr(settings, "weight_decay", 0.0),
            "why": route.why,
            "fused": route.fused,
        }


def scale_of(route: Route) -> float | None:
    """Return the factor of the orthogonal update of a route's first matrix; None for an elementwise rule."""
    if not route.matrices:
        return None
    rule = route.settings.build()
    assert isinstance(rule, MatrixRule)
    return next(route.scales(rule))


def explained(model: nn.Module, config: str | Path | Mapping[str, Any], full: bool = False) -> tuple[list[Row], list[str]]:
    """Return the rows of `explain`, and the warnings that building would log; arguments and errors are as there."""
    checked = OptimizerConfig(optimizer_section(load_config(config)))
    routes = routes_of(model, checked)
    rows = [Row(route.name, 1, route) for route in routes] if full else list(_folded(routes))
    return rows, warnings_of([(route.settings, route.numel) for route in routes], checked)


def explain(model: nn.Module, config: str | Path | Mapping[str, Any], full: bool = False) -> str:
    """Return a table of the role, rule, matrices and settings that OptForge would give to each parameter, with the reason.

    Args:
        model: any module, also one on the meta device.
        config: a DeepSpeed configuration (dict or path), or the "params" of its optimizer section alone.
        full: whether to have a row for each parameter; False has one for what is alike in all layers.

    Raises:
        ConfigError: the configuration is invalid or does not fit the model.
    """
    return table_of(*explained(model, config, full))


def table_of(rows: Sequence[Row], warnings: Sequence[str]) -> str:
    """Return the table of what `explained` found."""
    table = Table()
    for column in ("parameter", "shape", "role", "rule", "matrices", "state", "lr", "weight decay", "scale", "why"):
        table.add_column(column, no_wrap=column != "why", overflow="fold")
    for row in rows:
        table.add_row(*_cells(row))
    numel: dict[str, int] = {}
    for row in rows:
        rule = row.route.settings.rule
        numel[rule] = numel.get(rule, 0) + row.count * row.route.numel
    table.caption = ", ".join(f"{rule}: {count:,} params" for rule, count in numel.items())
    console = Console(width=_WIDTH, force_jupyter=False)  # there it would print an empty output of its own
    with console.capture() as capture:
        console.print(table)
        for line in (*_uncut(rows), *(f"warning: {warning}" for warning in warnings)):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
    return capture.get()


def _cells(row: Row) -> Iterator[str]:
    route, settings = row.route, row.route.settings
    yield row.name
    yield "x".join(map(str, route.shape)) + (f" ({row.count} of them)" if row.count > 1 else "")
    yield route.role
    yield settings.rule
    yield _matrices(route)
    yield settings.state_dtype
    yield f"{settings.lr:g}"
    yield f"{getattr(settings, 'weight_decay', 0.0):g}"
    scale = scale_of(route)
    yield "-" if scale is None else f"{scale:.3g}"
    yield route.why


def _matrices(route: Route) -> str:
    """Return the numbers and shapes of the matrices, as they follow each other."""
    shapes = [(len(list(same)), *shape) for shape, same in groupby(route.stepped)]
    shown = shapes if len(shapes) <= 3 else shapes[:2]
    more = sum(1 for _ in route.stepped) - sum(count for count, *_ in shown)
    text = " + ".join(f"{count} of {rows}x{cols}" for count, rows, cols in shown) + (f" + {more}" if more else "")
    return text + (" (in, out)" if text and route.transposed else "") or "-"


def _uncut(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line for what could be cut into the matrices that it joins, and is not."""
    for row in rows:
        if row.route.fused:
            yield f"could be cut: {row.name}: {row.route.fused}"


def _folded(routes: Sequence[Route]) -> Iterator[Row]:
    """Yield one row for the routes that differ only in the numbers in their names, in the order of the first of them."""
    alike: dict[Any, list[Route]] = {}
    for route in routes:
        matrices = tuple(route.stepped)
        key = (_NUMBER.sub("#", route.name), route.shape, route.role, route.settings, matrices, route.why, route.transposed)
        alike.setdefault(repr(key), []).append(route)
    for found in alike.values():
        yield Row(_range([route.name for route in found]), len(found), found[0])


def _range(names: Sequence[str]) -> str:
    """Return one name for all of ``names``: numbers that differ as a range, or with a comma if some are left out."""
    numbers = list(zip(*(map(int, _NUMBER.findall(name)) for name in names), strict=True))
    texts = iter([_numbers(sorted(set(column))) for column in numbers])
    return _NUMBER.sub(lambda _: next(texts), names[0])


def _numbers(found: Sequence[int]) -> str:
    if len(found) == 1:
        return str(found[0])
    if len(found) == found[-1] - found[0] + 1:
        return f"{found[0]}-{found[-1]}"
    return f"{found[0]},..,{found[-1]}"
