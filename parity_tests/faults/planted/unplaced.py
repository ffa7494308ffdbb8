"""Mistakes around layers that know of no positions, attend within chunks, or normalise behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parity_tests.faults.planted.attention_forward import (
    Heads,
    behind_rotation,
    rewrite,
    turned,
)
from parity_tests.faults.planted.planting import (
    NO_NORM_BEHIND,
    Model,
    Need,
    Planting,
    attentions,
    first,
    first_rotated,
    respell,
    rotates,
    rotating,
)
from portkit.nn.attention import visible_keys
from portkit.nn.cache import ChunkedCache

Plant = Callable[[Model], str]
OF_TEMPERATURE = ("attn_scale", "floor_scale")
OF_POSITIONS = ("rotates", "qk_norm", "is_tempered", *OF_TEMPERATURE)


def _query(layer: int) -> str:
    return f"model.layers.{layer}.self_attn#query"


def applied_everywhere(model: Model) -> str:
    own = rotating(model)
    for attention in attentions(model):
        attention.rotates = True
    return _query(next(i for i in range(len(attentions(model))) if i not in own))


def shifted_by_a_layer(model: Model) -> str:
    """Each layer is what the one before it should be."""
    before = [
        {name: getattr(one, name) for name in OF_POSITIONS if hasattr(one, name)}
        for one in attentions(model)
    ]
    kinds = [rotates(one) for one in attentions(model)]
    for attention, held in zip(attentions(model), [before[-1], *before[:-1]], strict=True):
        for name, value in held.items():
            setattr(attention, name, value)
    moved = first([a != b for a, b in zip(kinds, [kinds[-1], *kinds[:-1]], strict=True)], True)
    norm = before[moved].get("qk_norm") is not None
    return f"model.layers.{moved}.self_attn.qk_norm:in" if norm else _query(moved)


def _tempered(change: Callable[[Any], None]) -> Plant:
    def plant(model: Model) -> str:
        tempered = [one.is_tempered for one in attentions(model)]
        for attention in attentions(model):
            change(attention)
        now = [one.is_tempered for one in attentions(model)]
        return _query(first(tempered, True) if now == tempered else _changed(tempered, now))

    return plant


def _changed(before: list[bool], now: list[bool]) -> int:
    return first([a != b for a, b in zip(before, now, strict=True)], True)


def tempered_everywhere(model: Model) -> str:
    scales = {name: getattr(model.config, name) for name in OF_TEMPERATURE}
    return _tempered(_set(is_tempered=True, **scales))(model)


def _set(**values: Any) -> Callable[[Any], None]:
    def change(attention: Any) -> None:
        for name, value in values.items():
            setattr(attention, name, value)

    return change


def _chunks(offset: int | None) -> Plant:
    """Chunks that begin so many tokens late, or none at all within the window that is held."""

    def visible(
        num_queries: int, past: int, padding: Tensor | None, device: torch.device, chunk: int
    ) -> Tensor | None:
        window = visible_keys(num_queries, past, padding, device, chunk)
        if offset is None or window is None:
            return window
        places = torch.arange(past + num_queries, device=device)[None]
        if padding is not None:
            places = places - (padding.cumsum(1) == 0).sum(1, keepdim=True)
        chunks = torch.div(places - offset, chunk, rounding_mode="floor")
        num_keys = window.shape[3]
        same = chunks[:, None, -num_queries:, None] == chunks[:, None, None, -num_keys:]
        return window & same

    def plant(model: Model) -> str:
        respell(model.model, visible_in_chunk=visible)
        return f"model.layers.{_chunked(model)}.self_attn#mask"

    return plant


def _chunked(model: Model) -> int:
    return first([type(one) is ChunkedCache for one in model.new_cache(1, 1).layers], True)


def norm_missing(model: Model) -> str:
    place = first_rotated(model)
    for attention in attentions(model):
        attention.qk_norm = None
    return place


def norm_before_rotation(model: Model) -> str:
    def turn(attention: Any, heads: Heads, cos: Tensor, sin: Tensor) -> Heads:
        query, key, value = behind_rotation(attention, heads)
        return turned(attention, query, cos, sin), turned(attention, key, cos, sin), value

    for attention in attentions(model):
        rewrite(attention, turn)
    return first_rotated(model)


SOME_ROTATE = Need(
    "all layers rotate",
    lambda model: len(rotating(model)) < len(attentions(model)),
)
TEMPERED = Need(
    "no layer scales its queries by a temperature",
    lambda model: any(getattr(one, "is_tempered", False) for one in attentions(model)),
)
CHUNKED = Need(
    "no layer attends within chunks",
    lambda model: any(type(one) is ChunkedCache for one in model.new_cache(1, 1).layers),
)
NORM_BEHIND = Need("no norm follows the rotation", lambda model: not NO_NORM_BEHIND.holds(model))

PLANTINGS = (
    Planting("rope.applied_everywhere", applied_everywhere, (SOME_ROTATE,)),
    Planting("rope.shifted_by_a_layer", shifted_by_a_layer, (SOME_ROTATE,)),
    Planting("attention.chunk_as_window", _chunks(None), (CHUNKED,)),
    Planting("attention.chunk_plus_one", _chunks(1), (CHUNKED,)),
    Planting("attention.chunk_minus_one", _chunks(-1), (CHUNKED,)),
    Planting("attention.temperature_missing", _tempered(_set(is_tempered=False)), (TEMPERED,)),
    Planting("attention.temperature_floor", _tempered(_set(floor_scale=8)), (TEMPERED,)),
    Planting("attention.temperature_scale", _tempered(_set(attn_scale=0.1)), (TEMPERED,)),
    Planting("attention.temperature_everywhere", tempered_everywhere, (TEMPERED,)),
    Planting("attention.norm_after_rotation_missing", norm_missing, (NORM_BEHIND,)),
    Planting("attention.norm_before_rotation", norm_before_rotation, (NORM_BEHIND,)),
)
