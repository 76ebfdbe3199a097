"""TRL's trainers wrap the model in adapters themselves: these are on the matrix rule there too, and nothing is on AdamW."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import cases
from tests.distributed.conftest import Pools
from tests.distributed.pool import RankFailure
from tests.distributed.test_parity import assert_same
from tests.oracles import EXACT

aligners = pytest.importorskip("tests.distributed.aligners", reason="trl or peft is not installed (extra 'test')")

MUON: dict[str, Any] = {**EXACT, "name": "muon", "lr": 0.01, "adamw": {"eps": 1e-5}}
HEAD = "base_model.model.score.modules_to_save.default.weight"
# By trainer: what it trains beside the factors, by group. PEFT trains the head that a reward model begins with.
BESIDE: dict[str, dict[str, list[str]]] = {"sft": {}, "dpo": {}, "reward": {"unembedding.adamw": [HEAD]}, "grpo": {}}
PLACES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
FACTORS = {f"base_model.model.model.layers.0.{place}.lora_{letter}.default.weight" for place in PLACES for letter in "AB"}


def trained(found: dict[str, Any]) -> set[str]:
    """The weights that have changed."""
    return {name for name, weight in found["parameters"].items() if not torch.equal(weight, found["before"][name])}


@pytest.mark.promise("trl-adapters")
@pytest.mark.compatibility("trl", stages=(2, 3), verdict="exact")
@pytest.mark.parametrize("kind", aligners.KINDS)
def test_adapters_that_trl_makes_are_orthogonalized(kind: str, pools: Pools, tmp_path: Path) -> None:
    """By a TrainerOptimizer without DeepSpeed, and by a file on ZeRO-2 and 3 with a callback that registers the model.

    All three train alike, but for GRPO, whose ranks draw completions of their own.
    """
    (plain,) = pools[1].run(aligners.train, kind, {}, MUON, str(tmp_path))
    runs = [plain]
    for stage in (2, 3):
        config = cases.engine_config(stage, MUON, train_batch_size=4)
        config["train_micro_batch_size_per_gpu"] = 2
        runs += pools[2].run(aligners.train, kind, config, MUON, str(tmp_path))
    for found in runs:
        groups = {group: set(names) for group, names in found["groups"].items()}
        assert groups == {"matrix.muon": FACTORS, **{group: set(names) for group, names in BESIDE[kind].items()}}
        assert trained(found) == set().union(*groups.values())
        if kind != "grpo":
            # Of a reward model the last token alone is scored: q_proj's gradient has one direction, the next being 5e-8 of it,
            # and what orthogonalizing makes of these is rounding.
            assert_same(found["parameters"], plain["parameters"], 1e-4 if kind == "reward" else 1e-5)


def test_the_pages_lines_train(pools: Pools, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "frameworks" / "trl.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"<!-- snippet: trl -->\n```python\n(.*?)```", page, re.DOTALL)
    config = cases.engine_config(2, MUON, train_batch_size=4)
    del config["optimizer"]
    first, second = pools[2].run(aligners.run_page, snippet, config, str(tmp_path))
    assert first == second
    assert len(first) == 2


def test_an_optimizer_that_was_built_before_the_adapters_is_refused(pools: Pools, tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="optimizer: holds none of 6 parameters that the model trains"):
        pools[1].run(aligners.refused_early, MUON, str(tmp_path))
