"""QK-clip in one process: what it sees, what it rescales, what it leaves alone and what it refuses."""

import copy
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ds_optforge
from ds_optforge import ConfigError, OptForge, build_optimizer
from ds_optforge.step.logits import QUERIES, Kept
from tests import attentions
from tests.attentions import FAMILIES
from tests.launches import Launches
from tests.oracles import EXACT

PACKAGE = Path(ds_optforge.__file__).parent
STANDING = {"name": "muon", "lr": 0.0, "adamw": {"lr": 0.0}}  # what changes is QK-clip's work
MUON = {"name": "muon", "lr": 0.02, "adamw": {"lr": 1e-3, "eps": 1e-5}, **EXACT}
NOWHERE = 1e9  # a tau that no logit reaches


def built(model: nn.Module, tau: float, every: int = 1, params: Mapping[str, Any] = STANDING) -> OptForge:
    return build_optimizer(model, {**params, "qk_clip": {"tau": tau, "every": every}})


def step(model: nn.Module, optimizer: OptForge, tokens: Tensor, **inputs: Any) -> dict[str, Any]:
    """The logits that the step has seen."""
    model(input_ids=tokens, labels=tokens, **inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer.attention_logits


def values(seen: Mapping[str, Any]) -> list[float]:
    """Of all heads, in order."""
    return [value for found in seen["max"].values() for value in found]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def seen_by(model: nn.Module, tokens: Tensor, **inputs: Any) -> list[float]:
    return values(step(model, built(model, NOWHERE), tokens, **inputs))


class TestWhatItSees:
    @pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek"])
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_is_the_largest_logit_of_each_key_head(self, family: str, implementation: str) -> None:
        """In float32, of products of 10 elements."""
        model, tokens = FAMILIES[family](layers=1), attentions.batch(0)
        model.set_attn_implementation(implementation)
        expected = attentions.in_float64(model, tokens)
        assert len(expected) == (2 if family == "llama" else 3)
        assert seen_by(model, tokens) == pytest.approx(expected.tolist(), rel=1e-5)

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_is_of_pairs_that_attend_to_each_other(self, implementation: str) -> None:
        """Padding on the right changes nothing but that its own queries attend to the tokens before them."""
        model, tokens = attentions.llama(), attentions.batch(0)
        model.set_attn_implementation(implementation)
        mask = torch.ones_like(tokens)
        mask[:, 10:] = 0
        tokens[:, 10:] = 7
        found = seen_by(model, tokens, attention_mask=mask)
        tokens[:, 10:] = 7
        alone = seen_by(model, tokens[:, :10])
        # Products of another shape are summed in another order: some units in the last place of float32.
        assert all(padded >= short * (1 - 1e-6) for padded, short in zip(found, alone, strict=True))
        model.set_attn_implementation("eager" if implementation == "sdpa" else "sdpa")
        assert seen_by(model, tokens, attention_mask=mask) == pytest.approx(found, rel=1e-5)

    def test_is_what_all_micro_batches_since_the_last_step_have_shown(self) -> None:
        model, parts = attentions.llama(layers=1), [attentions.batch(0), attentions.batch(1)]
        optimizer = built(model, NOWHERE)
        model(input_ids=parts[0], labels=parts[0]).loss.backward()
        seen = values(step(model, optimizer, parts[1]))
        expected = torch.stack([attentions.in_float64(model, part) for part in parts]).amax(0)
        assert seen == pytest.approx(expected.tolist(), rel=1e-5)
        last = values(step(model, optimizer, parts[1]))
        assert last == pytest.approx(attentions.in_float64(model, parts[1]).tolist(), rel=1e-5)

    def test_is_nothing_of_a_forward_pass_without_gradients(self) -> None:
        model = attentions.llama(layers=1)
        optimizer = built(model, NOWHERE)
        with torch.no_grad():
            model(input_ids=attentions.batch(0))
        seen = values(step(model, optimizer, attentions.batch(1)))
        assert seen == pytest.approx(attentions.in_float64(model, attentions.batch(1)).tolist(), rel=1e-5)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_is_the_same_with_activation_checkpointing(self, reentrant: bool) -> None:
        model = attentions.llama()
        expected = seen_by(model, attentions.batch(0))
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert seen_by(model.train(), attentions.batch(0)) == expected

    def test_is_of_a_sample_of_queries_in_long_sequences_as_a_log_line_says(self, caplog: pytest.LogCaptureFixture) -> None:
        """Of 300 tokens every third: 0, 3, ... in the first step, then 1, 4, ..., then 2, 5, ...; together they are all."""
        model, tokens = attentions.llama(layers=1), attentions.batch(0, size=2, tokens=300)
        assert QUERIES == 128
        optimizer = built(model, NOWHERE)
        with caplog.at_level(logging.INFO, "ds_optforge"):
            turns = torch.tensor([values(step(model, optimizer, tokens)) for _ in range(3)])
        assert sum("of a sequence of 300 tokens" in record.getMessage() for record in caplog.records) == 1
        expected = attentions.in_float64(model, tokens).float()
        assert torch.allclose(turns.amax(0), expected, rtol=1e-5)
        assert (turns <= expected * (1 + 1e-5)).all()
        assert not torch.allclose(turns[0], turns[1], rtol=1e-5)

    def test_is_nothing_that_is_not_finite(self) -> None:
        """A batch whose queries are NaN would have a factor of NaN."""
        model = attentions.Own(joined=False)
        optimizer = built(model, NOWHERE)
        hook = model.attention.to_q.register_forward_hook(lambda module, given, found: found * float("nan"))
        with pytest.raises(RuntimeError, match="its gradient is not finite; nothing was changed"):
            step(model, optimizer, attentions.batch(0))
        hook.remove()
        optimizer.zero_grad()
        assert all(torch.isfinite(torch.tensor(values(step(model, optimizer, attentions.batch(0))))))


class TestWhatItRescales:
    @pytest.mark.promise("qk-clip-bound")
    @pytest.mark.parametrize("family", FAMILIES)
    def test_makes_the_largest_logit_of_a_head_that_of_tau_and_of_no_other_head(self, family: str) -> None:
        """The same batch again, in the only layer: float32 rounds the weights once."""
        model, tokens = FAMILIES[family](layers=1), attentions.batch(0)
        before = torch.tensor(seen_by(model, tokens))
        tau = float(before.sort().values[-2:].mean())  # between the two largest
        optimizer = built(model, tau)
        step(model, optimizer, tokens)
        after = torch.tensor(values(step(model, optimizer, tokens)))
        assert (before > tau).sum() == 1
        assert torch.allclose(after, before.clamp(max=tau), rtol=1e-5)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_changes_no_weight_but_those_of_queries_and_keys(self, family: str) -> None:
        names = {
            "llama": {"q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias"},
            "gpt2": {"c_attn.weight", "c_attn.bias"},
            "neox": {"query_key_value.weight", "query_key_value.bias"},
            "deepseek": {"q_b_proj.weight", "kv_b_proj.weight"},
            "bert": {"query.weight", "query.bias", "key.weight", "key.bias"},
            "own": {"to_q.weight", "to_q.bias", "to_k.weight", "to_k.bias"},
            "own_joined": {"mixed.weight", "mixed.bias"},
        }
        model = FAMILIES[family](layers=1)
        before = weights(model)
        step(model, built(model, 1e-3), attentions.batch(0))
        changed = {".".join(name.split(".")[-2:]) for name, weight in weights(model).items() if not weight.equal(before[name])}
        assert changed == names[family]

    def test_multiplies_the_rows_of_shared_keys_and_of_all_their_queries_by_the_root(self) -> None:
        """Llama: 4 heads of queries of 10 rows, of which 2 share a key head. tau is half of the larger S: gamma is (1/2, 1)."""
        model, tokens = attentions.llama(layers=1), attentions.batch(0)
        largest = attentions.in_float64(model, tokens)
        head, tau = int(largest.argmax()), float(largest.max()) / 2
        tau = max(tau, float(largest.min()))
        gamma = torch.ones(2, dtype=torch.float64)
        gamma[head] = tau / largest[head]
        before = weights(model)
        step(model, built(model, tau), tokens)
        attention = "model.layers.0.self_attn."
        for name, rows in (("q_proj", 20), ("k_proj", 10)):
            factors = gamma.sqrt().repeat_interleave(rows)
            self._scaled(model, before, f"{attention}{name}.weight", factors[:, None])
            self._scaled(model, before, f"{attention}{name}.bias", factors)

    def test_multiplies_the_columns_of_a_weight_that_is_stored_in_out(self) -> None:
        """GPT-2: 3 heads of 12 columns of q, then as many of k, then v."""
        model, tokens = attentions.gpt2(layers=1), attentions.batch(0)
        gamma = 0.5 / attentions.in_float64(model, tokens).clamp(min=0.5)
        before = weights(model)
        step(model, built(model, 0.5), tokens)
        factors = torch.cat([gamma.sqrt().repeat_interleave(12).repeat(2), torch.ones(36)])
        self._scaled(model, before, "transformer.h.0.attn.c_attn.weight", factors)
        self._scaled(model, before, "transformer.h.0.attn.c_attn.bias", factors)

    def test_multiplies_the_rotary_queries_of_latent_attention_by_the_whole_factor(self) -> None:
        """DeepSeek: 6 rows of q by sqrt(gamma), 4 by gamma; 6 rows of k by sqrt(gamma), 8 of v not; the shared key not."""
        model, tokens = attentions.deepseek(layers=1), attentions.batch(0)
        gamma = 0.2 / attentions.in_float64(model, tokens).clamp(min=0.2)
        before = weights(model)
        step(model, built(model, 0.2), tokens)
        of_query = torch.cat([torch.tensor([g**0.5] * 6 + [g] * 4) for g in gamma.tolist()])
        of_key = torch.cat([torch.tensor([g**0.5] * 6 + [1.0] * 8) for g in gamma.tolist()])
        assert (gamma < 1).all()
        self._scaled(model, before, "model.layers.0.self_attn.q_b_proj.weight", of_query[:, None])
        self._scaled(model, before, "model.layers.0.self_attn.kv_b_proj.weight", of_key[:, None])
        shared = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
        assert weights(model)[shared].equal(before[shared])

    def _scaled(self, model: nn.Module, before: Mapping[str, Tensor], name: str, factors: Tensor) -> None:
        """To 1e-6, since logits and weights are float32; S itself is seen to 1e-5."""
        assert torch.allclose(weights(model)[name].double(), before[name].double() * factors, rtol=1e-5), name

    def test_leaves_momentum_alone(self) -> None:
        model, other = attentions.llama(), attentions.llama()
        clipping, plain = built(model, 1e-3, params=MUON), build_optimizer(other, MUON)
        step(model, clipping, attentions.batch(0))
        step(other, plain, attentions.batch(0))
        for mine, its in zip(clipping.state.values(), plain.state.values(), strict=True):
            assert all(torch.equal(mine[key], its[key]) for key in its if isinstance(its[key], Tensor))

    @pytest.mark.promise("qk-clip-otherwise")
    def test_changes_no_bit_where_no_logit_is_larger_than_tau(self) -> None:
        model, other = attentions.llama(), attentions.llama()
        clipping, plain = built(model, NOWHERE, params=MUON), build_optimizer(other, MUON)
        for number in range(3):
            step(model, clipping, attentions.batch(number))
            step(other, plain, attentions.batch(number))
        assert all(torch.equal(mine, its) for mine, its in zip(model.parameters(), other.parameters(), strict=True))

    def test_reaches_weights_that_are_not_row_major_and_of_half_precision(self) -> None:
        """A weight whose memory is that of its transpose; 2^-8 is bfloat16's."""
        model, tokens = attentions.Own(joined=False).bfloat16(), attentions.batch(0)
        weight = model.attention.to_q.weight
        weight.data = weight.data.T.contiguous().T
        before = weight.detach().clone()
        step(model, built(model, 1e-2), tokens)
        rows = (weight / before).float()
        assert torch.allclose(rows, rows[:, :1].expand_as(rows), rtol=2**-7)
        assert (rows < 0.9).all()


class TestOverTime:
    @pytest.mark.promise("qk-clip-bound")
    @pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek"])
    def test_logits_that_explode_without_it_are_bounded(self, family: str) -> None:
        """A rate at which the weights grow. A step takes logits beyond tau, before it is clipped: to less than 3 tau here."""
        fast = {"name": "muon", "lr": 0.3, "adamw": {"lr": 3e-3}}
        largest = {}
        for tau in (NOWHERE, 5.0):
            model = FAMILIES[family]()
            optimizer = built(model, tau, params=fast)
            largest[tau] = [max(values(step(model, optimizer, attentions.batch(number % 4)))) for number in range(30)]
        assert max(largest[NOWHERE]) > 100
        assert max(largest[5.0]) < 15

    def test_every_k_th_step_looks_and_clips(self) -> None:
        model = attentions.llama()
        optimizer = built(model, 1e-3, every=3)
        names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.bias")
        changed, steps = [], []
        for number in range(7):
            before = weights(model)
            steps.append(step(model, optimizer, attentions.batch(number)).get("step"))
            changed.append([not weights(model)[name].equal(before[name]) for name in names])
        assert steps == [None, None, 3, 3, 3, 6, 6]
        assert changed == [[number in (3, 6)] * 2 for number in range(1, 8)]

    def test_a_resumed_run_looks_in_the_same_steps(self) -> None:
        straight, resumed = attentions.llama(), attentions.llama()
        first = built(straight, 1.0, every=2, params=MUON)
        for number in range(3):
            step(straight, first, attentions.batch(number))
        saved = copy.deepcopy((straight.state_dict(), first.state_dict()))
        step(straight, first, attentions.batch(3))
        resumed.load_state_dict(saved[0])
        second = built(resumed, 1.0, every=2, params=MUON)
        second.load_state_dict(saved[1])
        assert step(resumed, second, attentions.batch(3))["step"] == 4
        assert all(torch.equal(mine, its) for mine, its in zip(resumed.parameters(), straight.parameters(), strict=True))

    def test_a_step_that_is_refused_clips_nothing(self) -> None:
        model = attentions.llama()
        optimizer = built(model, 1e-3)
        before = weights(model)
        loss = model(input_ids=attentions.batch(0), labels=attentions.batch(0)).loss
        (loss * float("inf")).backward()
        with pytest.raises(RuntimeError, match="is not finite; nothing was changed"):
            optimizer.step()
        assert all(weight.equal(before[name]) for name, weight in weights(model).items())


class TestItsCost:
    """Counted on the meta device: launches, and waits of the host, by the files of the package that cause them."""

    @pytest.mark.promise("qk-clip-cost")
    @pytest.mark.parametrize("family", ["llama", "deepseek", "gpt2", "own"])
    def test_a_dozen_launches_for_each_module_and_no_wait_in_steps_that_look_and_none_in_others(self, family: str) -> None:
        model = FAMILIES[family]().to("meta")
        optimizer = built(model, 1.0, every=2, params={"name": "sgd", "lr": 0.1})
        steps = [self._counted(model, optimizer) for _ in range(4)]
        modules = 1 if family == "own" else 2
        assert steps[2] == (0, 0)
        launches, waits = steps[3]
        assert waits == 0
        # Of a module 16 for its logits, 2 weights and 2 biases; 8 for the factors of all.
        assert 10 * modules < launches <= (16 + 4) * modules + 8

    def _counted(self, model: nn.Module, optimizer: OptForge) -> tuple[int, int]:
        tokens = torch.zeros(4, 16, dtype=torch.long, device="meta")
        given = (
            {"input_ids": tokens} if isinstance(model, attentions.Own) else {"inputs_embeds": torch.zeros(4, 16, 36).to("meta")}
        )
        with Launches() as counts:
            model(**given, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        # The attention function itself is called in its place, and is not its cost.
        own = [op for op in counts.ops if op.place.startswith(("step/qk_clip", "step/logits")) and not self._called(op.place)]
        return sum(op.launches for op in own), sum(op.waits for op in own)

    def _called(self, place: str) -> bool:
        file, _, line = place.partition(":")
        return "return function(" in (PACKAGE / file).read_text().splitlines()[int(line) - 1]


class TestAroundTheModel:
    def test_a_failed_forward_pass_leaves_transformers_as_it_was(self) -> None:
        known = dict(ALL_ATTENTION_FUNCTIONS)
        model = attentions.llama()
        optimizer = built(model, NOWHERE)
        with pytest.raises(RuntimeError):
            model(inputs_embeds=torch.zeros(1, 4, 35))
        step(model, optimizer, attentions.batch(0))
        model.set_attn_implementation("eager")
        step(model, optimizer, attentions.batch(0))
        assert dict(ALL_ATTENTION_FUNCTIONS) == known

    def test_a_copy_of_the_model_is_not_watched(self) -> None:
        model = attentions.llama(layers=1)
        optimizer = built(model, NOWHERE)
        twin = copy.deepcopy(model)
        twin(input_ids=attentions.batch(1)).logits.sum().backward()
        seen = values(step(model, optimizer, attentions.batch(0)))
        assert seen == pytest.approx(attentions.in_float64(model, attentions.batch(0)).tolist(), rel=1e-5)

    def test_a_later_optimizer_takes_over(self) -> None:
        model = attentions.llama(layers=1)
        first = built(model, NOWHERE)
        second = built(model, NOWHERE)
        step(model, second, attentions.batch(0))
        assert len(second.attention_logits["max"]) == 1
        assert first.attention_logits == {}

    def test_an_optimizer_with_it_is_not_copied(self) -> None:
        with pytest.raises(TypeError, match='"qk_clip" cannot be copied'):
            copy.deepcopy(built(attentions.llama(), NOWHERE))

    def test_frozen_attention_is_left_out(self) -> None:
        model = attentions.llama()
        for parameter in model.model.layers[0].parameters():
            parameter.requires_grad_(False)
        seen = step(model, built(model, NOWHERE), attentions.batch(0))
        assert list(seen["max"]) == ["model.layers.1.self_attn"]


def norms() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(vocab_size=50, num_hidden_layers=1, **SHAPE))


def clamped() -> nn.Module:
    return hf.OlmoForCausalLM(hf.OlmoConfig(vocab_size=50, num_hidden_layers=1, clip_qkv=1.0, **SHAPE))


def relative() -> nn.Module:
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4))


