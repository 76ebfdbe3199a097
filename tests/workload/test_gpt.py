"""The small GPT: what it computes, how it starts, and that it can be built where ZeRO builds models."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from workload import GPT, PRESETS, GPTConfig, build_model

CONFIG = GPTConfig(layers=2, width=16, heads=2, sequence_length=12)


def model_with_seed(seed: int, config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(seed)
    return GPT(config)


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0))


def test_the_loss_is_the_mean_cross_entropy_of_the_logits_in_nats():
    model, tokens = model_with_seed(0), random_tokens(3, 13)
    logits = model(tokens[:, :-1])
    assert logits.shape == (3, 12, 256)
    expected = F.cross_entropy(logits.reshape(-1, 256), tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(model(tokens[:, :-1], tokens[:, 1:]), expected)


def test_an_untrained_model_is_close_to_uniform_over_the_bytes():
    loss = build_model("tiny", sequence_length=32)(random_tokens(4, 32), random_tokens(4, 32))
    assert loss.item() == pytest.approx(math.log(256), abs=0.15)


def test_a_byte_is_predicted_from_earlier_bytes_only():
    model, tokens = model_with_seed(0), random_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 7] += 1
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=0, atol=0)
    assert not torch.equal(after[:, 7], before[:, 7])


def test_positions_matter():
    same_byte_everywhere = torch.full((1, 12), 65)
    logits = model_with_seed(0)(same_byte_everywhere)[0]
    assert not torch.allclose(logits[0], logits[1])


def test_the_torch_seed_decides_the_weights():
    weights = model_with_seed(1).state_dict()
    again, other = model_with_seed(1).state_dict(), model_with_seed(2).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
    assert not torch.equal(weights["blocks.0.mlp.up.weight"], other["blocks.0.mlp.up.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_is_fp32_in_half_precision(dtype: torch.dtype):
    model, tokens = model_with_seed(0), random_tokens(2, 13)
    expected = model(tokens[:, :-1], tokens[:, 1:])
    loss = model.to(dtype)(tokens[:, :-1], tokens[:, 1:])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_hidden_weights_are_plain_matrices_and_only_norms_are_vectors():
    shapes = {name: tuple(parameter.shape) for name, parameter in model_with_seed(0).named_parameters()}
    assert {name: shape for name, shape in shapes.items() if name.startswith("blocks.0.")} == {
        "blocks.0.attention_norm.weight": (16,),
        "blocks.0.attention.q.weight": (16, 16),
        "blocks.0.attention.k.weight": (16, 16),
        "blocks.0.attention.v.weight": (16, 16),
        "blocks.0.attention.o.weight": (16, 16),
        "blocks.0.mlp_norm.weight": (16,),
        "blocks.0.mlp.up.weight": (64, 16),
        "blocks.0.mlp.down.weight": (16, 64),
    }
    assert {name: shape for name, shape in shapes.items() if not name.startswith("blocks.")} == {
        "token_embedding.weight": (256, 16),
        "position_embedding.weight": (12, 16),
        "final_norm.weight": (16,),
        "lm_head.weight": (256, 16),
    }


def test_a_tied_head_is_the_token_embedding():
    model = model_with_seed(0, GPTConfig(layers=1, width=16, heads=2, sequence_length=12, tied=True))
    assert model.lm_head.weight is model.token_embedding.weight
    assert model(random_tokens(1, 12)).shape == (1, 12, 256)


def test_the_gpt2_preset_has_the_blocks_of_gpt2_124m_and_builds_on_the_meta_device():
    with torch.device("meta"):
        model = build_model("gpt2", sequence_length=1024)
    matrices = sum(parameter.numel() for block in model.blocks for parameter in block.parameters() if parameter.ndim > 1)
    assert matrices == 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name: str):
    with torch.device("meta"):
        assert build_model(name, sequence_length=8).config.sequence_length == 8


def test_an_unknown_preset_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="no model named 'huge'; there are: tiny, small, gpt2"):
        build_model("huge", sequence_length=8)


def test_a_width_that_the_heads_do_not_divide_is_an_error():
    with pytest.raises(ValueError, match="width 16 is not a multiple of heads 3"):
        GPTConfig(layers=1, width=16, heads=3, sequence_length=8)
