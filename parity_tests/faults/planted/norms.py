"""Mistakes in norms: epsilon, weight, casts, and which norm stands where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parity_tests.faults.planted.planting import (
    CASTS_FIRST,
    CASTS_LAST,
    CENTRED,
    LOW,
    MORE_THAN_ONE_NORM,
    NO_OFFSET,
    NO_SANDWICH,
    NOT_CENTRED,
    OFFSET,
    ONE_STREAM,
    SANDWICH,
    SEQUENTIAL,
    Model,
    Planting,
    feed_forward,
    first_norm,
    layers,
    named_as,
    norms,
)

Plant = Callable[[Model], str]


def epsilon(model: Model) -> str:
    for norm in norms(model):
        norm.eps = 1e-6 if norm.eps != 1e-6 else 1e-5
    return first_norm(model)


def slight_epsilon(model: Model) -> str:
    """A difference that no low precision sees."""
    norm = layers(model)[1].input_layernorm
    norm.eps *= 1.0001
    return "model.layers.1.input_layernorm"


def _everywhere(compute: Callable[[Any, Tensor], Tensor]) -> Plant:
    """All norms of the model compute something else."""

    def plant(model: Model) -> str:
        for norm in norms(model):
            norm.forward = lambda x, norm=norm: compute(norm, x)
        return first_norm(model)

    return plant


def _normalised(norm: Any, x: Tensor) -> Tensor:
    wide = _centred(norm, x)
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)


def _centred(norm: Any, x: Tensor) -> Tensor:
    """In float32, without its mean where the family subtracts it."""
    wide = x.float()
    is_centred = type(norm).__name__ == "CentredLayerNorm"
    return wide - wide.mean(-1, keepdim=True) if is_centred else wide


def _as_the_family(norm: Any, normalised: Tensor, dtype: torch.dtype) -> Tensor:
    """The family's own last step."""
    kind = type(norm).__name__
    if kind == "UnitOffsetRMSNorm":
        return (normalised * (1.0 + norm.weight.float())).to(dtype)
    if not hasattr(norm, "weight"):
        return normalised.to(dtype)
    if kind != "RMSNorm":
        return (norm.weight.float() * normalised).to(dtype)
    weighted: Tensor = norm.weight * normalised.to(dtype)
    return weighted


def _epsilon_outside_root(norm: Any, x: Tensor) -> Tensor:
    wide = _centred(norm, x)
    root = wide.pow(2).mean(-1, keepdim=True).sqrt() + norm.eps
    return _as_the_family(norm, wide / root, x.dtype)


def _offset_missing(norm: Any, x: Tensor) -> Tensor:
    return (_normalised(norm, x) * norm.weight.float()).to(x.dtype)


def _offset_added(norm: Any, x: Tensor) -> Tensor:
    if not hasattr(norm, "weight"):
        return _normalised(norm, x).to(x.dtype)
    if type(norm).__name__ != "RMSNorm":
        return ((1.0 + norm.weight.float()) * _normalised(norm, x)).to(x.dtype)
    added: Tensor = (1.0 + norm.weight) * _normalised(norm, x).to(x.dtype)
    return added


def _weight_before_cast(norm: Any, x: Tensor) -> Tensor:
    if not hasattr(norm, "weight"):
        return _normalised(norm, x).to(x.dtype)
    return (norm.weight.float() * _normalised(norm, x)).to(x.dtype)


def _cast_before_weight(norm: Any, x: Tensor) -> Tensor:
    normalised = _normalised(norm, x).to(x.dtype)
    if not hasattr(norm, "weight"):
        return normalised
    is_offset = type(norm).__name__ == "UnitOffsetRMSNorm"
    weighted: Tensor = normalised * (1.0 + norm.weight if is_offset else norm.weight)
    return weighted


def _mean_subtracted(norm: Any, x: Tensor) -> Tensor:
    wide = x.float()
    wide = wide - wide.mean(-1, keepdim=True)
    return _as_the_family(norm, _normalised(norm, wide), x.dtype)


def _mean_kept(norm: Any, x: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return _as_the_family(norm, wide, x.dtype)


def _sum_for_mean(norm: Any, x: Tensor) -> Tensor:
    wide = _centred(norm, x)
    wide = wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) + norm.eps)
    return _as_the_family(norm, wide, x.dtype)


