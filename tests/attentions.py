"""Small models with attention of each kind, their data, and QK-clip written down once more in float64."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import ds_optforge

VOCABULARY, TOKENS = 50, 16


def llama(**options: Any) -> nn.Module:
    """4 heads of queries share 2 of keys; odd sizes, so that ZeRO cuts through heads and rows."""
    shape = {"hidden_size": 36, "head_dim": 10, "intermediate_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2}
    return made(hf.LlamaForCausalLM, hf.LlamaConfig(**_COMMON, **{**shape, "attention_bias": True, **options}))


def gpt2(**options: Any) -> nn.Module:
    """Queries, keys and values of all heads in one weight, stored (in, out)."""
    config = hf.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=36, n_layer=2, n_head=3, **_NO_DROPOUT)
    config.update(options)
    return made(hf.GPT2LMHeadModel, config)


def neox(**options: Any) -> nn.Module:
    """Of each head queries, keys and values in turn, in one weight; a rotary part of each head."""
    shape = {"hidden_size": 36, "intermediate_size": 44, "num_attention_heads": 3}
    return made(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**_COMMON, **shape, **options))


def deepseek(**options: Any) -> nn.Module:
    """Multi-head latent attention: 3 heads of 6 plain and 4 rotary elements, with a low-rank map of queries."""
    shape = {"hidden_size": 36, "intermediate_size": 44, "num_attention_heads": 3, "num_key_value_heads": 3}
    latent = {"q_lora_rank": 14, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
    dense = {"first_k_dense_replace": 2}
    return made(hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config(**_COMMON, **{**shape, **latent, **dense, **options}))


def bert(**options: Any) -> nn.Module:
    """An encoder: every token attends to all."""
    shape = {"hidden_size": 36, "intermediate_size": 44, "num_attention_heads": 3}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return made(hf.BertForMaskedLM, hf.BertConfig(**_COMMON, **shape, **dropout, **options))


_COMMON = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 64}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "llama": llama,
    "gpt2": gpt2,
    "neox": neox,
    "deepseek": deepseek,
    "bert": bert,
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

    def __init__(self, joined: bool, shows: bool = True) -> None:
        super().__init__()
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
