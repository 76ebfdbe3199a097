"""A decoder-only GPT over bytes: the small model that train.py, the benchmarks and the tests use.

Every projection is a matrix of its own (q, k and v are not fused) and nothing has a bias, so what an optimizer
sees is plain: matrices, two embeddings, one output head, and the norms' gains.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INIT_STD = 0.02  # GPT-2's


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT.

    Attributes:
        layers: number of blocks.
        width: features of a token between the blocks.
        heads: number of attention heads, a divisor of `width`.
        sequence_length: most tokens in a sequence.
        vocabulary: number of different tokens.
        tied: True makes the output head use the token embedding's weight.

    Raises:
        ValueError: `width` is not a multiple of `heads`.
    """

    layers: int
    width: int
    heads: int
    sequence_length: int
    vocabulary: int = 256
    tied: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")


PRESETS: dict[str, tuple[int, int, int]] = {  # layers, width, heads
    "tiny": (4, 128, 4),
    "small": (6, 384, 6),
    "gpt2": (12, 768, 12),  # the blocks of GPT-2 124M
}


class Linear(nn.Linear):
    """An `nn.Linear` without bias, with weights from N(0, 0.02^2).

    The module draws them itself, in `reset_parameters`, because under `zero.Init` each weight is partitioned as soon as its
    module is built, and a pass over the finished model would find none.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Draw the weight."""
        nn.init.normal_(self.weight, std=INIT_STD)


class Embedding(nn.Embedding):
    """An `nn.Embedding` with weights from N(0, 0.02^2)."""

    def reset_parameters(self) -> None:
        """Draw the weight."""
        nn.init.normal_(self.weight, std=INIT_STD)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = Linear(config.width, config.width)
        self.k = Linear(config.width, config.width)
        self.v = Linear(config.width, config.width)
        self.o = Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape; a position sees those before it and itself."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (batch, heads, time, width / heads)
            for project in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """Two projections with a GELU between them, where the width is four times as large."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = Linear(config.width, 4 * config.width)
        self.down = Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class Block(nn.Module):
    """Attention and MLP, each behind its norm and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=False)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width, bias=False)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class GPT(nn.Module):
    """A GPT. Built under the same torch seed it always starts from the same weights."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = Embedding(config.vocabulary, config.width)
        self.position_embedding = Embedding(config.sequence_length, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, bias=False)
        self.lm_head = Linear(config.width, config.vocabulary)
        if config.tied:
            self.lm_head.weight = self.token_embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the logits, (batch, time, vocabulary); with `targets`, their mean cross entropy in nats instead.

        `tokens` and `targets` are int64, (batch, time), with time <= sequence_length. The loss is computed in fp32
        whatever dtype the weights have.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.lm_head(self.final_norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def build_model(name: str, sequence_length: int) -> GPT:
    """Build the preset `name` (see `PRESETS`) on bytes.

    Raises:
        ValueError: no preset has this name.
    """
    if name not in PRESETS:
        raise ValueError(f"no model named {name!r}; there are: {', '.join(PRESETS)}")
    layers, width, heads = PRESETS[name]
    return GPT(GPTConfig(layers=layers, width=width, heads=heads, sequence_length=sequence_length))
