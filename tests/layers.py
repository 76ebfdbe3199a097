"""Models that are nothing but their weights, and gradients for them. Shared by the tests of rules, state and matrices."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_optforge import build_optimizer


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal, the same on every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def linears(*weights: Tensor) -> nn.Sequential:
    """A layer per given (out, in) weight, without biases."""
    layers = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        layer.weight = nn.Parameter(weight.clone())
        layers.append(layer)
    return nn.Sequential(*layers)


def set_gradients(parameters: Iterable[nn.Parameter], seed: int) -> None:
    """Gradients that depend on the seed and the parameter's place."""
    for index, parameter in enumerate(parameters):
        parameter.grad = matrix(*parameter.shape, seed=1000 * (seed + 1) + index, dtype=parameter.dtype)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def bytes_per_parameter(config: Mapping[str, Any]) -> float:
    """Of everything that one step leaves in the optimizer's state, where matrices have about 600 elements a row."""
    model = linears(*(matrix(512, 512, seed=seed) for seed in range(2)), matrix(384, 1024))
    optimizer = build_optimizer(model, config)
    set_gradients(model.parameters(), 0)
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) / sum(p.numel() for p in model.parameters())


def stepped_as_stored_in_out(reference: Any, config: dict[str, Any], out: int, into: int, steps: int = 5) -> Tensor:
    """Step a weight of shape (out, into) that is stored as its transpose, and ``reference`` beside it; return the weight."""
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D
    stored = conv1d(out, into)
    stored.weight.data.copy_(matrix(out, into).T)
    optimizer = build_optimizer(stored, config)
    for step in range(steps):
        gradient = matrix(out, into, seed=step + 1)
        stored.weight.grad = gradient.T.contiguous()
        reference.step(gradient)
        optimizer.step()
    weight: Tensor = stored.weight.T
    return weight