def _missing(name: str) -> Plant:
    """One kind of norm is left out, in all layers."""

    def plant(model: Model) -> str:
        for layer in layers(model):
            getattr(layer, name).forward = lambda x: x
        return f"model.layers.0.{name}"

    return plant


def _exchanged(one: str, other: str) -> Plant:
    """Two norms, each called where the other is meant; both hold what they should."""

    def plant(model: Model) -> str:
        layer = layers(model)[1]
        a, b = getattr(layer, one), getattr(layer, other)
        a.forward, b.forward = b.forward, a.forward
        return f"model.layers.1.{one}"

    return plant


def pre_for_post(model: Model) -> str:
    """Llama's block with this family's names: what follows attention normalises the next input."""
    for layer in layers(model):

        def forward(
            h: Tensor, cos: Tensor, sin: Tensor, mask: Any, cache: Any, layer: Any = layer
        ) -> Tensor:
            h = h + layer.self_attn(layer.input_layernorm(h), cos, sin, mask, cache)
            normed = layer.pre_feedforward_layernorm(layer.post_attention_layernorm(h))
            summed: Tensor = h + layer.post_feedforward_layernorm(layer.mlp(normed))
            return summed

        layer.forward = forward
    return "model.layers.0.post_attention_layernorm:in"


def post_for_pre(model: Model) -> str:
    """What is called `post_attention` is taken to normalise the output of attention."""
    for layer in layers(model):

        def forward(h: Tensor, *rest: Any, layer: Any = layer) -> Tensor:
            attended = layer.self_attn(layer.input_layernorm(h), *rest)
            h = h + layer.post_attention_layernorm(attended)
            summed: Tensor = h + feed_forward(layer)(h).view(h.shape)
            return summed

        layer.forward = named_as(layer.forward, forward)
    return "model.layers.0.post_attention_layernorm:in"


def offset_rounded(model: Model) -> str:
    """`1 + weight` in the weight's dtype, all else as it should be."""
    norm = layers(model)[1].input_layernorm

    def forward(x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
        return (wide * (1.0 + norm.weight).to(x.dtype).float()).to(x.dtype)

    norm.forward = forward
    return "model.layers.1.input_layernorm"


PLANTINGS = (
    Planting("norm.epsilon", epsilon),
    Planting("norm.epsilon", slight_epsilon, variant="by a ten-thousandth"),
    Planting("norm.epsilon_outside_root", _everywhere(_epsilon_outside_root)),
    Planting("norm.offset_missing", _everywhere(_offset_missing), (OFFSET,)),
    Planting("norm.offset_added", _everywhere(_offset_added), (NO_OFFSET,)),
    Planting("norm.weight_before_cast", _everywhere(_weight_before_cast), (CASTS_FIRST,), LOW),
    Planting("norm.cast_before_weight", _everywhere(_cast_before_weight), (CASTS_LAST,), LOW),
    Planting("norm.offset_rounded", offset_rounded, (OFFSET,), LOW),
    Planting("norm.mean_subtracted", _everywhere(_mean_subtracted), (NOT_CENTRED,)),
    Planting("norm.mean_kept", _everywhere(_mean_kept), (CENTRED,)),
    Planting("norm.missing", _missing("input_layernorm"), variant="input"),
    Planting(
        "norm.missing",
        _missing("post_attention_layernorm"),
        (MORE_THAN_ONE_NORM,),
        variant="post_attention",
    ),
    Planting(
        "norm.missing",
        _missing("pre_feedforward_layernorm"),
        (SANDWICH,),
        variant="pre_feedforward",
    ),
    Planting(
        "norm.missing",
        _missing("post_feedforward_layernorm"),
        (SANDWICH,),
        variant="post_feedforward",
    ),
    Planting(
        "norm.exchanged",
        _exchanged("input_layernorm", "post_attention_layernorm"),
        (MORE_THAN_ONE_NORM,),
    ),
    Planting(
        "norm.exchanged",
        _exchanged("post_attention_layernorm", "pre_feedforward_layernorm"),
        (SANDWICH,),
        variant="around attention",
    ),
    Planting("norm.pre_for_post", pre_for_post, (SANDWICH, ONE_STREAM), variant="pre"),
    Planting("norm.pre_for_post", post_for_pre, (NO_SANDWICH, SEQUENTIAL), variant="post"),
    Planting("norm.sum_for_mean", _everywhere(_sum_for_mean)),
)
