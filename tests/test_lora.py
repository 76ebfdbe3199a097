"""Which of an adapter's parameters a matrix rule takes, on PEFT's own layers and on those of other packages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ds_optforge import ConfigError, build_optimizer, explain
from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.routing.roles import routes_of
from tests.layers import linears, matrix

peft = pytest.importorskip("peft", reason="peft is not installed (extra 'test')")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra 'hf')")

MUON = {"name": "muon", "lr": 0.02, "adamw": {"lr": 1e-3}}
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama(**settings: Any) -> nn.Module:
    config = transformers.LlamaConfig(vocab_size=500, num_hidden_layers=1, **SHAPE)
    model: nn.Module = peft.get_peft_model(transformers.LlamaForCausalLM(config), peft.LoraConfig(**{"r": 4, **settings}))
    return model


def routed(model: nn.Module, **params: Any) -> dict[str, str]:
    """Role and rule of each trained parameter, by its name from the adapted layer on."""
    found = {}
    for route in routes_of(model, OptimizerConfig({**MUON, **params})):
        name = route.name.removeprefix("base_model.model.").removeprefix("model.").removeprefix("layers.0.")
        found[name.replace(".default", "").removesuffix(".weight")] = f"{route.role}.{route.settings.rule}"
    return found


@pytest.mark.parametrize(
    ("lora", "rules"),
    [
        ({}, ("muon", "muon")),
        ({"lora": "both"}, ("muon", "muon")),
        ({"lora": "both", "max_aspect_ratio": 2.0}, ("muon", "muon")),
        ({"lora": "b_only"}, ("adamw", "muon")),
        ({"lora": "adamw"}, ("adamw", "adamw")),
    ],
)
def test_the_factors_of_linear_maps(lora: dict[str, Any], rules: tuple[str, str]) -> None:
    """4 x 128 and 64 x 4, beyond any usual limit of the aspect ratio."""
    found = routed(llama(target_modules=["down_proj"]), **lora)
    assert found == {"mlp.down_proj.lora_A": f"matrix.{rules[0]}", "mlp.down_proj.lora_B": f"matrix.{rules[1]}"}


def test_a_factor_of_one_row_has_nothing_to_orthogonalize() -> None:
    found = routed(llama(target_modules=["q_proj"], r=1))
    assert found == {"self_attn.q_proj.lora_A": "matrix.adamw", "self_attn.q_proj.lora_B": "matrix.adamw"}


def test_doras_magnitude_is_a_scalar_without_decay() -> None:
    found = routed(llama(target_modules=["q_proj"], use_dora=True))
    assert found["self_attn.q_proj.lora_magnitude_vector"] == "scalar.adamw"
    model = peft.get_peft_model(nn.Sequential(nn.Conv2d(8, 16, 3)), peft.LoraConfig(r=2, target_modules=["0"], use_dora=True))
    assert routed(model) == {
        "0.lora_A": "matrix.muon",
        "0.lora_B": "matrix.muon",
        "0.lora_magnitude_vector": "scalar.adamw",
    }


def test_adapters_of_embeddings_and_of_tokens_are_elementwise() -> None:
    assert routed(llama(target_modules=["embed_tokens"])) == {
        "embed_tokens.lora_embedding_A": "embedding.adamw",
        "embed_tokens.lora_embedding_B": "embedding.adamw",
    }
    found = routed(llama(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2, 3]}))
    assert found["embed_tokens.token_adapter.trainable_tokens_delta"] == "embedding.adamw"


def test_whole_layers_that_are_trained_beside_the_adapters_keep_their_roles() -> None:
    found = routed(llama(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    assert found["embed_tokens.modules_to_save"] == "embedding.adamw"
    assert found["lm_head.modules_to_save"] == "unembedding.adamw"


def test_a_classifier_that_peft_trains_whole_is_an_output() -> None:
    config = transformers.LlamaConfig(vocab_size=50, num_hidden_layers=1, num_labels=20, pad_token_id=0, **SHAPE)
    lora = peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["q_proj"])
    model = peft.get_peft_model(transformers.LlamaForSequenceClassification(config), lora)
    assert routed(model)["score.modules_to_save"] == "unembedding.adamw"


def test_the_factors_beside_an_output_are_factors() -> None:
    found = routed(llama(target_modules=["lm_head"]))
    assert found == {"lm_head.lora_A": "matrix.muon", "lm_head.lora_B": "matrix.muon"}


def test_fused_adapters_of_experts_are_left_to_adamw() -> None:
    """PEFT keeps those of four experts in one pair of factors, B's column by column."""
    config = transformers.MixtralConfig(vocab_size=50, num_hidden_layers=1, num_local_experts=4, **SHAPE)
    model = transformers.MixtralForCausalLM(config)
    parameters = ["mlp.experts.gate_up_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=parameters))
    assert routed(adapted, lora="both") == {
        "self_attn.q_proj.lora_A": "matrix.muon",
        "self_attn.q_proj.lora_B": "matrix.muon",
        "mlp.experts.lora_A": "matrix.adamw",
        "mlp.experts.lora_B": "matrix.adamw",
    }


@pytest.mark.parametrize(("a", "b"), [("lora_A", "lora_B"), ("lora_a", "lora_b"), ("lora_down", "lora_up")])
def test_other_packages_names(a: str, b: str) -> None:
    """As parameters of the layer (loralib) and as layers in it (kohya-ss, torchtune)."""
    bare, layers = nn.Linear(64, 64, bias=False).requires_grad_(False), nn.Module()
    bare.register_parameter(a, nn.Parameter(matrix(2, 64)))
    bare.register_parameter(b, nn.Parameter(matrix(64, 2)))
    layers.add_module(a, nn.Linear(64, 2, bias=False))
    layers.add_module(b, nn.Linear(2, 64, bias=False))
    for model in (nn.ModuleDict({"q": bare}), nn.ModuleDict({"q": layers})):
        assert routed(model, lora="b_only") == {f"q.{a}": "matrix.adamw", f"q.{b}": "matrix.muon"}


def test_loralibs_factors_of_an_embedding_are_elementwise() -> None:
    embedding = nn.Embedding(50, 8).requires_grad_(False)
    embedding.register_parameter("lora_A", nn.Parameter(matrix(2, 50)))
    embedding.register_parameter("lora_B", nn.Parameter(matrix(8, 2)))
    assert set(routed(nn.ModuleDict({"tokens": embedding})).values()) == {"embedding.adamw"}


def test_an_override_of_a_factor_is_stronger() -> None:
    """LoRA+ gives B a larger rate; a rule named for a parameter is used whatever ``lora`` says."""
    model = llama(target_modules=["q_proj"])
    overrides = [{"match": "lora_B", "lr": 0.3}, {"match": "lora_A", "name": "muon"}]
    found = routes_of(model, OptimizerConfig({**MUON, "lora": "adamw", "overrides": overrides}))
    assert {route.name.split(".")[-3]: (route.settings.rule, route.settings.lr) for route in found} == {
        "lora_A": ("muon", 0.02),
        "lora_B": ("adamw", 0.3),
    }


def test_explain_says_why() -> None:
    text = explain(llama(target_modules=["q_proj"]), {**MUON, "lora": "b_only"})
    assert "factor A of an adapter, lora: b_only" in " ".join(text.split())
    assert "factor B of an adapter" in " ".join(text.split())


class TestRefusals:
    def test_the_key_without_adapters(self) -> None:
        with pytest.raises(ConfigError, match=r"params\.lora: got 'b_only', but no parameter is an adapter's .*lora_A"):
            build_optimizer(linears(matrix(8, 12)), {**MUON, "lora": "b_only"})
        with pytest.raises(ConfigError, match=r"params\.lora: got 'b_only'"):
            explain(linears(matrix(8, 12)), {**MUON, "lora": "b_only"})

    def test_a_word_that_is_none(self) -> None:
        with pytest.raises(ConfigError, match=r"params\.lora: got 'a_only'.*'both', 'b_only' or 'adamw'"):
            OptimizerConfig({**MUON, "lora": "a_only"})

    def test_a_rule_that_takes_every_parameter_itself(self) -> None:
        with pytest.raises(ConfigError, match=r"params\.lora: got 'both' with 'adamw', which is no matrix rule; allowed: none"):
            OptimizerConfig({"name": "adamw", "lora": "both"})


def test_both_factors_train_as_orthogonalization_says() -> None:
    """One step at rank 2 from a B that is not zero: the update of either factor has two singular values of lr."""
    torch.manual_seed(0)
    model = llama(target_modules=["q_proj"], r=2)
    factors = {name.split(".")[-3]: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    nn.init.normal_(factors["lora_B"])
    before = {name: parameter.detach().clone() for name, parameter in factors.items()}
    exact = {"coefficients": "deepseek_v4", "dtype": "float32", "scale": "none"}
    params = {**MUON, "orthogonalization": exact, "sharding": {"wire_dtype": "float32"}}
    optimizer = build_optimizer(model, params)
    tokens = torch.arange(24).view(2, 12)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    for name, parameter in factors.items():
        values = torch.linalg.svdvals(parameter.detach() - before[name])
        torch.testing.assert_close(values, torch.full((2,), 0.02), rtol=2e-3, atol=0)
