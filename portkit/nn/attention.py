"""Scaled dot-product attention: which keys a query sees, and two kernels that compute it.

A mask is either None, which always means "each query sees all keys up to its own", or boolean
(batch or 1, 1, queries, keys), True where visible. The kernels are modules of their own, so that
query, key, value and mask can be observed like any other input. When the reference passes a mask
and when it does not decides which kernel torch picks, and with it the bits: `visible_keys` and
`SdpaAttention` follow it branch by branch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_GROUPED_HEAD_DIM = 256
"""Up to here torch's fused kernels take grouped heads; beyond, keys are repeated."""


def visible_keys(
    num_queries: int,
    past: int,
    padding: Tensor | None,
    device: torch.device,
    window: int | None = None,
) -> Tensor | None:
    """The mask for queries past, past+1, …, of a layer that sees everything or a sliding window.

    `padding`, (batch, past + queries) bool, is True at real tokens; None where there is no padding.
    In a window a token sees itself and the `window - 1` before it, which is all that such a layer
    keeps of its past.
    """
    held = past if window is None else min(past, window - 1)
    num_keys = held + num_queries
    plain = num_queries in (1, num_keys)
    within_window = window is None or num_keys < window
    if padding is None and plain and within_window:
        return None
    queries = torch.arange(past, past + num_queries, device=device)[:, None]
    keys = torch.arange(past - held, past + num_queries, device=device)[None, :]
    visible = keys <= queries
    if window is not None:
        visible &= keys > queries - window
    visible = visible[None, None]  # (1, 1, queries, keys)
    if padding is not None:
        visible = visible & padding[:, None, None, -num_keys:]
    return visible


def visible_in_chunk(
    num_queries: int, past: int, padding: Tensor | None, device: torch.device, chunk: int
) -> Tensor | None:
    """The same for a layer in which a token sees the tokens of its own chunk of `chunk` alone.

    Chunks are counted from a row's first real token. Such a layer keeps the `chunk - 1` tokens
    before, as a window does, and a mask is left out where a window's would be.
    """
    visible = visible_keys(num_queries, past, padding, device, chunk)
    if visible is None:
        return None
    num_keys = visible.shape[3]
    indices = torch.arange(past + num_queries, device=device)[None]
    if padding is not None:
        indices = indices - (padding.cumsum(1) == 0).sum(1, keepdim=True)
    chunks = indices // chunk  # (batch or 1, past + queries)
    same = chunks[:, None, -num_queries:, None] == chunks[:, None, None, -num_keys:]
    return visible & same


class SdpaAttention(nn.Module):
    """`torch`'s fused kernel.

    query (batch, heads, queries, head_dim), key and value (batch, kv_heads, keys, head_dim);
    returns (batch, queries, heads, head_dim).
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, num_heads, num_queries, head_dim = query.shape
        num_groups = key.shape[1]
        grouped = num_heads != num_groups
        if grouped and (mask is not None or head_dim > MAX_GROUPED_HEAD_DIM):
            if num_queries == 1:  # the heads of a group become the queries of one key head
                query = query.reshape(batch, num_groups, num_heads // num_groups, head_dim)
            else:
                key, value = _repeat_heads(key, num_heads), _repeat_heads(value, num_heads)
            grouped = False
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and num_queries > 1,
            scale=self.scale,
            enable_gqa=grouped,
        )
        context = context.reshape(batch, num_heads, num_queries, head_dim)
        return context.transpose(1, 2).contiguous()


class EagerAttention(nn.Module):
    """The same from its parts, weights held in full; the softmax alone is float32.

    Hidden keys get the dtype's lowest value, not -inf: a query that sees nothing (a padded row)
    then averages, where the fused kernel returns zeros. Shapes as in `SdpaAttention`.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        num_heads, num_queries = query.shape[1:3]
        if mask is None:
            mask = torch.ones(num_queries, key.shape[2], dtype=torch.bool, device=query.device)
            mask = mask.tril(key.shape[2] - num_queries)
        key, value = _repeat_heads(key, num_heads), _repeat_heads(value, num_heads)
        scores = torch.matmul(query, key.transpose(2, 3)) * self.scale
        lowest = torch.finfo(scores.dtype).min
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, lowest)
        weights = self.weights(scores).to(query.dtype)
        return torch.matmul(weights, value).transpose(1, 2).contiguous()

    def weights(self, scores: Tensor) -> Tensor:
        return F.softmax(scores, dim=-1, dtype=torch.float32)


class LowPrecisionEagerAttention(EagerAttention):
    """The same with a softmax in the scores' own dtype."""

    def weights(self, scores: Tensor) -> Tensor:
        return F.softmax(scores, dim=-1)


KERNELS: dict[str, Callable[[float], nn.Module]] = {"sdpa": SdpaAttention, "eager": EagerAttention}


def _repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """(batch, kv_heads, keys, head_dim) to (batch, num_heads, keys, head_dim), each repeated."""
    batch, num_groups, num_keys, head_dim = x.shape
    if num_groups == num_heads:
        return x
    repeats = num_heads // num_groups
    x = x[:, :, None].expand(batch, num_groups, repeats, num_keys, head_dim)
    return x.reshape(batch, num_heads, num_keys, head_dim)
