"""Overrides find parameters by name: through the prefixes of wrappers, and never none at all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ds_optforge import ConfigError, build_optimizer, explain
from ds_optforge.config.sections import Override
from ds_optforge.routing.matching import ParameterNames
from tests.oracles import table_rows


class Block(nn.Module):
    """A layer with a fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)


def model() -> nn.Module:
    return nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()]), "norm": nn.LayerNorm(8)})


class Wrapper(nn.Module):
    """A model under the name of a submodule, as DDP, an engine and PEFT hold it."""

    def __init__(self, inner: nn.Module, *path: str) -> None:
        super().__init__()
        first, *rest = path
        self.add_module(first, Wrapper(inner, *rest) if rest else inner)


def config(pattern: str, **settings: Any) -> dict[str, Any]:
    return {"name": "muon", "lr": 0.02, "adamw": {"lr": 0.001}, "overrides": [{"match": pattern, "lr": 0.5, **settings}]}


def found(chosen: nn.Module, pattern: str) -> list[str]:
    """Names of the parameters with the override's rate."""
    return [name for name, row in table_rows(explain(chosen, config(pattern))).items() if row[5] == "0.5"]


class TestUnmatched:
    @pytest.mark.parametrize("door", [build_optimizer, explain])
    def test_it_is_an_error_with_the_pattern_and_near_names(self, door: Callable[[nn.Module, Any], Any]) -> None:
        with pytest.raises(ConfigError) as error:
            door(model(), config(r"blocks\.\d+\.qvk\.weight"))
        assert str(error.value).startswith(
            r"optimizer.params.overrides[0].match: 'blocks\.\d+\.qvk\.weight' matches no parameter; nearest: blocks.0.qkv"
        )

    def test_every_such_override_is_named(self) -> None:
        overrides = [{"match": "qkv", "lr": 0.1}, {"match": "nrom", "lr": 0.1}, {"match": "xyz", "lr": 0.1}]
        with pytest.raises(ConfigError) as error:
            build_optimizer(model(), {"name": "adamw", "overrides": overrides})
        lines = str(error.value).splitlines()
        assert [line.split(".match")[0] for line in lines] == ["optimizer.params.overrides[1]", "optimizer.params.overrides[2]"]
        assert "nearest: norm." in lines[0]

    def test_one_that_matches_only_frozen_parameters_is_fine(self) -> None:
        frozen = model()
        frozen["norm"].requires_grad_(False)
        build_optimizer(frozen, config("norm"))

    def test_a_rank_that_does_not_know_all_names_can_ask_with_those_of_all_ranks(self) -> None:
        overrides = [Override(match="^0"), Override(match="^1")]
        ParameterNames(["0.weight", "1.weight"]).refuse_unmatched(overrides)
        with pytest.raises(ConfigError, match=r"overrides\[1\]"):
            ParameterNames(["0.weight"]).refuse_unmatched(overrides)


class TestWrappers:
    @pytest.mark.parametrize(
        "path", [("module",), ("_orig_mod",), ("module", "_orig_mod"), ("_orig_mod", "module"), ("base_model", "model")]
    )
    def test_an_anchored_pattern_looks_through_them(self, path: tuple[str, ...]) -> None:
        assert found(Wrapper(model(), *path), r"^blocks\.0\.out") == [
            f"{'.'.join(path)}.blocks.0.out.{name}" for name in ("weight", "bias")
        ]

    def test_torch_compile(self) -> None:
        assert found(torch.compile(model()), "^norm") == ["_orig_mod.norm.weight", "_orig_mod.norm.bias"]  # type: ignore[arg-type]

    def test_a_layer_that_is_compiled_alone(self) -> None:
        chosen = model()
        chosen["blocks"][0] = torch.compile(chosen["blocks"][0])
        assert found(chosen, r"^blocks\.\d\.out\.weight") == ["blocks.0._orig_mod.out.weight", "blocks.1.out.weight"]

    def test_a_pattern_with_the_prefix_still_matches(self) -> None:
        assert len(found(Wrapper(model(), "module"), r"^module\.norm")) == 2

    def test_a_submodule_of_the_models_own_that_is_called_module_is_no_wrapper(self) -> None:
        """Its norm is not the outer one."""
        chosen = nn.ModuleDict({"module": model(), "norm": nn.LayerNorm(8)})
        assert found(chosen, "^norm") == ["norm.weight", "norm.bias"]
