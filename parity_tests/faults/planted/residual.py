"""Mistakes in the stream that the blocks of a layer add to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from parity_tests.faults.planted.planting import Model, Planting, layers


def _missing(of_attention: bool) -> Callable[[Model], str]:
    def plant(model: Model) -> str:
        layer = layers(model)[1]
        sandwich = hasattr(layer, "pre_feedforward_layernorm")

        def forward(h: Tensor, cos: Tensor, sin: Tensor, mask: Any, cache: Any) -> Tensor:
            branch = layer.self_attn(layer.input_layernorm(h), cos, sin, mask, cache)
            if sandwich:
                branch = layer.post_attention_layernorm(branch)
            h = branch if of_attention else h + branch
            if sandwich:
                branch = layer.mlp(layer.pre_feedforward_layernorm(h))
                branch = layer.post_feedforward_layernorm(branch)
            else:
                branch = layer.mlp(layer.post_attention_layernorm(h))
            return h + branch if of_attention else branch

        layer.forward = forward
        if not of_attention:
            return "model.layers.1"
        norm = "pre_feedforward" if sandwich else "post_attention"
        return f"model.layers.1.{norm}_layernorm:in"

    return plant


PLANTINGS = (
    Planting("residual.missing", _missing(of_attention=True), variant="of attention"),
    Planting("residual.missing", _missing(of_attention=False), variant="of the feed-forward"),
)
