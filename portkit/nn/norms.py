"""Norms over the last dimension: root-mean-square ones, and a layer norm without bias.

All normalise in float32 whatever comes in; RMS norms (Zhang & Sennrich 2019, arXiv:1910.07467) by
`x * rsqrt(mean(x**2) + eps)`. They differ in where the weight is applied, hence a module each:
which no test at float32 sees and every test at bfloat16 does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """`weight * x̂`: the weight is multiplied after the cast back, in the activations' dtype.

    Shapes: (..., size) to (..., size).
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * _normalise(hidden_states, self.eps).to(hidden_states.dtype)


class UnitOffsetRMSNorm(nn.Module):
    """`(1 + weight) * x̂`: the weight is stored around zero and all of it happens in float32.

    `1 + weight` rounded to bfloat16 would change a quarter of the elements; the cast comes last.
    Shapes: (..., size) to (..., size).
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = _normalise(hidden_states, self.eps) * (1.0 + self.weight.float())
        return normed.to(hidden_states.dtype)


class LateCastRMSNorm(nn.Module):
    """`weight * x̂`, all of it in float32, the cast last: the weight as it is, no offset.

    Shapes: (..., size) to (..., size).
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = _normalise_by_power(hidden_states, self.eps) * self.weight.float()
        return normed.to(hidden_states.dtype)


class WeightlessRMSNorm(nn.Module):
    """`L2Norm` by a power: equal values, another gradient. Shapes: (..., size) to the same."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _normalise_by_power(hidden_states, self.eps).to(hidden_states.dtype)


class L2Norm(nn.Module):
    """`x * rsqrt(mean(x**2) + eps)` in float32 and cast back: an RMS norm without a weight."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _normalise(hidden_states, self.eps).to(hidden_states.dtype)


class CentredLayerNorm(nn.Module):
    """`weight * (x - mean) * rsqrt(var + eps)`: all of it in float32, the cast last, no bias.

    Layer normalisation (Ba et al. 2016, arXiv:1607.06450) by the biased variance. torch's own
    `layer_norm` sums in another order and differs in the last bits. Shapes: (..., size) to
    (..., size).
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        mean = x.mean(-1, keepdim=True)
        # The mean is taken off twice, as the reference does: how often it is decides the order in
        # which its gradient is summed.
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        normed = (x - mean) * torch.rsqrt(variance + self.eps)
        return (self.weight.float() * normed).to(hidden_states.dtype)


def _normalise(x: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _normalise_by_power(x: Tensor, eps: float) -> Tensor:
    # The same values as by rsqrt, another gradient: the reference of these norms takes a power.
    x = x.float()
    return x * torch.pow(x.pow(2).mean(-1, keepdim=True) + eps, -0.5)
