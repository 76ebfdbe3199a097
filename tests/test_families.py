"""The routing of published models, family by family: tests/data/families.txt is the specification, reviewed line by line.

``python tests/families.py`` writes it anew; a difference in ``git diff`` is a change of what users' weights get.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from ds_optforge import ConfigError, build_optimizer
from ds_optforge.config.optimizer import OptimizerConfig
from ds_optforge.routing.fused import Fused
from ds_optforge.routing.roles import routes_of
from ds_optforge.routing.tags import tag, tags_of
from tests import families

SPECIFIED = {
    name: lines
    for name, _, lines in (part.partition("\n") for part in families.SNAPSHOT.read_text(encoding="utf-8").split("# ")[1:])
}


def test_every_family_is_specified() -> None:
    assert list(SPECIFIED) == list(families.FAMILIES)
    assert len(SPECIFIED) >= 50


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_weights_of_a_family_get_what_is_specified(family: str) -> None:
    assert families.table(family) == SPECIFIED[family].split("\n")[: len(families.table(family))]
    assert SPECIFIED[family].strip().count("\n") + 1 == len(families.table(family))


def rows_of(fused: Fused, index: int) -> list[int]:
    """The rows of one of the matrices that a weight joins, by the words of `Fused`."""
    if not fused.block:
        start = sum(fused.parts[:index])
        return list(range(start, start + fused.parts[index]))
    turns = min(fused.heads) if max(fused.heads) > 1 else fused.parts[0] // fused.block
    in_turn = [part // turns for part in fused.parts]
    start, length = sum(in_turn[:index]), sum(in_turn)
    return [turn * length + start + row for turn in range(turns) for row in range(in_turn[index])]


def without(model: nn.Module, name: str, fused: Fused, index: int, run: Callable[[nn.Module], Tensor]) -> Tensor:
    """What the model computes with one of the matrices that a weight joins, and its bias, set to zero."""
    weight = model.get_parameter(name)
    bias = dict(model.named_parameters()).get(name.removesuffix("weight") + "bias")
    kept = [(tensor, tensor.detach().clone()) for tensor in (weight, bias) if tensor is not None]
    outputs = -1 if tags_of(weight).kind.transposed else 0
    with torch.no_grad():
        for tensor, _ in kept:
            tensor.index_fill_(outputs if tensor is weight else 0, torch.tensor(rows_of(fused, index)), 0.0)
        found = run(model)
        for tensor, values in kept:
            tensor.copy_(values)
    return found


SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
TOKENS = torch.arange(12).view(1, 12)
LANGUAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "Phi-3": ("Phi3", {**SIZES, "num_key_value_heads": 2, "intermediate_size": 64, "pad_token_id": 0}),
    "GPT-NeoX": ("GPTNeoX", {**SIZES, "intermediate_size": 64}),
    "BLOOM": ("Bloom", {"vocab_size": 50, "hidden_size": 32, "n_layer": 1, "n_head": 4}),
    "Falcon, several queries": ("Falcon", {**SIZES, "multi_query": True}),
    "Falcon, a key each": ("Falcon", {**SIZES, "multi_query": False}),
    "Falcon, groups": ("Falcon", {**SIZES, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "MPT": ("Mpt", {"vocab_size": 50, "d_model": 32, "n_heads": 4, "n_layers": 1}),
    "GPT-2": ("GPT2", {"vocab_size": 50, "n_embd": 32, "n_layer": 1, "n_head": 4}),
    "Persimmon": ("Persimmon", {**SIZES, "intermediate_size": 64, "qk_layernorm": False}),
}


def language_model(family: str) -> tuple[nn.Module, str]:
    """A model of one layer with larger weights than it is born with, and the name of its fused attention weight."""
    kind, sizes = LANGUAGE[family]
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(getattr(hf, f"{kind}Config")(**sizes)).eval()
    tag(model)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    names = [name for name, parameter in model.named_parameters() if (f := tags_of(parameter).kind.fused) and "q" in f.names]
    (name,) = (name for name in names if len(tags_of(model.get_parameter(name)).kind.fused.names) == 3)  # type: ignore[union-attr]
    return model, name


@pytest.mark.parametrize("family", LANGUAGE)
def test_q_k_and_v_are_where_auto_looks_for_them(family: str) -> None:
    """Zero queries and zero keys both make attention uniform; zero values make it nothing, as a zero output projection does."""

    def run(model: nn.Module) -> Tensor:
        logits: Tensor = model(TOKENS).logits
        return logits

    model, name = language_model(family)
    fused = tags_of(model.get_parameter(name)).kind.fused
    assert fused is not None
    assert fused.names == ("q", "k", "v")
    without_q, without_k, without_v = (without(model, name, fused, index, run) for index in range(3))
    torch.testing.assert_close(without_q, without_k)
    attention = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    handle = attention.register_forward_hook(lambda module, given, out: (torch.zeros_like(out[0]), *out[1:]))
    dense = next(m for n, m in attention.named_children() if n in ("dense", "o_proj", "out_proj", "c_proj"))
    handle.remove()
    bias = getattr(dense, "bias", None)
    handle = dense.register_forward_hook(lambda module, given, out: torch.zeros_like(out) + (0 if bias is None else bias))
    torch.testing.assert_close(without_v, run(model))
    handle.remove()
    assert (run(model) - without_v).abs().max() > 0.01
    assert (run(model) - without_q).abs().max() > 0.01
    assert (without_q - without_v).abs().max() > 0.01


def test_gate_and_up_are_halves() -> None:
    """A zero gate and a zero up both make the MLP nothing."""
    model, _ = language_model("Phi-3")
    name = next(name for name, _ in model.named_parameters() if "gate_up_proj" in name)
    fused = tags_of(model.get_parameter(name)).kind.fused
    mlp = model.get_submodule(name.removesuffix(".gate_up_proj.weight"))
    assert fused == Fused(("gate", "up"), (64, 64), (1, 1))
    x = torch.randn(3, 32)
    for index in range(2):
        assert without(model, name, fused, index, lambda _: mlp(x)).abs().max() == 0


@pytest.mark.parametrize("kind", ["gpt_oss", "llama4", "mixtral"])
def test_gate_and_up_of_experts(kind: str) -> None:
    """By turns in gpt-oss, one after the other elsewhere; stored (in, out) in gpt-oss and Llama 4."""
    sizes = {"hidden_size": 8, "intermediate_size": 6, "num_local_experts": 2}
    if kind == "gpt_oss":
        experts = hf.models.gpt_oss.modeling_gpt_oss.GptOssExperts(hf.GptOssConfig(**sizes))
    elif kind == "llama4":
        experts = hf.models.llama4.modeling_llama4.Llama4TextExperts(hf.Llama4TextConfig(**sizes))
    else:
        experts = hf.models.mixtral.modeling_mixtral.MixtralExperts(hf.MixtralConfig(**sizes))
    model = nn.ModuleDict({"experts": experts})
    tag(model)
    found = tags_of(experts.gate_up_proj).kind
    assert found.transposed is (kind != "mixtral")
    assert found.fused == Fused(("gate", "up"), (6, 6), (1, 1), 1 if kind == "gpt_oss" else 0)


def test_the_gates_of_recurrent_networks() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(5, 6, proj_size=3), "gru": nn.GRU(5, 7), "rnn": nn.RNN(5, 8)})
    tag(model)
    found = {name: tags_of(parameter).kind.fused for name, parameter in model.named_parameters() if parameter.dim() > 1}
    parts = {name: fused.parts if fused else None for name, fused in found.items()}
    assert parts == {
        "lstm.weight_ih_l0": (6,) * 4,
        "lstm.weight_hh_l0": (6,) * 4,
        "lstm.weight_hr_l0": None,
        "gru.weight_ih_l0": (7,) * 3,
        "gru.weight_hh_l0": (7,) * 3,
        "rnn.weight_ih_l0": None,
        "rnn.weight_hh_l0": None,
    }


def blocks(family: str, name: str, **config: Any) -> Sequence[int]:
    """The rows of each matrix of one weight of a family."""
    return [rows for rows, _ in stepped(family, name, **config)]


def stepped(family: str, name: str, **config: Any) -> Sequence[tuple[int, int]]:
    """The stored (rows, cols) of each matrix of one weight of a family."""
    routes = routes_of(families.build(family), OptimizerConfig({**families.CONFIG, **config}))
    (found,) = (route for route in routes if route.name == name)
    return list(found.stepped)


class TestAuto:
    """``"split": "auto"`` and ``"heads": "auto"``, at the top level or in an override."""

    QKV = "model.layers.0.self_attn.qkv_proj.weight"

    def test_split_cuts_what_is_known_to_be_joined(self) -> None:
        """Phi-3 mini: 32 heads of 96, keys and values alike; an MLP of 8192."""
        assert blocks("Phi-3 mini", self.QKV, split="auto") == [3072] * 3
        assert blocks("Phi-3 mini", "model.layers.0.mlp.gate_up_proj.weight", split="auto") == [8192] * 2
        assert blocks("Phi-3 mini", "model.layers.0.mlp.down_proj.weight", split="auto") == [3072]

    def test_heads_cuts_attention_alone(self) -> None:
        assert blocks("Phi-3 mini", self.QKV, heads="auto") == [96] * 96
        assert blocks("Phi-3 mini", "model.layers.0.mlp.gate_up_proj.weight", heads="auto") == [16384]

    def test_heads_of_grouped_queries(self) -> None:
        """Llama 3 8B: 32 heads of 128 for queries, 8 for keys and values."""
        layer = "model.layers.0.self_attn"
        assert blocks("Llama 3 8B", f"{layer}.q_proj.weight", heads="auto") == [128] * 32
        assert blocks("Llama 3 8B", f"{layer}.k_proj.weight", heads="auto") == [128] * 8
        assert blocks("Llama 3 8B", f"{layer}.o_proj.weight", heads="auto") == [4096]

    def test_latent_attention(self) -> None:
        """DeepSeek-V3: 128 heads of 128 + 64 for queries, 128 + 128 for keys and values; a latent of 512, a rotary 64."""
        layer = "model.layers.0.self_attn"
        assert blocks("DeepSeek-V3", f"{layer}.q_b_proj.weight", heads="auto") == [192] * 128
        assert blocks("DeepSeek-V3", f"{layer}.kv_b_proj.weight", heads="auto") == [256] * 128
        assert blocks("DeepSeek-V3", f"{layer}.kv_a_proj_with_mqa.weight", split="auto") == [512, 64]

    def test_heads_that_lie_by_turns(self) -> None:
        """GPT-NeoX 20B: 64 heads of 96, q, k and v of each; Falcon 40B: 128 + 2 * 8 heads of 64."""
        name = "gpt_neox.layers.0.attention.query_key_value.weight"
        assert blocks("GPT-NeoX 20B", name, heads="auto") == [96] * 192
        name = "transformer.h.0.self_attention.query_key_value.weight"
        assert blocks("Falcon 40B", name, heads="auto") == [64] * 144

    def test_parts_that_are_no_ranges(self) -> None:
        """GPT-2's q, k and v are columns; GPT-NeoX's take turns, as do gate and up of gpt-oss, a bank of columns."""
        assert stepped("GPT-2", "transformer.h.0.attn.c_attn.weight", split="auto") == [(768, 768)] * 3
        assert stepped("GPT-NeoX 20B", "gpt_neox.layers.0.attention.query_key_value.weight", split="auto") == [(6144, 6144)] * 3
        assert stepped("gpt-oss 20B", "model.layers.0.mlp.experts.gate_up_proj", split="auto") == [(2880, 2880)] * 64

    def test_an_override_asks_for_some(self) -> None:
        overrides = [{"match": "qkv", "split": "auto"}]
        assert blocks("Phi-3 mini", self.QKV, overrides=overrides) == [3072] * 3
        assert blocks("Phi-3 mini", "model.layers.0.mlp.gate_up_proj.weight", overrides=overrides) == [16384]

    def test_experts_are_cut_one_by_one(self) -> None:
        """Mixtral: 8 experts, gate and up of 14336 rows."""
        assert blocks("Mixtral 8x7B", "model.layers.0.mlp.experts.gate_up_proj", split="auto") == [14336] * 16

    @pytest.mark.parametrize(
        ("family", "match", "key", "why"),
        [
            ("Llama 3 8B", "down_proj", "split", "neither its module nor the model's configuration tells what it joins"),
            ("GPT-2", "c_attn", "heads", "q, k, v are no ranges of rows"),
            ("Falcon 40B", "query_key_value", "split", "q, k, v by turns are no ranges of rows"),
            ("Phi-3 mini", "gate_up_proj", "heads", "gate, up have no heads"),
        ],
    )
    def test_an_override_that_nothing_answers_is_an_error(self, family: str, match: str, key: str, why: str) -> None:
        config = OptimizerConfig({**families.CONFIG, "overrides": [{"match": match, key: "auto"}]})
        with pytest.raises(ConfigError) as error:
            routes_of(families.build(family), config)
        assert f"overrides[0].{key}: got 'auto', but {why}" in str(error.value)
        assert match in str(error.value)


def test_a_bank_may_be_said_to_be_stored_the_other_way() -> None:
    """The update's scale is that of its outputs by its inputs: 8 outputs of 2 inputs against 2 of 8."""
    changes = []
    for stored in ("out_in", "in_out"):
        model = nn.Module()
        model.bank = nn.Parameter(torch.zeros(3, 2, 8))
        config = {"name": "muon", "lr": 1.0, "overrides": [{"match": "bank", "stored": stored}]}
        optimizer = build_optimizer(model, config)
        model.bank.grad = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        changes.append(model.bank.detach().clone())
    torch.testing.assert_close(changes[1], changes[0] * math.sqrt(8 / 2), rtol=1e-2, atol=1e-3)
