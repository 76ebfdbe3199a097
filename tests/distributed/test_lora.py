"""PEFT's adapters on real engines: only they are trained, as one process trains them, and they can be saved and switched.

Tolerances as in test_parity: 1e-5 relative with float32 products and wire.
"""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_optforge import shipped_configs
from tests.distributed import cases
from tests.distributed.conftest import Pools
from tests.distributed.pool import RankFailure
from tests.distributed.test_parity import TOLERANCE, assert_same
from tests.oracles import EXACT

adapters = pytest.importorskip("tests.distributed.adapters", reason="peft is not installed (extra 'test')")

STEPS = 6
MUON = {**cases.MUON, **EXACT}
ORDER = ("default", "default", "other", "default", "other", "other")
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"<!-- snippet: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


@cache
def plain(kind: str = "lora", order: tuple[str, ...] = (), steps: int = STEPS, **changes: Any) -> dict[str, Tensor]:
    """What one process without DeepSpeed trains."""
    parameters: dict[str, Tensor] = adapters.train_plain({**MUON, **changes}, steps, kind, order)
    return parameters


@cache
def start(kind: str) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in adapters.adapted(kind).named_parameters()}


def of_adapters(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in parameters.items() if "lora_" in name}


def changed(parameters: dict[str, Tensor], kind: str = "lora") -> set[str]:
    return {name for name, before in start(kind).items() if not torch.equal(parameters[name], before.float())}


@pytest.mark.compatibility("peft", verdict="exact")
@pytest.mark.parametrize("kind", ["lora", "dora", "embedding", "qlora"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_adapters_are_trained_as_in_one_process(stage: int, kind: str, pools: Pools) -> None:
    """And nothing else is: every other weight is what it was, bit for bit. QLoRA's weights are in 4 bits."""
    for result in pools[2].run(adapters.train, cases.engine_config(stage, MUON), STEPS, kind):
        assert_same(of_adapters(result["parameters"]), of_adapters(plain(kind)))
        assert changed(result["parameters"], kind) == set(of_adapters(start(kind)))


@pytest.mark.parametrize("lora", ["b_only", "adamw"])
def test_which_factors_are_orthogonalized(lora: str, pools: Pools) -> None:
    config = cases.engine_config(2, {**MUON, "lora": lora})
    for result in pools[2].run(adapters.train, config, STEPS, "dora"):
        assert_same(result["parameters"], plain("dora", lora=lora))
        orthogonalized = {".".join(name.split(".")[-3:-1]) for name in result["groups"].get("matrix.muon", ())}
        assert orthogonalized == ({"lora_B.default"} if lora == "b_only" else set())


@pytest.mark.parametrize("door", ["before", "after"])
def test_register_comes_before_or_after_the_adapter(door: str, pools: Pools) -> None:
    for result in pools[2].run(adapters.train, cases.engine_config(2, MUON), STEPS, "lora", door):
        assert_same(result["parameters"], plain())


@pytest.mark.parametrize("register_first", [True, False])
def test_the_trainer_trains_an_adapted_model(register_first: bool, pools: Pools, tmp_path: Path) -> None:
    """Four steps, on the same batches."""
    config = cases.engine_config(2, MUON, train_micro_batch_size_per_gpu=4)
    for result in pools[2].run(adapters.train_with_trainer, config, str(tmp_path), register_first):
        assert set(result["groups"]) == {"matrix.muon"}
        assert_same(result["parameters"], plain(steps=4))


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_may_be_switched_if_all_were_trainable_when_the_engine_was_built(stage: int, pools: Pools) -> None:
    """The one that rests keeps its weights: its matrices have no gradient."""
    for parameters in pools[2].run(adapters.switch, cases.engine_config(stage, MUON), ORDER):
        assert_same(parameters, plain(order=ORDER))
    (first, _) = pools[2].run(adapters.switch, cases.engine_config(stage, MUON), ORDER[:2])
    assert changed(first) == set(of_adapters(start("lora")))
    assert all(not tensor.any() for name, tensor in first.items() if "lora_B.other" in name)


def test_an_adapter_that_was_frozen_when_the_engine_was_built_is_refused_by_name(pools: Pools) -> None:
    with pytest.raises(RankFailure) as failure:
        pools[2].run(adapters.switch_to_a_frozen_one, cases.engine_config(2, MUON))
    assert failure.value.types == {0: "ConfigError", 1: "ConfigError"}
    assert re.search(r"lora_A\.other\.weight: was frozen when the optimizer was built", failure.value.messages[0])


def test_a_portable_checkpoint_of_an_adapted_model_resumes_on_another_stage(pools: Pools, tmp_path: Path) -> None:
    configs = (cases.engine_config(stage, MUON) for stage in (3, 2))
    for result in pools[2].run(adapters.save_and_resume, *configs, str(tmp_path / "checkpoint")):
        assert_same(result["resumed"], result["uninterrupted"])


def test_a_checkpoint_of_factors_that_adamw_trained_resumes_as_such_or_is_refused(pools: Pools, tmp_path: Path) -> None:
    """As those of version 0.1, which took nearly all factors for too thin."""
    before, now = (cases.engine_config(2, {**MUON, **lora}) for lora in ({"lora": "adamw"}, {}))
    for result in pools[2].run(adapters.save_and_resume, before, before, str(tmp_path / "same")):
        assert_same(result["resumed"], result["uninterrupted"])
    with pytest.raises(RankFailure) as failure:
        pools[2].run(adapters.save_and_resume, before, now, str(tmp_path / "other"))
    assert failure.value.types == {0: "CheckpointError", 1: "CheckpointError"}
    assert "parameter groups: got ['matrix.adamw']; allowed: this run's, ['matrix.muon']" in failure.value.messages[0]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_trained_adapter_is_saved_as_peft_saves_it(stage: int, pools: Pools, tmp_path: Path) -> None:
    """By the snippet of docs/finetuning.md; loaded by PEFT, beside the weights and merged into them."""
    logits = pools[2].run(adapters.save_adapter, cases.engine_config(stage, MUON), str(tmp_path), SNIPPETS["save"])
    for merge in (False, True):
        found = adapters.loaded(str(tmp_path), merge)
        for expected in logits:
            torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=1e-5)


@pytest.mark.parametrize("name", ["train", "switch"])
def test_the_pages_snippets_train(name: str, pools: Pools, tmp_path: Path) -> None:
    """In a folder with the configuration that `ds-optforge configs` writes."""
    assert PAGE.count("```python") == len(SNIPPETS) == 3
    assert f"```python\n{SNIPPETS['train']}```" in (ROOT / "docs" / "frameworks" / "peft.md").read_text(encoding="utf-8")
    path = shipped_configs.write("muon_lora_zero2", tmp_path)
    snippet = SNIPPETS[name].replace(path.name, str(path))
    for losses in pools[2].run(adapters.run_page, snippet, name == "switch"):
        assert losses[-1] < losses[0]


def test_without_adapters_the_key_is_refused(pools: Pools) -> None:
    with pytest.raises(RankFailure) as failure:
        pools[2].run(cases.train, copy.deepcopy(cases.engine_config(2, {**MUON, "lora": "both"})), 1)
    assert failure.value.types == {0: "ConfigError", 1: "ConfigError"}
    assert failure.value.messages[0].startswith("optimizer.params.lora: got 'both', but no parameter is an adapter's")
