"""The assumptions of ``ds-optforge plan`` against what runs: FLOPs of a model, bytes of a step, DeepSpeed's formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ds_optforge import build_optimizer
from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.forecast.catalog import MODEL_GEOMETRY, MODEL_SHAPES
from ds_optforge.forecast.command import Question, answer
from ds_optforge.forecast.forecast import forecast
from ds_optforge.forecast.hardware import DEVICES, LINKS, hardware
from ds_optforge.forecast.model_flops import Geometry, flops_per_token, geometry_of
from ds_optforge.forecast.skeletons import load
from ds_optforge.forecast.topology import Topology
from ds_optforge.routing.roles import routes_of
from tests.layers import linears, matrix, set_gradients

MUON = OptimizerConfig({"name": "muon"})
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100}
LLAMA: dict[str, Any] = {"model_type": "llama", "num_key_value_heads": 2, **TINY}
MIXTRAL: dict[str, Any] = {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4, **TINY}


class Touched(TorchDispatchMode):
    """Bytes that operators other than products read and write; what they change in place is both."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if views or "mm" in func.name() or "empty" in func.name():
            return result
        changed = False
        for value, declared in zip(args, func._schema.arguments, strict=False):
            written = declared.alias_info is not None and declared.alias_info.is_write and declared.name != "grads"
            changed = changed or written
            self.bytes += sum(map(size, tree_leaves(value))) * (2 if written else 1)
        if not changed:
            self.bytes += sum(map(size, tree_leaves(result)))
        return result


def size(value: object) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


@pytest.mark.parametrize(
    "name", ["muon", "muon_squared", "adamuon", "aurora", "normuon", "muon_hyperball", "muown", "adamw", "lion", "sgd"]
)
def test_a_step_reads_and_writes_about_what_is_predicted(name: str) -> None:
    """Within a quarter: the bytes depend on shapes, too. Square matrices of 256, in one process, with weight decay."""
    model = linears(*(matrix(256, 256, seed=seed) for seed in range(6)))
    config = {"name": name, **({} if name == "muon_hyperball" else {"weight_decay": 0.1})}
    optimizer = build_optimizer(model, config)
    for step in range(2):
        set_gradients(model.parameters(), step)
        with Touched() as touched:
            optimizer.step()
    predicted = forecast(model, OptimizerConfig(config), Topology(1, 2)).ranks[0].elementwise_bytes
    assert touched.bytes == pytest.approx(predicted, rel=0.25)


class TestModelFlops:
    def counted(self, config: dict[str, Any], tokens: int) -> tuple[Any, int]:
        """A model, and the FLOPs of its forward and backward pass over one sequence, with attention in full products."""
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        torch.manual_seed(0)
        made = transformers.AutoConfig.for_model(**config)
        model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager")
        given = torch.arange(tokens).view(1, -1) % 100
        with FlopCounterMode(display=False) as counter:
            model(input_ids=given, labels=given, use_cache=False).loss.backward()
        return model, counter.get_total_flops()

    def test_are_those_that_run(self) -> None:
        """The first layer needs no gradient of its input's table, and attention is counted as causal: a half of what ran."""
        model, counted = self.counted(LLAMA, 128)
        routes = routes_of(model, MUON)
        predicted = 128 * flops_per_token(routes, geometry_of("", model), 128)
        attention = 128 * 6 * 3 * 64 * 128
        assert counted == predicted + attention

    def test_attention_is_left_out_where_nothing_tells_its_width(self) -> None:
        assert geometry_of("", linears(matrix(8, 8))) == Geometry(0)

    def test_experts_count_as_far_as_tokens_are_sent_to_them(self) -> None:
        """2 of 4 experts by default; the router and attention see every token."""
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**MIXTRAL))
        attention = 64 * 64 + 2 * 32 * 64 + 64 * 64
        experts, router, head = 2 * 3 * 64 * 96, 4 * 64, 100 * 64
        expected = 6 * (3 * (attention + experts + router) + head) + 6 * 3 * 64 * 512
        assert flops_per_token(routes_of(model, MUON), geometry_of("", model), 512) == expected

    def test_a_tied_table_counts_once_as_the_head(self) -> None:
        """GPT-2: 6 times its 12 layers of 12 d^2 and the table of 50,257 rows, without the positions."""
        expected = 6 * (12 * 12 * 768**2 + 50257 * 768) + 6 * 12 * 768 * 1024
        model = load("gpt2")
        assert flops_per_token(routes_of(model, MUON), geometry_of("gpt2", model), 1024) == expected

    def test_published_models_have_their_published_active_parameters(self) -> None:
        """Mixtral 8x7B uses 12.9 billion for a token (arXiv 2401.04088), Kimi K2 32 billion (arXiv 2507.20534)."""
        for name, active, table in (("mixtral-8x7b", 12.9e9, 32000 * 4096), ("kimi-k2", 32e9, 163840 * 7168)):
            model = load(name)
            per_token = flops_per_token(routes_of(model, MUON), geometry_of(name, model), 0)
            assert per_token / 6 + table == pytest.approx(active, rel=0.03)

    def test_every_model_of_the_catalog_has_its_geometry(self) -> None:
        assert MODEL_GEOMETRY.keys() == MODEL_SHAPES.keys()


