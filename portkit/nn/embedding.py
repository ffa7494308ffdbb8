"""Token embeddings that are scaled by a constant."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScaledEmbedding(nn.Embedding):
    """An embedding times `scale`, which is rounded to the weight's dtype (25.25 for sqrt(640)).

    int64 (…) to (…, size). The row `padding_idx`, if any, gets no gradient.
    """

    embed_scale: Tensor

    def __init__(
        self, num_embeddings: int, size: int, scale: float, padding_idx: int | None = None
    ) -> None:
        super().__init__(num_embeddings, size, padding_idx)
        # On the CPU whatever the default device: a constant, which loading casts and places.
        self.register_buffer("embed_scale", torch.tensor(scale, device="cpu"), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        # A tensor, not a Python number: that would multiply in float32 and differ by an ulp.
        return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)
