"""Mistakes of a loader: the right tensors in the wrong places, or not at all.

All of them are found before anything runs, where parameters are compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parity_tests.faults.planted.planting import (
    BIASES,
    MANY_LAYERS,
    MORE_THAN_ONE_NORM,
    NORMS_OF_HEADS,
    ONE_KEY_A_QUERY,
    SQUARE,
    TIED,
    UNTIED,
    Model,
    Planting,
    attentions,
    exchange,
    feed_forwards,
    hold,
    layers,
    rotation_of,
)


def _at(name: str) -> str:
    return f"model.layers.{name} (parameter)"


def q_k_swapped(model: Model) -> str:
    exchange(attentions(model)[1].q_proj, attentions(model)[1].k_proj)
    return _at("1.self_attn.q_proj.weight")


def k_v_swapped(model: Model) -> str:
    exchange(attentions(model)[1].k_proj, attentions(model)[1].v_proj)
    return _at("1.self_attn.k_proj.weight")


def gate_up_swapped(model: Model) -> str:
    name, block = [*feed_forwards(model).items()][-1]
    exchange(block.gate_proj, block.up_proj)
    return f"{name}.gate_proj.weight (parameter)"


def o_proj_transposed(model: Model) -> str:
    for attention in attentions(model):
        hold(attention.o_proj, "weight", attention.o_proj.weight.T)
    return _at("0.self_attn.o_proj.weight")


def q_proj_transposed(model: Model) -> str:
    attention = attentions(model)[1]
    hold(attention.q_proj, "weight", attention.q_proj.weight.T)
    return _at("1.self_attn.q_proj.weight")


def norms_swapped(model: Model) -> str:
    exchange(layers(model)[1].input_layernorm, layers(model)[1].post_attention_layernorm)
    return _at("1.input_layernorm.weight")


def head_norms_swapped(model: Model) -> str:
    exchange(attentions(model)[1].q_norm, attentions(model)[1].k_norm)
    return _at("1.self_attn.q_norm.weight")


def neighbouring_layers(model: Model) -> str:
    _reorder(model, [1, 0, *range(2, len(layers(model)))])
    return _at("0.self_attn.q_proj.weight")


def lexicographic_layers(model: Model) -> str:
    _reorder(model, sorted(range(len(layers(model))), key=str))
    return _at("2.self_attn.q_proj.weight")


def _reorder(model: Model, order: list[int]) -> None:
    """What layers hold, and not what they are: of some families they are of different kinds."""
    held = [dict(layer.named_parameters()) for layer in layers(model)]
    for layer, source in zip(layers(model), order, strict=True):
        _hold_all(layer, held[source])


def _hold_all(layer: Any, theirs: dict[str, Tensor]) -> None:
    """Another layer's tensors, where this one has a place of that shape for them."""
    for path, module in layer.named_modules():
        for name, own in [*module.named_parameters(recurse=False)]:
            tensor = theirs.get(f"{path}.{name}".removeprefix("."))
            if tensor is not None and tensor.shape == own.shape:
                hold(module, name, tensor)


def layer_zero_everywhere(model: Model) -> str:
    for layer in layers(model)[1:]:
        _hold_all(layer, dict(layers(model)[0].named_parameters()))
    return _at("1.self_attn.q_proj.weight")


def projections(attention: Any) -> list[Any]:
    """Of queries and keys, where a layer has keys of its own."""
    found = (getattr(attention, name, None) for name in ("q_proj", "k_proj"))
    return [one for one in found if one is not None]


def qk_rows_interleaved(model: Model) -> str:
    """Rows as the original release stores them: a pair's two channels side by side."""
    for attention in attentions(model):
        for projection in projections(attention):
            for name, tensor in [*projection.named_parameters()]:
                hold(projection, name, _relaid(attention, tensor))
    return _at("0.self_attn.q_proj.weight")


def _relaid(attention: Any, rows: Tensor) -> Tensor:
    """From halves to neighbours, or the other way."""
    half = attention.head_dim // 2
    halves = rotation_of(attention) in {"rotate", "rotate_by_token"}
    pairs = (-1, 2, half) if halves else (-1, half, 2)
    return rows.unflatten(0, pairs).transpose(1, 2).flatten(0, 2)


def tie_ignored(model: Model) -> str:
    drawn = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(5))
    hold(model.lm_head, "weight", (0.02 * drawn).to(model.lm_head.weight.dtype))
    return "lm_head.weight (parameter)"


def tied_although_untied(model: Model) -> str:
    model.lm_head.weight = model.model.embed_tokens.weight
    return "lm_head.weight (parameter)"


def norm_at_initial_value(model: Model) -> str:
    norm = layers(model)[1].input_layernorm
    fresh = type(norm)(len(norm.weight), norm.eps).weight
    hold(norm, "weight", fresh.to(norm.weight.dtype))
    return _at("1.input_layernorm.weight")


def matrix_at_initial_value(model: Model) -> str:
    name, block = [*feed_forwards(model).items()][-1]
    up_proj = block.up_proj
    drawn = torch.randn(up_proj.weight.shape, generator=torch.Generator().manual_seed(6))
    hold(up_proj, "weight", (0.02 * drawn).to(up_proj.weight.dtype))
    return f"{name}.up_proj.weight (parameter)"


def bias_lost(model: Model) -> str:
    for attention in attentions(model):
        hold(attention.o_proj, "bias", torch.zeros_like(attention.o_proj.bias))
    return _at("0.self_attn.o_proj.bias")


PLANTINGS = (
    Planting("loader.q_k_swapped", q_k_swapped, (ONE_KEY_A_QUERY,)),
    Planting("loader.k_v_swapped", k_v_swapped),
    Planting("loader.gate_up_swapped", gate_up_swapped),
    Planting("loader.square_transposed", o_proj_transposed, (SQUARE,), variant="o_proj"),
    Planting("loader.square_transposed", q_proj_transposed, (SQUARE,), variant="q_proj"),
    Planting("loader.norms_swapped", norms_swapped, (MORE_THAN_ONE_NORM,), variant="of a layer"),
    Planting("loader.norms_swapped", head_norms_swapped, (NORMS_OF_HEADS,), variant="of heads"),
    Planting("loader.neighbouring_layers", neighbouring_layers),
    Planting("loader.lexicographic_layers", lexicographic_layers, (MANY_LAYERS,)),
    Planting("loader.layer_zero_everywhere", layer_zero_everywhere),
    Planting("loader.qk_rows_interleaved", qk_rows_interleaved),
    Planting("loader.tie_ignored", tie_ignored, (TIED,)),
    Planting("loader.tied_although_untied", tied_although_untied, (UNTIED,)),
    Planting("loader.norm_at_initial_value", norm_at_initial_value),
    Planting("loader.matrix_at_initial_value", matrix_at_initial_value),
    Planting("loader.bias_lost", bias_lost, (BIASES,)),
)