class TestHardware:
    def test_up_to_eight_ranks_are_taken_to_share_a_node(self) -> None:
        """450 GB/s each way between H100s, 400 Gbit/s beyond, of which 70% are reached."""
        assert hardware("h100", None, 8).link_gbps == pytest.approx(0.7 * 450 * 8)
        assert hardware("h100", None, 9).link_gbps == pytest.approx(0.7 * 400)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("link", LINKS)
    def test_every_device_goes_with_every_link(self, device: str, link: str) -> None:
        found = hardware(device, link, 16)
        assert 0 < found.tflops < DEVICES[device].tflops
        assert found.title == f"{device}, {link}"

    def test_what_is_given_is_taken_as_reached(self) -> None:
        found = hardware("a100", "ethernet", 16, 0.3, 123.0, 45.0)
        assert (found.tflops, found.link_gbps, found.title) == (123.0, 45.0, "a100, 45 Gbit/s")
        assert found.model_tflops == pytest.approx(0.3 * 312)


class TestAnswer:
    def test_a_hub_folder_is_planned_like_its_configuration(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers", reason="transformers is not installed")
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
        folder, file = (answer(Question(str(path), 2, 3)).plain() for path in (tmp_path, tmp_path / "config.json"))
        assert {**folder, "model": ""} == {**file, "model": ""}

    def test_beneath_the_named_tokens_a_step_costs_more_than_the_share(self) -> None:
        (found,) = (plan := answer(Question("llama3-8b", 8, 3))).stages
        tokens = found.tokens_at(0.05, plan.workload)
        for factor, more in ((0.99, True), (1.01, False)):
            (then,) = answer(Question("llama3-8b", 8, 3, tokens=int(factor * tokens))).stages
            assert (then.over_adamw(then.chosen) > 0.05) == more

    def test_memory_of_llama_3_8b_on_zero_3(self) -> None:
        """Of 8.03 billion parameters on 8 ranks: 6 bytes of weights, 6 of gradients, Muon 4 and AdamW 8 of state."""
        (found,) = answer(Question("llama3-8b", 8, 3)).stages
        muon, everything = 6.979e9 / 8, 8.030e9 / 8
        memory = found.chosen.memory
        assert memory.parameters == pytest.approx(6 * everything, rel=1e-3)
        assert memory.gradients == pytest.approx(2 * everything + 4 * muon, rel=1e-3)
        assert memory.state == pytest.approx(4 * muon + 8 * (everything - muon), rel=1e-3)
        assert found.adamw.memory.state == pytest.approx(8 * everything, rel=1e-3)

    def test_a_model_in_float32_has_weights_and_gradients_of_four_bytes(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        optimizer = {"type": "OptForge", "params": {"name": "muon"}}
        path.write_text(json.dumps({"optimizer": optimizer}))
        (single,) = answer(Question("gpt2", 8, 1, config=str(path))).stages
        path.write_text(json.dumps({"optimizer": optimizer, "bf16": {"enabled": True}}))
        (half,) = answer(Question("gpt2", 8, 1, config=str(path))).stages
        numel = single.predicted.ranks[0].model_numel
        assert single.chosen.memory.parameters - half.chosen.memory.parameters == 2 * numel
