"""Linear maps whose weights are held in 8 or 4 bits: fewer bytes a token, and other numbers.

int8: a row is a scale times whole numbers up to 127 (symmetric). int4: so many columns of a row
have a scale and an offset in common. Products are torch's own kernels, weights times activations
in the activations' dtype with float32 sums. Knows matrices; that it changes what a model computes,
and by how much, is for the harness to say.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP_SIZES = (128, 64, 32)
"""Columns that have a scale in common: the largest that divides the row, of torch's kernel."""
_INT4_ROWS = 16
"""The kernel takes rows by so many."""


class Int8Linear(nn.Module):
    """`weight` int8 (out, in) times `scale` (out,)."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        dense = linear.weight.detach()
        largest = dense.abs().amax(1).float()
        # As it is stored: what the whole numbers are multiplied by is what they are chosen for.
        scale = (largest.masked_fill(largest == 0, 1.0) / 127).to(dense.dtype)
        self.register_buffer("weight", _rounded(dense.float() / scale.float()[:, None], 127))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if x.device.type == "cuda":
            product = F.linear(flat, self.weight.to(x.dtype)) * self.scale
        else:
            product = torch.ops.aten._weight_int8pack_mm(flat, self.weight, self.scale)
        product = product.view(*x.shape[:-1], len(self.weight))
        return product if self.bias is None else product + self.bias

    def dense(self) -> Tensor:
        """The matrix that it stands for, float32 (out, in)."""
        return self.weight.float() * self.scale.float()[:, None]


class Int4Linear(nn.Module):
    """`weight` (out, in / 2), two numbers a byte in the kernel's own order."""

    weight: Tensor
    scales_and_offsets: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        dense = linear.weight.detach()
        size = group_size(dense)
        assert size is not None, "a matrix that fits the kernel"
        groups = dense.float().view(len(dense), -1, size)  # (out, groups, size)
        low, high = groups.amin(2), groups.amax(2)
        scale = ((high - low) / 15).to(dense.dtype)
        scale = scale.masked_fill(scale == 0, 1.0)
        # A number n stands for (n - 8) * scale + offset.
        offset = (low + 8 * scale.float()).to(dense.dtype)
        steps = (groups - offset.float()[..., None]) / scale.float()[..., None] + 8
        whole = steps.round().clamp(0, 15).int().flatten(1)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)
        self.register_buffer("weight", packed)
        pairs = torch.stack((scale, offset), -1).transpose(0, 1).contiguous()
        self.register_buffer("scales_and_offsets", pairs)  # (groups, out, 2)
        self.bias = linear.bias
        self.group_size = size

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            flat, self.weight, self.group_size, self.scales_and_offsets
        )
        product = product.view(*x.shape[:-1], len(self.weight))
        return product if self.bias is None else product + self.bias


def group_size(weight: Tensor) -> int | None:
    """Of a matrix (out, in) that the 4-bit kernel takes; None of one that it does not."""
    rows, columns = weight.shape
    fitting = (size for size in GROUP_SIZES if columns % size == 0)
    return next(fitting, None) if rows % _INT4_ROWS == 0 else None


def _rounded(x: Tensor, largest: int) -> Tensor:
    return x.round_().clamp_(-largest, largest).to(torch.int8)
