"""Small models with attention of each kind, their data, and QK-clip written down once more in float64."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import ds_optforge

VOCABULARY, TOKENS = 50, 16


def llama(layers: int = 2, **options: Any) -> nn.Module:
    """4 heads of queries share 2 of keys; odd sizes, so that ZeRO cuts through heads and rows."""
    shape = {"hidden_size": 36, "head_dim": 10, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"num_hidden_layers": layers, "attention_bias": True}
    return made(hf.LlamaForCausalLM, hf.LlamaConfig(**_COMMON, **{**shape, **options}))


def gpt2(layers: int = 2, **options: Any) -> nn.Module:
    """Queries, keys and values of all heads in one weight, stored (in, out)."""
    config = hf.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=36, n_layer=layers, n_head=3, **_NO_DROPOUT)
    config.update(options)
    return made(hf.GPT2LMHeadModel, config)


def neox(layers: int = 2, **options: Any) -> nn.Module:
    """Of each head queries, keys and values in turn, in one weight; a rotary part of each head."""
    shape = {"hidden_size": 36, "intermediate_size": 44, "num_attention_heads": 3}
    return made(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**_COMMON, num_hidden_layers=layers, **shape, **options))


def deepseek(layers: int = 2, **options: Any) -> nn.Module:
    """Multi-head latent attention: 3 heads of 6 plain and 4 rotary elements, with a low-rank map of queries."""
    shape = {"hidden_size": 36, "intermediate_size": 44, "num_attention_heads": 3, "num_key_value_heads": 3}
    latent = {"q_lora_rank": 14, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
    dense = {"first_k_dense_replace": 2}
    shape = {**shape, **latent, **dense, "num_hidden_layers": layers}
    return made(hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config(**_COMMON, **{**shape, **options}))


def bert(layers: int = 2, **options: Any) -> nn.Module:
    """An encoder: every token attends to all."""
    shape = {"hidden_size": 36, "intermediate_size": 44, "num_attention_heads": 3}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return made(hf.BertForMaskedLM, hf.BertConfig(**_COMMON, num_hidden_layers=layers, **shape, **dropout, **options))


_COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 512}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "llama": llama,
    "gpt2": gpt2,
    "neox": neox,
    "deepseek": deepseek,
    "bert": bert,
    "own": lambda **options: Own(joined=False, **options),
    "own_joined": lambda **options: Own(joined=True, **options),
}


def made(kind: type, config: Any) -> nn.Module:
    """The same weights in every process, large enough that logits differ; biases are not zero."""
    torch.manual_seed(0)
    model: nn.Module = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 and name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() > 1:
                parameter.mul_(6.0)
    return model


class Own(nn.Module):
    """A model of one's own, whose attention registers its projections: one map of q, k and v, or one of each."""

    def __init__(self, joined: bool, shows: bool = True, layers: int = 1) -> None:
        super().__init__()
        assert layers == 1
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 36)
        self.attention = OwnAttention(joined, shows)
        self.lm_head = nn.Linear(36, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.lm_head(self.attention(self.embed(input_ids)))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return hf.modeling_outputs.CausalLMOutput(loss=loss)


class OwnAttention(nn.Module):
    """4 heads of queries and 2 of keys, of 9 elements each."""

    def __init__(self, joined: bool, shows: bool) -> None:
        super().__init__()
        self.joined, self.shows = joined, shows
        if joined:
            self.mixed = nn.Linear(36, 36 + 18 + 18)
            given = {"query": self.mixed, "key": self.mixed}
        else:
            self.to_q, self.to_k, self.to_v = nn.Linear(36, 36), nn.Linear(36, 18), nn.Linear(36, 18)
            given = {"query": self.to_q, "key": self.to_k}
        self.show = ds_optforge.register_attention(self, **given, heads=4, key_heads=2)

    def parts(self, x: Tensor) -> list[Tensor]:
        """(batch, heads, tokens, 9) each."""
        found = self.mixed(x).split([36, 18, 18], -1) if self.joined else (self.to_q(x), self.to_k(x), self.to_v(x))
        return [part.unflatten(-1, (-1, 9)).transpose(1, 2) for part in found]

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.parts(x)
        if self.shows:
            self.show(query, key, is_causal=True)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return x + mixed.transpose(1, 2).flatten(2)


def batch(step: int, size: int = 4, tokens: int = TOKENS) -> Tensor:
    """The global batch of a step, (size, tokens)."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(VOCABULARY, (size, tokens), generator=generator)


def in_float64(model: nn.Module, tokens: Tensor) -> Tensor:
    """The largest logit of each key head of the first layer, (key heads,), from the weights, by the formulas of the families.

    softmax scale * (rotated q) . (rotated k), over all pairs of which the key is not behind the query.
    """
    config = model.config
    name = type(model).__name__
    with torch.no_grad():
        if name.startswith("Llama"):
            query, key = _of_llama(model.model, config, tokens)
        elif name.startswith("GPT2"):
            query, key = _of_gpt2(model.transformer, config, tokens)
        else:
            query, key = _of_deepseek(model.model, config, tokens)
    heads = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(heads, 1).transpose(2, 3) / query.shape[-1] ** 0.5
    behind = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
    largest = logits.masked_fill(behind, -torch.inf).amax((0, 2, 3))
    return largest.view(-1, heads).amax(1)


def _of_llama(model: Any, config: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    layer = model.layers[0]
    x = _rms(model.embed_tokens.weight[tokens].double(), layer.input_layernorm.weight, config.rms_norm_eps)
    maps = (layer.self_attn.q_proj, layer.self_attn.k_proj)
    query, key = (_heads(x @ m.weight.double().T + m.bias.double(), config.head_dim) for m in maps)
    return _rotated(query, interleaved=False), _rotated(key, interleaved=False)


def _of_gpt2(model: Any, config: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    x = (model.wte.weight[tokens] + model.wpe.weight[: tokens.shape[1]]).double()
    norm, mixed = model.h[0].ln_1, model.h[0].attn.c_attn
    x = F.layer_norm(x, x.shape[-1:], norm.weight.double(), norm.bias.double(), norm.eps)
    query, key, _ = (x @ mixed.weight.double() + mixed.bias.double()).chunk(3, -1)
    size = config.n_embd // config.n_head
    return _heads(query, size), _heads(key, size)


def _of_deepseek(model: Any, config: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    layer = model.layers[0]
    attention, eps = layer.self_attn, 1e-6
    x = _rms(model.embed_tokens.weight[tokens].double(), layer.input_layernorm.weight, config.rms_norm_eps)
    plain, rotary = config.qk_nope_head_dim, config.qk_rope_head_dim
    latent = _rms(x @ attention.q_a_proj.weight.double().T, attention.q_a_layernorm.weight, eps)
    query = _heads(latent @ attention.q_b_proj.weight.double().T, plain + rotary)
    latent, shared = (x @ attention.kv_a_proj_with_mqa.weight.double().T).split([config.kv_lora_rank, rotary], -1)
    latent = _rms(latent, attention.kv_a_layernorm.weight, eps)
    key = _heads(latent @ attention.kv_b_proj.weight.double().T, plain + config.v_head_dim)[..., :plain]
    turned = _rotated(_heads(shared, rotary), interleaved=True).expand(-1, key.shape[1], -1, -1)
    query = torch.cat([query[..., :plain], _rotated(query[..., plain:], interleaved=True)], -1)
    return query, torch.cat([key, turned], -1)


def _heads(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def _rotated(x: Tensor, interleaved: bool) -> Tensor:
    """Rotate the pairs (i, i + size / 2), or (2 i, 2 i + 1), at place p by the angle p / 10000^(2 i / size)."""
    size = x.shape[-1]
    angles = torch.arange(x.shape[2]).double()[:, None] / 10000.0 ** (torch.arange(0, size, 2).double() / size)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
    return torch.cat(turned, -1)  # the order of elements does not matter to a product of two
