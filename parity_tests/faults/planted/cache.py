"""Mistakes that only a second pass shows: positions of later passes, and what a cache keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parity_tests.faults.planted.attention_forward import (
    Heads,
    as_it_should_be,
    before_rotation,
    rewrite,
    turned,
)
from parity_tests.faults.planted.planting import (
    NO_NORM_BEHIND,
    SLIDING,
    Model,
    Planting,
    attentions,
    first_rotated,
    tables,
    windows,
)
from portkit.nn.cache import FullCache, SlidingCache

Count = Callable[[Tensor, int, Tensor | None], Tensor]
"""From positions, the number of tokens held and the padding to the positions that are taken."""


def _counted(count: Count) -> Callable[[Model], str]:
    def plant(model: Model) -> str:
        own = model.model.forward

        def forward(input_ids: Tensor, positions: Tensor, cache: Any, padding: Any) -> Tensor:
            past = 0 if cache is None else cache.length
            hidden: Tensor = own(input_ids, count(positions, past, padding), cache, padding)
            return hidden

        model.model.forward = forward
        return f"model#cos{next(iter(tables(model)))}"

    return plant


def _one_too_far(positions: Tensor, past: int, _: Tensor | None) -> Tensor:
    return positions + 1 if past and positions.shape[1] == 1 else positions


def _from_zero(positions: Tensor, past: int, _: Tensor | None) -> Tensor:
    return positions - past


def _as_if_unpadded(positions: Tensor, past: int, padding: Tensor | None) -> Tensor:
    if padding is None:
        return positions
    return torch.arange(past, past + positions.shape[1]).expand_as(positions)


def _keeping(extra: int) -> Callable[[Model], str]:
    """Sliding layers keep so many keys more, and show them: the prompt itself is right."""

    def plant(model: Model) -> str:
        own = model.new_cache

        def new_cache(batch: int, length: int) -> Any:
            cache = own(batch, length)
            for layer in cache.layers:
                if isinstance(layer, SlidingCache):
                    layer.window += extra
            return cache

        def read(
            key: Tensor, _: Tensor, __: Tensor, mask: Tensor | None
        ) -> tuple[Tensor, Tensor | None]:
            """The mask that was made is fitted to what the cache gives."""
            missing = 0 if mask is None else key.shape[2] - mask.shape[3]
            if mask is None or missing == 0:
                return key, mask
            return key, torch.nn.functional.pad(mask, (missing, 0), value=True)

        model.new_cache = new_cache
        for attention in attentions(model):
            rewrite(attention, as_it_should_be, read)
        slides = next(i for i, window in enumerate(windows(model)) if window)
        return f"model.layers.{slides}.self_attn#mask"

    return plant


def keys_before_rotation(model: Model) -> str:
    """Cached as projected; what is read is rotated by the tables of the pass that reads."""

    def turn(attention: Any, heads: Heads, cos: Tensor, sin: Tensor) -> Heads:
        query, key, value = before_rotation(attention, heads)
        return turned(attention, query, cos, sin), key, value

    for attention in attentions(model):

        def read(
            key: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, attention: Any = attention
        ) -> tuple[Tensor, Tensor | None]:
            past = key.shape[2] - cos.shape[1]
            cos, sin = (torch.cat((one[:, :1].expand(-1, past, -1), one), 1) for one in (cos, sin))
            return turned(attention, key, cos, sin), mask

        rewrite(attention, turn, read)
    return first_rotated(model, "key")


def stale_after_chunk(model: Model) -> str:
    """A layer forgets to store a chunk's newest key: the one before stands in its place."""
    at, own = len(model.new_cache(1, 1).layers) - 1, model.new_cache

    def new_cache(batch: int, length: int) -> Any:
        cache = own(batch, length)
        layer = cache.layers[at]
        advance = layer.advance

        def stale(num_tokens: int) -> None:
            advance(num_tokens)
            keys = layer._held[0]
            end = layer._past if isinstance(layer, FullCache) else keys.shape[2]
            if num_tokens > 1:
                keys[:, :, end - 1] = keys[:, :, end - 2]

        layer.advance = stale
        return cache

    model.new_cache = new_cache
    return f"model.layers.{at}.self_attn#key"


PLANTINGS = (
    Planting("cache.position_by_one", _counted(_one_too_far)),
    Planting("cache.positions_restart", _counted(_from_zero)),
    Planting("cache.overwritten_early", _keeping(-1), (SLIDING,)),
    Planting("cache.overwritten_late", _keeping(1), (SLIDING,)),
    Planting("cache.keys_before_rotation", keys_before_rotation, (NO_NORM_BEHIND,)),
    Planting("cache.stale_after_chunk", stale_after_chunk),
    Planting("cache.padded_positions", _counted(_as_if_unpadded)),
)
