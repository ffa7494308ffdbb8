"""The likeliest token of each row, from logits of a large vocabulary. Knows tensors only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 512


def likeliest(logits: Tensor) -> Tensor:
    """Ids (batch,) of the largest of logits (batch, vocab), the first of equal ones; -1 where any
    is NaN.

    As `argmax`, whose loop on the CPU takes one number at a time: first the block is found whose
    maximum is the first of the largest, and then the place in it.
    """
    padded = F.pad(logits, (0, -logits.shape[1] % _BLOCK), value=-torch.inf)
    blocks = padded.reshape(len(logits), -1, _BLOCK)
    largest, block = blocks.amax(2).float().max(1, keepdim=True)  # NaN is larger than all others
    within = torch.take_along_dim(blocks, block[..., None], 1)[:, 0].float().argmax(1, keepdim=True)
    found: Tensor = (block * _BLOCK + within).masked_fill(largest.isnan(), -1)
    return found[:, 0]
