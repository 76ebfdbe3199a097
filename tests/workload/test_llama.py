"""The Llama of transformers, called as the small GPT is."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from workload.llama import Llama


def test_the_loss_is_the_mean_cross_entropy_of_the_logits_in_nats():
    torch.manual_seed(0)
    model, tokens = Llama(sequence_length=12), torch.randint(256, (3, 13))
    logits = model(tokens[:, :-1])
    assert logits.shape == (3, 12, 256)
    expected = F.cross_entropy(logits.reshape(-1, 256), tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(model(tokens[:, :-1], tokens[:, 1:]), expected)
    assert expected.item() == pytest.approx(math.log(256), abs=0.15)
