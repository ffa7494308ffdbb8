"""A residual stream that is several, and one with a low-rank branch: AltUp and LAuReL.

AltUp (Baykal et al. 2023, arXiv:2301.13310) carries streams of (streams, batch, tokens, size) of
which a layer runs on one, the active. LAuReL: Menghani et al. 2024, arXiv:2411.07501.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from portkit.nn.norms import LateCastRMSNorm


class AltUp(nn.Module):
    """Predicts all streams before a layer, and corrects them by what the active one became."""

    router_input_scale: Tensor

    def __init__(self, size: int, num_streams: int, active: int, eps: float) -> None:
        super().__init__()
        self.num_streams, self.active = num_streams, active
        self.correct_output_scale = nn.Parameter(torch.zeros(size))
        self.correction_coefs = nn.Linear(self.num_streams, self.num_streams, bias=False)
        self.prediction_coefs = nn.Linear(self.num_streams, self.num_streams**2, bias=False)
        self.modality_router = nn.Linear(size, self.num_streams, bias=False)
        self.router_norm = LateCastRMSNorm(size, eps)
        self.register_buffer(
            "router_input_scale", torch.tensor(size**-1.0, device="cpu"), persistent=False
        )

    def modalities(self, x: Tensor) -> Tensor:
        """(batch, tokens, hidden) to (batch, tokens, streams), between -1 and 1."""
        routed = self.modality_router(self.router_norm(x) * self.router_input_scale)
        modalities: Tensor = torch.tanh(routed.float()).to(x.dtype)
        return modalities

    def predict(self, streams: Tensor) -> Tensor:
        """(streams, batch, tokens, hidden) to the same: each a mixture of all, and itself."""
        coefs = self.prediction_coefs(self.modalities(streams[self.active]))
        coefs = coefs.unflatten(-1, (self.num_streams, self.num_streams)).permute(0, 1, 3, 2)
        mixed = torch.matmul(streams.permute(1, 2, 3, 0), coefs).permute(3, 0, 1, 2)
        # In place, as the reference adds: it decides how the gradient lies in memory, and so the
        # order of the sum that is the coefficients' gradient.
        mixed += streams
        predictions: Tensor = mixed.contiguous()
        return predictions

    def correct(self, predictions: Tensor, activated: Tensor) -> Tensor:
        """Move every stream by the active one's error, each by a factor of its own."""
        modalities = self.modalities(activated)
        innovation = (activated - predictions[self.active]).repeat(self.num_streams, 1, 1, 1)
        coefs = self.correction_coefs(modalities) + 1.0
        corrected: Tensor = innovation * coefs.permute(2, 0, 1).unsqueeze(-1) + predictions
        return corrected


class Laurel(nn.Module):
    """`x` and a normalised low-rank branch of it; (..., size) to (..., size)."""

    def __init__(self, size: int, rank: int, eps: float) -> None:
        super().__init__()
        self.linear_left = nn.Linear(size, rank, bias=False)
        self.linear_right = nn.Linear(rank, size, bias=False)
        self.post_laurel_norm = LateCastRMSNorm(size, eps)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.post_laurel_norm(self.linear_right(self.linear_left(x)))
        return x + branch


def spread(embedded: Tensor, projections: Iterable[nn.Module]) -> Tensor:
    """The streams that layers begin with, (streams, batch, tokens, size): what is embedded, and a
    projection of it for each of the others, made of its size."""
    size = _magnitude(embedded)
    return torch.stack((embedded, *(_scaled_to(each(embedded), size) for each in projections)))


def gathered(streams: Tensor, projections: Iterable[nn.Module]) -> Tensor:
    """The mean of the streams, the later ones projected back and made of the first one's size."""
    first, *others = streams
    size = _magnitude(first)
    back = [_scaled_to(each(one), size) for each, one in zip(projections, others, strict=True)]
    return torch.stack((first, *back)).mean(0)


def _magnitude(x: Tensor) -> Tensor:
    """Each token's root mean square, (…, 1)."""
    return torch.mean(x**2, dim=-1, keepdim=True) ** 0.5


def _scaled_to(x: Tensor, magnitude: Tensor) -> Tensor:
    """`x`, (…, size), each token's root mean square made `magnitude`, (…, 1)."""
    own = torch.mean(x**2, dim=-1, keepdim=True).clamp(min=1e-5)
    return x * magnitude / torch.sqrt(own)
