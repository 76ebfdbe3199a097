"""References that share no code with the package (float64 formulas, torch's own numbers), and how to read its tables."""

import torch
from torch import Tensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS

Triples = tuple[tuple[float, float, float], ...]

QUINTIC: Triples = ((DEFAULT_A, DEFAULT_B, DEFAULT_C),) * DEFAULT_NS_STEPS
EXACT = {"orthogonalization": {"dtype": "float32"}, "sharding": {"wire_dtype": "float32"}}  # no bfloat16 anywhere


def newton_schulz(matrix: Tensor, triples: Triples = QUINTIC, safety: float = 1.0, eps: float = EPS) -> Tensor:
    """X <- a X + (b A + c A A) X with A = X X^T, from G / (||G||_F safety + eps), on the short side; in float64."""
    x = matrix.double()
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T, triples, safety, eps).T
    x = x / (x.norm() * safety + eps)
    for a, b, c in triples:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def polar_factor(matrix: Tensor) -> Tensor:
    """U V^T of U S V^T, in float64."""
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vh


class Muon:
    """Muon on one (out, in) weight, in float64: m <- lerp(m, g, 1 - beta), Nesterov, W <- (1 - lr wd) W - lr scale NS(u)."""

    def __init__(self, weight: Tensor, lr: float, momentum: float = 0.95, weight_decay: float = 0.0, nesterov: bool = True):
        self.weight = weight.detach().double()
        self.buffer = torch.zeros_like(self.weight)
        self.lr, self.momentum, self.weight_decay, self.nesterov = lr, momentum, weight_decay, nesterov

    def step(self, gradient: Tensor) -> None:
        gradient = gradient.double()
        self.buffer = self.momentum * self.buffer + (1 - self.momentum) * gradient
        direction = (1 - self.momentum) * gradient + self.momentum * self.buffer if self.nesterov else self.buffer
        self.weight = (1 - self.lr * self.weight_decay) * self.weight - self.lr * self.update(direction)

    def update(self, direction: Tensor) -> Tensor:
        rows, cols = direction.shape
        return max(1, rows / cols) ** 0.5 * newton_schulz(direction)


class RowMuon:
    """Error feedback on one (out, in) weight, in float64: M <- M + g; R: rows of largest |M|_1; U = NS(M[R]); M[R] <- mu M[R].

    W <- (1 - lr wd) W everywhere, then W[R] <- W[R] - lr scale U, the scale that of the whole shape. With ``beta2``, U is
    normalised by rows as in NorMuon, whose second moment moves for the rows of R alone.
    """

    def __init__(
        self,
        weight: Tensor,
        lr: float,
        rows: int,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        beta2: float | None = None,
    ) -> None:
        self.weight = weight.detach().double()
        self.buffer = torch.zeros_like(self.weight)
        self.second = torch.zeros(len(weight), dtype=torch.float64)
        self.lr, self.rows, self.momentum, self.weight_decay, self.beta2 = lr, rows, momentum, weight_decay, beta2

    def step(self, gradient: Tensor) -> list[int]:
        """Return the chosen rows, in order."""
        self.buffer += gradient.double()
        sizes = [sum(abs(value) for value in row) for row in self.buffer.tolist()]
        chosen = sorted(sorted(range(len(sizes)), key=lambda row: (-sizes[row], row))[: self.rows])
        update = newton_schulz(self.buffer[chosen])
        if self.beta2 is not None:
            self.second[chosen] += (1 - self.beta2) * (update.square().mean(1) - self.second[chosen])
            normalised = update / (self.second[chosen].sqrt() + 1e-8)[:, None]
            update = normalised * (update.norm() / normalised.norm())
        out, into = self.weight.shape
        self.weight *= 1 - self.lr * self.weight_decay
        self.weight[chosen] -= self.lr * max(1, out / into) ** 0.5 * update
        self.buffer[chosen] *= self.momentum
        return chosen


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found.detach().double() - expected.double()).norm() / expected.double().norm())


def table_rows(printed: str) -> dict[str, list[str]]:
    """The cells of each row of an `explain` table, by the first one, the parameter's name."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if line.startswith("│")]
    return {name: cells for name, *cells in rows}
