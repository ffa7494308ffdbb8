"""Ports with one mistake each, planted in a loaded model: what the harness must place and name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from portkit.nn.cache import SlidingCache


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Have `module` run `forward(original, *args)` instead of its own."""
    original = module.forward
    module.forward = lambda *args, **kwargs: forward(original, *args, **kwargs)  # type: ignore[method-assign]


@dataclass(frozen=True)
class Fault:
    """One planted mistake, and where the first culprit must be."""

    plant: Callable[[Any], None]
    site: str
    kind: str
    wrong_in_float32: bool = True


def _epsilon(model: Any) -> None:
    model.model.layers[3].input_layernorm.eps = 1.0001e-6


def _rounded_offset(model: Any) -> None:
    norm = model.model.layers[3].input_layernorm

    def forward(_: Any, x: Tensor) -> Tensor:
        offset = (1.0 + norm.weight).to(x.dtype)  # in the weight's dtype: rounded
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + norm.eps)
        return (y * offset.float()).to(x.dtype)

    replace_forward(norm, forward)


def _float_embedding_scale(model: Any) -> None:
    embed = model.model.embed_tokens

    def forward(_: Any, input_ids: Tensor) -> Tensor:
        scale = torch.tensor(embed.embedding_dim**0.5, dtype=torch.float32)
        rows = nn.functional.embedding(input_ids, embed.weight)
        return (rows.float() * scale).to(embed.weight.dtype)

    replace_forward(embed, forward)


def _lost_residual(model: Any) -> None:
    layer = model.model.layers[3]

    def forward(_: Any, h: Tensor, *args: Any) -> Tensor:
        h = layer.post_attention_layernorm(layer.self_attn(layer.input_layernorm(h), *args))
        return h + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(h)))

    replace_forward(layer, forward)


def _lost_second_residual(model: Any) -> None:
    layer = model.model.layers[3]

    def forward(_: Any, h: Tensor, *args: Any) -> Tensor:
        attended = layer.self_attn(layer.input_layernorm(h), *args)
        h = h + layer.post_attention_layernorm(attended)
        return layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(h)))

    replace_forward(layer, forward)


def _wrong_tables(model: Any) -> None:
    """Layer 3 slides; it is given the full layers' tables."""
    decoder = model.model
    full = decoder.rotary_emb["full_attention"]
    seen: list[Tensor] = []

    def decode(own: Any, input_ids: Tensor, positions: Tensor, *args: Any) -> Tensor:
        seen.append(positions)
        return own(input_ids, positions, *args)

    def attend(own: Any, h: Tensor, *tables_mask_cache: Any) -> Tensor:
        return own(h, *full.forward(seen[-1], h.dtype), *tables_mask_cache[2:])

    replace_forward(decoder, decode)
    replace_forward(decoder.layers[3].self_attn, attend)


def _query_scale(model: Any) -> None:
    norm = model.model.layers[3].self_attn.q_norm
    replace_forward(norm, lambda own, x: own(x) * 1.01)


def _kernel_scale(model: Any) -> None:
    model.model.layers[3].self_attn.attend.scale *= 1.01


def _window_off_by_one(model: Any) -> None:
    model.model.windows["sliding_attention"] += 1
    own = model.new_cache

    def new_cache(batch: int, length: int) -> Any:
        cache = own(batch, length)
        for layer in cache.layers:
            if isinstance(layer, SlidingCache):
                layer.window += 1
        return cache

    model.new_cache = new_cache


def _stale_cache(model: Any) -> None:
    """Layer 3 forgets to store the newest key of each pass but the first."""
    own = model.new_cache

    def new_cache(batch: int, length: int) -> Any:
        cache = own(batch, length)
        layer = cache.layers[3]
        advance = layer.advance

        def stale(num_tokens: int) -> None:
            advance(num_tokens)
            if layer._held is not None and layer._held[0].shape[2] > 1:
                keys, _ = layer._held
                keys[:, :, -1] = keys[:, :, -2]

        layer.advance = stale
        return cache

    model.new_cache = new_cache


FAULTS: dict[str, Fault] = {
    "epsilon": Fault(_epsilon, "model.layers.3.input_layernorm", "function"),
    "rounded offset": Fault(_rounded_offset, "model.layers.3.input_layernorm", "care", False),
    "embedding scale in float32": Fault(
        _float_embedding_scale, "model.embed_tokens", "function", False
    ),
    "lost residual": Fault(_lost_residual, "model.layers.3.pre_feedforward_layernorm:in", "glue"),
    "lost second residual": Fault(_lost_second_residual, "model.layers.3", "glue"),
    "tables of the wrong layer type": Fault(
        _wrong_tables, "model.layers.3.self_attn#query", "glue"
    ),
    "query norm scaled": Fault(_query_scale, "model.layers.3.self_attn.q_norm", "function"),
    "kernel scaled": Fault(_kernel_scale, "model.layers.3.self_attn#context", "function"),
    "window off by one": Fault(_window_off_by_one, "model.layers.0.self_attn#mask", "shape"),
    "stale cache": Fault(_stale_cache, "model.layers.3.self_attn#key", "glue"),
}
