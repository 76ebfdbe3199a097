"""A Llama of transformers over bytes, with random weights: as train.py's second model, it has what the small GPT lacks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, WIDTH, HEADS, KEY_VALUE_HEADS = 4, 128, 4, 2


class Llama(nn.Module):
    """A `LlamaForCausalLM` that is called as `workload.gpt.GPT` is: grouped-query attention, rotary positions, a gated MLP."""

    def __init__(self, sequence_length: int) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=WIDTH,
            intermediate_size=WIDTH * 11 // 4,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KEY_VALUE_HEADS,
            max_position_embeddings=sequence_length,
            use_cache=False,
            bos_token_id=None,  # every byte is a token, and none is special
            eos_token_id=None,
        )
        self.model = LlamaForCausalLM(config)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the logits, (batch, time, 256); with `targets`, their mean cross entropy in nats instead.

        `tokens` and `targets` are int64, (batch, time), with time <= sequence_length.
        """
        logits: Tensor = self.model(input_ids=tokens).logits
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
