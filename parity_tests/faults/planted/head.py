"""Mistakes at both ends of the model: the embedding's scale, last layer, last norm, soft cap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parity_tests.faults.planted.planting import (
    LOW,
    NO_SOFT_CAP,
    SCALED_EMBEDDING,
    SOFT_CAP,
    Model,
    Need,
    Planting,
    layers,
    replace_forward,
)


def _embedded(scale: Callable[[Any, Tensor], Tensor]) -> Callable[[Model], str]:
    def plant(model: Model) -> str:
        embed = model.model.embed_tokens

        def forward(_: Any, input_ids: Tensor) -> Tensor:
            return scale(embed, F.embedding(input_ids, embed.weight))

        replace_forward(embed, forward)
        return "model.embed_tokens"

    return plant


def _in_float32(embed: Any, rows: Tensor) -> Tensor:
    scale = torch.tensor(embed.embedding_dim**0.5, dtype=torch.float32)
    return (rows.float() * scale).to(rows.dtype)


def _twice(embed: Any, rows: Tensor) -> Tensor:
    scale = embed.embed_scale.to(rows.dtype)
    return rows * scale * scale


def last_layer_missing(model: Model) -> str:
    decoder, own = model.model, model.new_cache
    count = len(layers(model)) - 1
    decoder.layers = decoder.layers[:count]
    if not hasattr(decoder, "layer_types") and hasattr(decoder, "config"):
        kinds = decoder.config.layer_types[:count]
        decoder.config = replace(decoder.config, layer_types=kinds)
    elif hasattr(decoder, "layer_types"):
        decoder.layer_types = decoder.layer_types[:count]
    elif hasattr(decoder, "windows"):
        decoder.windows = decoder.windows[:count]

    def new_cache(batch: int, length: int) -> Any:
        cache = own(batch, length)
        cache.layers = cache.layers[:count]
        return cache

    model.new_cache = new_cache
    return f"model.layers.{count}:in"


def final_norm_missing(model: Model) -> str:
    model.model.norm.forward = lambda x: x
    return "model.norm"


def final_norm_twice(model: Model) -> str:
    """In the decoder, and again before the head."""
    replace_forward(model.lm_head, lambda own, hidden: own(model.model.norm(hidden)))
    return "model.norm:in"


def _capped(cap: float) -> Callable[[Model], str]:
    def plant(model: Model) -> str:
        own = model.logits
        model.logits = lambda hidden: cap * torch.tanh(own(hidden) / cap)
        return "#logits"

    return plant


def _scaled_by(factor: Callable[[float], float]) -> Callable[[Model], str]:
    def plant(model: Model) -> str:
        scale = factor(model.config.logit_scale)
        model.logits = lambda hidden: model.lm_head(hidden) * scale
        return "#logits"

    return plant


LOGIT_SCALE = Need("logits are not scaled", lambda model: hasattr(model.config, "logit_scale"))


def softcap_missing(model: Model) -> str:
    model.logits = model.lm_head.__call__
    return "#logits"


PLANTINGS = (
    Planting("embedding.scale_missing", _embedded(lambda _, rows: rows), (SCALED_EMBEDDING,)),
    Planting("embedding.scale_in_float32", _embedded(_in_float32), (SCALED_EMBEDDING,), LOW),
    Planting("embedding.scale_twice", _embedded(_twice), (SCALED_EMBEDDING,)),
    Planting("head.last_layer_missing", last_layer_missing),
    Planting("head.final_norm_missing", final_norm_missing),
    Planting("head.final_norm_twice", final_norm_twice),
    Planting("head.softcap_missing", softcap_missing, (SOFT_CAP,)),
    Planting("head.logit_scale_missing", _scaled_by(lambda _: 1.0), (LOGIT_SCALE,)),
    Planting("head.logit_scale_inverted", _scaled_by(lambda scale: 1 / scale), (LOGIT_SCALE,)),
    Planting("head.softcap_applied", _capped(30.0), (NO_SOFT_CAP,)),
)
