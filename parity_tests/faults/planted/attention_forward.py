"""Attention written once more: a layer with places for mistakes around its cache, and a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parity_tests.faults.planted.planting import (
    Model,
    attentions,
    by_token,
    named_as,
    rotates,
    rotation_of,
)
from portkit.nn import rope
from portkit.nn.norms import UnitOffsetRMSNorm

Heads = tuple[Tensor, Tensor, Tensor]
"""Query, key and value, each (batch, heads, tokens, head_dim)."""
Turn = Callable[[Any, Heads, Tensor, Tensor], Heads]
"""From projected heads, with cosine and sine, to what the cache is shown."""
Read = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""From the cache's keys, with cosine, sine and mask, to the keys and the mask of the kernel."""


def rewrite(attention: Any, turn: Turn, read: Read = lambda key, _, __, mask: (key, mask)) -> None:
    """Have `attention` run this. A layer without keys of its own is left as it is."""
    if not getattr(attention, "has_own_kv", True):
        return
    names = [*signature(attention.forward).parameters]

    def forward(*args: Any) -> Tensor:
        given = dict(zip(names, args, strict=True))
        x, mask, cache = given["x"], given["mask"], given["cache"]
        cos, sin = given.get("position_embeddings") or (given["cos"], given["sin"])
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        by_head = (*x.shape[:2], -1, attention.head_dim)
        heads = tuple(project(x).view(by_head).transpose(1, 2) for project in projections)
        query, key, value = turn(attention, heads, cos, sin)
        if getattr(attention, "is_tempered", False):
            factors = attention.temperature(given["past"], x).transpose(0, 1)
            query = (query * factors).to(x.dtype)
        if cache is not None:
            key, value = cache.update(key, value)
        key, mask = read(key, cos, sin, mask)
        if "shared" in given:
            given["shared"].update(key, value)
        context = attention.attend(query, key, value, mask)
        output: Tensor = attention.o_proj(context.flatten(2))
        return output

    attention.forward = named_as(attention.forward, forward)


def normed(attention: Any, name: str, heads: Tensor) -> Tensor:
    """Normalise queries or keys, where the family does and laid out as it does it."""
    norm = getattr(attention, name, None)
    if norm is None:
        return heads
    if isinstance(norm, UnitOffsetRMSNorm):
        return norm(heads)
    by_token: Tensor = norm(heads.transpose(1, 2))
    return by_token.transpose(1, 2)


def turned(attention: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotated as the family does it, in layers that rotate."""
    if not rotates(attention):
        return heads
    rotate = getattr(rope, rotation_of(attention))
    heads = heads.transpose(1, 2) if by_token(attention) else heads
    rotated: Tensor = rotate(heads, cos, sin)
    return rotated.transpose(1, 2) if by_token(attention) else rotated


def as_it_should_be(attention: Any, heads: Heads, cos: Tensor, sin: Tensor) -> Heads:
    query, key, value = before_rotation(attention, heads)
    query, key = turned(attention, query, cos, sin), turned(attention, key, cos, sin)
    return behind_rotation(attention, (query, key, value))


def before_rotation(attention: Any, heads: Heads) -> Heads:
    """The norms of heads that a family has there."""
    names = ("q_norm", "k_norm", "v_norm")
    query, key, value = (normed(attention, *each) for each in zip(names, heads, strict=True))
    return query, key, value


def behind_rotation(attention: Any, heads: Heads) -> Heads:
    """The norm that another family has behind it."""
    query, key, value = heads
    if getattr(attention, "qk_norm", None) is None:
        return heads
    return normed(attention, "qk_norm", query), normed(attention, "qk_norm", key), value


@dataclass(frozen=True)
class Kernel:
    """The eager kernel from its parts, each of which can be another. In all layers, planted."""

    cap: float | None = None
    wide_scores: bool = False
    """Queries times keys in float32."""
    wide_softmax: bool = True
    """False: written by hand in the dtype that comes. (Torch's own is float32 within.)"""
    wide_weights: bool = False
    """The weights stay in float32 for their product with the values."""

    def __call__(self, model: Model) -> str:
        for attention in attentions(model):

            def forward(
                query: Tensor, key: Tensor, value: Tensor, mask: Any, attend: Any = attention.attend
            ) -> Tensor:
                return self._attend(attend.scale, query, key, value, mask)

            attention.attend.forward = forward
        return "model.layers.0.self_attn#context"

    def _attend(
        self, scale: float, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        dtype, num_keys = query.dtype, key.shape[2]
        num_heads, num_queries = query.shape[1:3]
        if mask is None:
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
            mask = mask.tril(num_keys - num_queries)
        key, value = (one.repeat_interleave(num_heads // one.shape[1], 1) for one in (key, value))
        if self.wide_scores:
            query, key = query.float(), key.float()
        scores = query @ key.transpose(2, 3) * scale
        if self.cap is not None:
            scores = self.cap * torch.tanh(scores / self.cap)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        if self.wide_softmax:
            weights = F.softmax(scores, -1, dtype=torch.float32)
        else:
            weights = torch.exp(scores - scores.amax(-1, keepdim=True))
            weights = weights / weights.sum(-1, keepdim=True)
        context = weights @ value.float() if self.wide_weights else weights.to(dtype) @ value
        return context.to(dtype).transpose(1, 2).contiguous()