def aside() -> nn.Module:
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4))


def across() -> nn.Module:
    return attentions.made(
        hf.GPT2LMHeadModel, hf.GPT2Config(vocab_size=50, n_embd=36, n_layer=1, n_head=3, add_cross_attention=True)
    )


def partly_frozen() -> nn.Module:
    model = attentions.llama()
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    return model


def adapted() -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(attentions.llama(), peft.LoraConfig(target_modules=["q_proj"]))


SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


class TestWhatItRefuses:
    @pytest.mark.promise("qk-clip-refused")
    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (norms, r"layers.0.self_attn \(Qwen3Attention\): got q_norm, which normalises .* allowed: no \"qk_clip\""),
            (clamped, r"self_attn \(OlmoAttention\): got clip_qkv, which clamps"),
            (
                relative,
                r"\(T5Attention\): got attention whose q and k projections are not known among q, k, v, o, ",
            ),
            (aside, r"\(BloomAttention\): got attention that does not call transformers' attention interface"),
            (across, r"crossattention \(GPT2Attention\): got"),
            (
                partly_frozen,
                r"\(LlamaAttention\): got q and k projections of which some are frozen; allowed: all of them trained",
            ),
            (adapted, r"\(LlamaAttention\): got q_proj with an adapter"),
            (lambda: nn.MultiheadAttention(8, 2), r"\(MultiheadAttention\): got attention that does not call"),
            (lambda: nn.Linear(4, 4), "found no attention to bound in Linear; looked for .* allowed: ds_optforge.register_att"),
        ],
        ids=["norms", "clamped", "relative", "aside", "across", "partly frozen", "adapter", "torch's", "none"],
    )
    def test_attention_that_it_cannot_bound(self, model: Callable[[], nn.Module], message: str) -> None:
        with pytest.raises(ConfigError, match=f"qk_clip: .*{message}"):
            built(model(), 100.0)

    def test_a_rule_that_keeps_a_copy_of_the_weight(self) -> None:
        with pytest.raises(ConfigError, match=r"qk_clip: got 'schedule_free_adamw' for model.*k_proj.weight, which"):
            built(attentions.llama(), 100.0, params={"name": "schedule_free_adamw", "lr": 0.01})

    @pytest.mark.parametrize("rule", ["muon_hyperball", "muown"])
    def test_a_rule_that_keeps_norms_of_the_weight(self, rule: str) -> None:
        with pytest.raises(
            ConfigError, match=f"qk_clip: got '{rule}' for model.*k_proj.weight, which keeps norms of the weight"
        ):
            built(attentions.llama(), 100.0, params={"name": rule, "lr": 0.01})

    @pytest.mark.parametrize("around", [{"average": {"kind": "ema"}}, {"ema_nesterov": {}}], ids=str)
    def test_what_follows_the_weights_before_the_clip(self, around: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=f"qk_clip: got '{min(around)}' too, which follows the weights before the clip"):
            built(attentions.llama(), 100.0, params={"name": "muon", "lr": 0.01, **around})

    def test_a_model_that_is_compiled(self) -> None:
        model = attentions.llama(layers=1)
        optimizer = built(model, 100.0)
        with pytest.raises(ConfigError, match=r"a forward pass that torch.compile has compiled; allowed: one that is not"):
            step(torch.compile(model, backend="eager"), optimizer, attentions.batch(0))

    def test_an_attention_function_that_it_does_not_know(self) -> None:
        model = attentions.llama()
        ALL_ATTENTION_FUNCTIONS["own"] = ALL_ATTENTION_FUNCTIONS["sdpa"]
        model.config._attn_implementation = "own"
        optimizer = built(model, 100.0)
        with pytest.raises(
            ConfigError, match="got the attention implementation 'own'; allowed: eager, sdpa, flash_attention_2"
        ):
            step(model, optimizer, attentions.batch(0))
        del ALL_ATTENTION_FUNCTIONS["own"]

    def test_registered_attention_that_shows_nothing(self) -> None:
        model = attentions.Own(joined=False, shows=False)
        optimizer = built(model, 100.0)
        with pytest.raises(ConfigError, match=r"attention \(OwnAttention\): got a forward pass that shows no queries and keys"):
            step(model, optimizer, attentions.batch(0))

    def test_queries_of_another_shape_than_registered(self) -> None:
        model = attentions.Own(joined=False)
        optimizer = built(model, 100.0)
        model.attention.parts = lambda x: [torch.zeros(4, heads, 16, 9, requires_grad=True) for heads in (2, 1, 1)]
        with pytest.raises(
            ConfigError, match=r"got queries \(4, 2, 16, 9\) and keys \(4, 1, 16, 9\); allowed: \(batch, 4, tok"
        ):
            step(model, optimizer, attentions.batch(0))

    def test_a_registration_whose_numbers_do_not_fit(self) -> None:
        linear = nn.Linear(8, 12)
        with pytest.raises(ConfigError, match="register_attention: got 5 heads and 5 of keys for maps of 12 and 12 outputs"):
            ds_optforge.register_attention(nn.Module(), query=linear, key=nn.Linear(8, 12), heads=5)
        with pytest.raises(ConfigError, match="register_attention: got 4 heads and 3 of keys"):
            ds_optforge.register_attention(nn.Module(), query=linear, key=linear, heads=4, key_heads=3)


