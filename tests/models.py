"""Small models whose shapes make ZeRO's cuts awkward, and their data. Shared by unit and distributed tests."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 50


class AwkwardNet(nn.Module):
    """Matrices of odd shapes (so that slices cut through rows), tall, wide and repeated ones, biases, and options.

    ``unused``: a layer that never gets a gradient; ``sometimes``: one that every third call leaves out; ``shapes``: an expert
    bank and a convolution.
    """

    def __init__(
        self,
        tied: bool = False,
        unused: bool = False,
        sometimes: bool = False,
        frozen: bool = False,
        depth: int = 3,
        width: int = 40,
        shapes: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.up = nn.Linear(24, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        self.odd = nn.Linear(width, 33)
        self.down = nn.Linear(33, 24, bias=False)
        self.norm = nn.LayerNorm(24)
        self.lm_head = nn.Linear(24, VOCABULARY, bias=False)
        self.idle = nn.Linear(20, 12) if unused else None
        self.calls = 0
        self.bank = nn.Parameter(0.2 * torch.randn(3, 24, 17)) if shapes else None
        self.filters = nn.Conv1d(24, 24, 3, padding=1) if shapes else None
        self.sometimes = nn.Linear(24, 24) if sometimes else None
        if tied:
            self.lm_head.weight = self.embed.weight
        if frozen:
            self.blocks[0].weight.requires_grad_(False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        x = F.gelu(self.up(self.embed(tokens)))
        for block in self.blocks:
            x = x + F.gelu(block(x))
        x = self.down(F.gelu(self.odd(x)))
        if self.sometimes is not None and self.calls % 3 != 1:
            x = x + self.sometimes(x)
        if self.bank is not None and self.filters is not None:
            x = x + torch.einsum("bi,eij,ekj->bk", x, self.bank, self.bank)
            x = x + self.filters(x.unsqueeze(-1)).squeeze(-1)
        x = self.norm(x)
        return F.cross_entropy(self.lm_head(x).float(), targets)


def build(seed: int = 0, **options: object) -> AwkwardNet:
    torch.manual_seed(seed)
    return AwkwardNet(**options)  # type: ignore[arg-type]


def fill_gradients(model: nn.Module) -> None:
    """Count missing gradients as zeros, as ZeRO does; plain PyTorch would skip their parameters."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def batch(step: int, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The global batch of a step: (size,) tokens and targets."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    tokens = torch.randint(VOCABULARY, (size,), generator=generator)
    return tokens, (tokens * 7 + 3) % VOCABULARY
