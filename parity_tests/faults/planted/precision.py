"""Mistakes in care alone: an upcast that the reference has and the port not, or the reverse.

In float64 all of these compute the reference's function. Those with an upcast too many are closer
to the truth than the reference: other bits, and so not exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parity_tests.faults.planted.attention_forward import Kernel
from parity_tests.faults.planted.mlp import DENSE_GATES, first_product
from parity_tests.faults.planted.planting import (
    LOW,
    ONE_STREAM,
    PAIRS_OF_HALVES,
    Model,
    Need,
    Planting,
    attentions,
    feed_forward,
    feed_forwards,
    first_norm,
    first_rotated,
    layers,
    named_as,
    norms,
    rotation_of,
)
from parity_tests.faults.planted.rope import respell_rotations, rotate_in_float32

BY_NEIGHBOURS = Need(
    "rotates in its dtype, or as complex numbers",
    lambda model: rotation_of(attentions(model)[0]) == "rotate_interleaved",
)


def _in_its_dtype(norm: Any) -> None:
    def forward(x: Tensor) -> Tensor:
        kind = type(norm).__name__
        x = x - x.mean(-1, keepdim=True) if kind == "CentredLayerNorm" else x
        normalised = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
        if not hasattr(norm, "weight"):
            return normalised
        weight = 1.0 + norm.weight if kind == "UnitOffsetRMSNorm" else norm.weight
        weighted: Tensor = weight * normalised
        return weighted

    norm.forward = forward


def norm_not_upcast(model: Model) -> str:
    for norm in norms(model):
        _in_its_dtype(norm)
    return first_norm(model)


def final_norm_not_upcast(model: Model) -> str:
    _in_its_dtype(model.model.norm)
    return "model.norm"


def rotation_upcast(model: Model) -> str:
    respell_rotations(model, rotate_in_float32)
    return first_rotated(model)


def rotation_not_upcast(model: Model) -> str:
    """Neighbours, in the dtype that they come in."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos[:, None] + turned * sin[:, None]

    respell_rotations(model, rotate)
    return first_rotated(model)


def residual_upcast(model: Model) -> str:
    """The stream is summed in float32 within a layer and rounded at its end."""
    for layer in layers(model):

        def forward(h: Tensor, *rest: Any, layer: Any = layer) -> Tensor:
            x = layer.input_layernorm(h)
            attended = layer.self_attn(x, *rest)
            if not hasattr(layer, "post_attention_layernorm"):
                return (h.float() + attended.float() + layer.mlp(x).float()).to(h.dtype)
            if hasattr(layer, "pre_feedforward_layernorm"):
                wide = h.float() + layer.post_attention_layernorm(attended).float()
                fed = layer.mlp(layer.pre_feedforward_layernorm(wide.to(h.dtype)))
                fed = layer.post_feedforward_layernorm(fed)
            else:
                wide = h.float() + attended.float()
                fed = feed_forward(layer)(layer.post_attention_layernorm(wide.to(h.dtype)))
            return (wide + fed.view(h.shape).float()).to(h.dtype)

        layer.forward = named_as(layer.forward, forward)
    return "model.layers.0"


def mlp_product_upcast(model: Model) -> str:
    for mlp in feed_forwards(model).values():

        def forward(x: Tensor, mlp: Any = mlp) -> Tensor:
            gated = mlp.act(mlp.gate_proj(x).float()) * mlp.up_proj(x).float()
            down: Tensor = mlp.down_proj(gated.to(x.dtype))
            return down

        mlp.forward = forward
    return first_product(model)


PLANTINGS = (
    Planting("precision.norm_not_upcast", norm_not_upcast, dtypes=LOW),
    Planting("precision.rotation_upcast", rotation_upcast, (PAIRS_OF_HALVES,), LOW),
    Planting("precision.rotation_not_upcast", rotation_not_upcast, (BY_NEIGHBOURS,), LOW),
    Planting("precision.residual_upcast", residual_upcast, (ONE_STREAM,), LOW),
    Planting("precision.mlp_product_upcast", mlp_product_upcast, (DENSE_GATES,), LOW),
    Planting("precision.scores_upcast", Kernel(wide_scores=True), dtypes=LOW, kernel="eager"),
    Planting(
        "precision.softmax_weights_upcast", Kernel(wide_weights=True), dtypes=LOW, kernel="eager"
    ),
    Planting("precision.final_norm_not_upcast", final_norm_not_upcast, dtypes=LOW),
)
