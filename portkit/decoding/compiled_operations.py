"""Projection and attention of a decode step, written so that torch's compiler streams weights.

The same functions as in `operations`, and the same arguments. What makes them fast was measured:
rows in chunks, which become one loop with an accumulator and a memory stream each, and barriers,
without which what a projection reads is computed once more for every row. Knows tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from portkit.decoding import operations

_MIN_ROWS_OF_EIGHT = 1536


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `operations.project`: rows in chunks that are summed side by side, in float32."""
    x = _barrier(x.reshape(-1)).float()
    sums = [(part.float() * x).sum(-1) for part in weight.chunk(_num_chunks(len(weight)))]
    product = torch.cat(sums).to(weight.dtype)
    product = product if bias is None else product + bias
    return _barrier(product).view(1, 1, -1)


def attend(
    query: Tensor,
    new: tuple[Tensor, Tensor],
    kept: tuple[Tensor, Tensor],
    slot: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """As `operations.attend`, for one row; weights stay float32. Keys are read once for a group."""
    (key, value), (keys, values) = new, kept
    _, num_heads, _, head_dim = query.shape
    num_groups = key.shape[1]
    keys.index_copy_(0, slot, key.permute(2, 0, 1, 3))
    values.index_copy_(0, slot, value.permute(2, 0, 1, 3))
    grouped = _barrier(query.reshape(num_groups, -1, head_dim)).float() * scale
    seen = keys[:, 0].float()  # (slots, kv_heads, head_dim)
    scores = torch.stack([(seen * head).sum(-1) for head in grouped.unbind(1)])
    if mask is not None:
        scores = scores.masked_fill(~mask.reshape(-1, 1), -torch.inf)
    scores = _barrier(scores)  # (heads of a group, slots, kv_heads)
    weights = _barrier(torch.exp(scores - scores.amax(1, keepdim=True)))
    total = weights.sum(1, keepdim=True)
    seen = values[:, 0].float()
    context = torch.stack([(seen * head[..., None]).sum(0) for head in weights.unbind(0)])
    context = context / total.transpose(1, 2)  # (heads of a group, kv_heads, head_dim)
    context = context.transpose(0, 1).reshape(1, 1, num_heads, head_dim)
    return _barrier(context.to(value.dtype))


def shortlist_bounds(
    x: Tensor, copy: Tensor, scale: Tensor, radius: Tensor, slack: Tensor
) -> tuple[Tensor, Tensor]:
    """As `operations.shortlist_bounds`."""
    x = _barrier(x.reshape(-1).float())
    sums = [(part.float() * x).sum(-1) for part in copy.chunk(_num_chunks(len(copy)))]
    return operations.around(_barrier(torch.cat(sums) * scale), x, radius, slack)


def int8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """As `_weight_int8pack_mm`, of one row: x (1, in), int8 (out, in), (out,); gives (1, out)."""
    row = _barrier(x.reshape(-1)).float()
    sums = [(part.float() * row).sum(-1) for part in weight.chunk(_num_chunks(len(weight)))]
    return _barrier((torch.cat(sums) * scale.float()).to(x.dtype)).view(1, -1)


def _barrier(x: Tensor) -> Tensor:
    x = x.contiguous()
    return torch.as_strided(x, x.shape, x.stride())


def _num_chunks(num_rows: int) -> int:
    wanted = 8 if num_rows >= _MIN_ROWS_OF_EIGHT else 4
    return next(n for n in (wanted, 4, 2, 1) if num_rows % n == 0)


IN_PLACE_OF = {
    operations.project: project,
    operations.attend: attend,
    operations.shortlist_bounds: shortlist_bounds,
    torch.ops.aten._weight_int8pack_mm: int8_product,
}
"""What a graph's calls become before it is compiled."""