class TestWhichKeysAQueryAttendsTo:
    """`Kept`, as transformers' flash attention is called, which no CPU has: against pairs counted one by one."""

    def pairs(self, rule: Callable[[int, int, int], bool], queries: int, keys: int, first: int = 0, every: int = 1) -> Tensor:
        rows = range(first, queries, every)
        return torch.tensor([[[rule(b, row, column) for column in range(keys)] for row in rows] for b in range(2)])

    def allowed(self, kept: Kept, queries: int, keys: int, first: int = 0, every: int = 1) -> Tensor:
        found = kept.of(slice(0, 2), first, every, queries, keys, torch.device("cpu"))
        assert found is not None
        return found.expand(2, 1, -1, keys)[:, 0]

    def test_a_window_up_to_its_own_place(self) -> None:
        found = self.allowed(Kept(causal=True, late=True, window=3), 6, 6, 1, 2)
        assert found.equal(self.pairs(lambda _, row, column: row - 3 < column <= row, 6, 6, 1, 2))

    def test_the_last_query_is_at_the_place_of_the_last_key(self) -> None:
        found = self.allowed(Kept(causal=True, late=True), 3, 5)
        assert found.equal(self.pairs(lambda _, row, column: column <= row + 2, 3, 5))

    def test_padding_neither_attends_nor_is_attended_to(self) -> None:
        real = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
        found = self.allowed(Kept(real, causal=True, late=True), 4, 4)
        assert found.equal(self.pairs(lambda b, row, column: bool(real[b, row] and real[b, column]) and column <= row, 4, 4))

    def test_packed_sequences_by_their_places(self) -> None:
        places = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
        number = [[0, 0, 0, 1, 1, 2], [0] * 6]
        found = self.allowed(Kept(causal=True, places=places), 6, 6, 0, 2)
        assert found.equal(self.pairs(lambda b, row, column: number[b][row] == number[b][column] and column <= row, 6, 6, 0, 2))

    def test_packed_sequences_by_their_ends(self) -> None:
        number = [0, 0, 1, 1, 1]
        found = self.allowed(Kept(ends=torch.tensor([0, 2, 5])), 5, 5)
        assert found.equal(self.pairs(lambda _, row, column: number[row] == number[column], 5, 5))
