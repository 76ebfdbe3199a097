"""The model that rules are tested on, and its data: small, and awkward to cut, to route and to step."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 50
WIDTH = 72  # a matrix of 72 x 72 is large enough for 8-bit state
FROZEN = "blocks.0.weight"
UNUSED = "idle.weight"  # never gets a gradient
SOMETIMES = "sometimes.weight"  # gets none in the first step, the fourth, ...
BANK = "bank"  # three matrices, of which the last never gets a gradient


class AwkwardNet(nn.Module):
    """Matrices of odd shapes, so that slices cut through rows; of repeated ones; a bank, a convolution, a tied head.

    One block is frozen, one layer is never used, and one is left out of every third step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.up = nn.Linear(24, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.odd = nn.Linear(WIDTH, 33)
        self.down = nn.Linear(33, 24, bias=False)
        self.bank = nn.Parameter(0.2 * torch.randn(3, 24, 17))
        self.filters = nn.Conv1d(24, 24, 3, padding=1)
        self.sometimes = nn.Linear(24, 24)
        self.idle = nn.Linear(20, 12)
        self.norm = nn.LayerNorm(24)
        self.lm_head = nn.Linear(24, VOCABULARY, bias=False)
        self.lm_head.weight = self.embed.weight
        self.blocks[0].weight.requires_grad_(False)
        self.calls = 0

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss of (samples,) tokens."""
        self.calls += 1
        x = F.gelu(self.up(self.embed(tokens)))
        for block in self.blocks:
            x = x + F.gelu(block(x))
        x = self.down(F.gelu(self.odd(x)))
        if self.calls % 3 != 1:
            x = x + self.sometimes(x)
        x = x + torch.einsum("bi,eij,ekj->bk", x, self.bank[:2], self.bank[:2])
        x = x + self.filters(x.unsqueeze(-1)).squeeze(-1)
        return F.cross_entropy(self.lm_head(self.norm(x)).float(), targets)


def build() -> AwkwardNet:
    """The same model on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AwkwardNet()


def batch(step: int, size: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step: (size,) tokens and targets."""
    tokens = torch.randint(VOCABULARY, (size,), generator=torch.Generator().manual_seed(step))
    return tokens, (tokens * 7 + 3) % VOCABULARY
