"""The gated feed-forward block (Shazeer 2020, arXiv:2002.05202), dense and sparse."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`; shapes (..., hidden_size) to (..., hidden_size)."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        act: Callable[[Tensor], Tensor],
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.act = act

    def forward(self, hidden_states: Tensor) -> Tensor:
        gated = self.act(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        down: Tensor = self.down_proj(gated)
        return down


class SparseGatedMLP(nn.Module):
    """A GELU-gated feed-forward of which a gate counts by how far it is above a quantile.

    `sparsity` is the quantile, of a normal distribution with the gates' mean and deviation in each
    token ("Gaussian top-k", You et al. 2025, arXiv:2506.06644); at 0 all gates count as they are.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, sparsity: float) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        # Of float32, as the reference computes it, and rounded to the dtype where it is used.
        quantile = torch.erfinv(2 * torch.tensor(sparsity, device="cpu") - 1) * math.sqrt(2)
        self.deviations = float(quantile) if sparsity else None

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        if self.deviations is not None:
            deviations = gate.new_full((), self.deviations)
            mean = torch.mean(gate, dim=-1, keepdim=True)
            spread = torch.std(gate, dim=-1, keepdim=True, unbiased=False)
            gate = torch.relu(gate - (mean + spread * deviations))
        down: Tensor = self.down_proj(gelu_tanh(gate) * self.up_proj(x))
        return down


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (Hendrycks & Gimpel 2016), `gelu_pytorch_tanh` in configs."""
    return F.gelu(x, approximate="tanh")
