"""Mistakes in care alone: an upcast that the reference has and the port not, or the reverse.

In float64 all of these compute the reference's function. Those with an upcast too many are closer
to the truth than the reference: other bits, and so not exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parity_tests.faults.planted.attention_forward import Kernel
from parity_tests.faults.planted.planting import (
    LOW,
    Model,
    Planting,
    attentions,
    layers,
    norms,
    respell,
)
from parity_tests.faults.planted.rope import rotate_in_float32


def _in_its_dtype(norm: Any) -> None:
    def forward(x: Tensor) -> Tensor:
        normalised = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
        weight = norm.weight if type(norm).__name__ == "RMSNorm" else 1.0 + norm.weight
        weighted: Tensor = weight * normalised
        return weighted

    norm.forward = forward


def norm_not_upcast(model: Model) -> str:
    for norm in norms(model):
        _in_its_dtype(norm)
    return "model.layers.0.input_layernorm"


def final_norm_not_upcast(model: Model) -> str:
    _in_its_dtype(model.model.norm)
    return "model.norm"


def rotation_upcast(model: Model) -> str:
    for attention in attentions(model):
        respell(attention, rotate=rotate_in_float32)
    return "model.layers.0.self_attn#query"


def residual_upcast(model: Model) -> str:
    """The stream is summed in float32 within a layer and rounded at its end."""
    for layer in layers(model):

        def forward(
            h: Tensor, cos: Tensor, sin: Tensor, mask: Any, cache: Any, layer: Any = layer
        ) -> Tensor:
            attended = layer.self_attn(layer.input_layernorm(h), cos, sin, mask, cache)
            if hasattr(layer, "pre_feedforward_layernorm"):
                wide = h.float() + layer.post_attention_layernorm(attended).float()
                fed = layer.mlp(layer.pre_feedforward_layernorm(wide.to(h.dtype)))
                fed = layer.post_feedforward_layernorm(fed)
            else:
                wide = h.float() + attended.float()
                fed = layer.mlp(layer.post_attention_layernorm(wide.to(h.dtype)))
            return (wide + fed.float()).to(h.dtype)

        layer.forward = forward
    return "model.layers.0"


def mlp_product_upcast(model: Model) -> str:
    for layer in layers(model):

        def forward(x: Tensor, mlp: Any = layer.mlp) -> Tensor:
            gated = mlp.act(mlp.gate_proj(x).float()) * mlp.up_proj(x).float()
            down: Tensor = mlp.down_proj(gated.to(x.dtype))
            return down

        layer.mlp.forward = forward
    return "model.layers.0.mlp.down_proj:in"


PLANTINGS = (
    Planting("precision.norm_not_upcast", norm_not_upcast, dtypes=LOW),
    Planting("precision.rotation_upcast", rotation_upcast, dtypes=LOW),
    Planting("precision.residual_upcast", residual_upcast, dtypes=LOW),
    Planting("precision.mlp_product_upcast", mlp_product_upcast, dtypes=LOW),
    Planting("precision.scores_upcast", Kernel(wide_scores=True), dtypes=LOW, kernel="eager"),
    Planting(
        "precision.softmax_weights_upcast", Kernel(wide_weights=True), dtypes=LOW, kernel="eager"
    ),
    Planting("precision.final_norm_not_upcast", final_norm_not_upcast, dtypes=LOW),
)
