"""The gated feed-forward block (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Callable

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


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (Hendrycks & Gimpel 2016), `gelu_pytorch_tanh` in configs."""
    return F.gelu(x, approximate="tanh")
