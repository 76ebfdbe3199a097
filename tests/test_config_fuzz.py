"""Whatever JSON stands in the optimizer and scheduler sections: it works, or a ConfigError says where it is wrong."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_optforge import ConfigError, build_optimizer, build_scheduler
from ds_optforge.config.deepspeed import check

VALID: dict[str, Any] = {
    "optimizer": {
        "type": "OptForge",
        "params": {
            "name": "normuon",
            "lr": 0.02,
            "weight_decay": 0.1,
            "momentum": 0.95,
            "momentum_warmup": {"from": 0.85, "steps": 300},
            "state_dtype": "bfloat16",
            "orthogonalization": {"coefficients": "quintic", "steps": 5, "method": "auto", "scale": "shape"},
            "sharding": {"mode": "shard_local", "gather_every": 5, "wire_dtype": "float32", "bucket_numel": 1000},
            "adamw": {"lr": 0.001, "betas": [0.9, 0.95], "eps": 1e-8},
            "roles": {"embedding": {"lr": 0.3}, "scalar": {"name": "lion", "betas": [0.9, 0.99]}},
            "overrides": [{"match": "head", "role": "matrix", "split": [4, 4]}, {"match": "0", "name": "adamw_8bit"}],
            "max_aspect_ratio": 10,
        },
    },
    "scheduler": {
        "type": "OptForgeSchedule",
        "params": {"name": "wsd", "warmup_num_steps": 10, "total_num_steps": 100, "cooldown_ratio": 0.2},
    },
}

WORDS = st.sampled_from(["name", "muon", "adamw", "lr", "betas", "auto", "matrix", "match", "cosine", "8bit", "(", "", "nan"])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    st.sampled_from([0.5, 1e308, -0.0]),
    WORDS,
    st.text(),
)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(), inner, max_size=3))


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place below the top of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


PLACES = sorted(places(VALID), key=str)


def change(config: Any, path: tuple[str | int, ...], how: str, key: str, value: Any) -> None:
    """Replace or remove what stands at the path, or add a key beside it."""
    *way, last = path
    for step in way:
        try:
            config = config[step]
        except (KeyError, IndexError, TypeError):
            return  # an earlier change took it away
    if how == "add" and isinstance(config, dict):
        config[key] = value
    elif isinstance(config, dict):
        config.pop(last, None) if how == "remove" else config.update({last: value})
    elif isinstance(config, list) and isinstance(last, int) and last < len(config):
        config[last : last + 1] = [] if how == "remove" else [value]


def try_out(config: dict[str, Any]) -> None:
    """As a user would: check the file, build from it, take the schedule's first steps."""
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 8))
    model.register_module("head", nn.Linear(8, 8, bias=False))
    for build in (lambda: check(config), lambda: train(model, config)):
        message = ""
        try:
            build()
        except ConfigError as error:
            message = str(error)
        assert all(names_its_place(line) for line in message.splitlines() if line), message


def train(model: nn.Module, config: dict[str, Any]) -> None:
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, config) if "scheduler" in config else None
    for _ in range(2):
        for group in optimizer.param_groups:
            assert all(isinstance(group[key], float | int) for key in ("lr", "weight_decay"))
        if scheduler:
            scheduler.step()
    assert torch.stack([p.sum() for p in model.parameters()]).isfinite().all()


def names_its_place(line: str) -> bool:
    """A line begins with a path of the configuration, or a parameter of the model and then a path."""
    roots = ("optimizer", "scheduler", "weight_decay_schedule", "zero_optimization", "params", "overrides")
    beside_them = line.partition(": DeepSpeed knows no such key; ")
    return line.startswith(roots) or any(f": {root}" in line for root in roots) or all(beside_them)


CHANGES = st.lists(
    st.tuples(st.sampled_from(PLACES), st.sampled_from(["replace", "remove", "add"]), WORDS | st.text(), JSON),
    min_size=1,
    max_size=3,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(CHANGES)
def test_a_changed_configuration_works_or_says_what_is_wrong(changes: list[tuple[Any, str, str, Any]]) -> None:
    config = copy.deepcopy(VALID)
    for path, how, key, value in changes:
        change(config, path, how, key, value)
    try_out(config)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(JSON, JSON)
def test_any_json_as_sections(optimizer: Any, scheduler: Any) -> None:
    try_out({"optimizer": optimizer, "scheduler": scheduler})


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.dictionaries(WORDS, JSON, max_size=4), st.dictionaries(WORDS, JSON, max_size=4))
def test_any_json_as_params(optimizer: Any, scheduler: Any) -> None:
    sections = {"optimizer": ("OptForge", optimizer), "scheduler": ("OptForgeSchedule", scheduler)}
    try_out({key: {"type": kind, "params": params} for key, (kind, params) in sections.items()})
