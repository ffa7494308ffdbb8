"""Mistakes in the stream that the blocks of a layer add to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from parity_tests.faults.planted.planting import (
    ONE_STREAM,
    SEQUENTIAL,
    Model,
    Need,
    Planting,
    feed_forward,
    layers,
    named_as,
)


def _missing(of_attention: bool) -> Callable[[Model], str]:
    def plant(model: Model) -> str:
        layer = layers(model)[1]
        sandwich = hasattr(layer, "pre_feedforward_layernorm")

        def forward(h: Tensor, *rest: Any) -> Tensor:
            branch = layer.self_attn(layer.input_layernorm(h), *rest)
            if sandwich:
                branch = layer.post_attention_layernorm(branch)
            h = branch if of_attention else h + branch
            if sandwich:
                branch = layer.mlp(layer.pre_feedforward_layernorm(h))
                branch = layer.post_feedforward_layernorm(branch)
            else:
                branch = feed_forward(layer)(layer.post_attention_layernorm(h)).view(h.shape)
            return h + branch if of_attention else branch

        layer.forward = named_as(layer.forward, forward)
        if not of_attention:
            return "model.layers.1"
        norm = "pre_feedforward" if sandwich else "post_attention"
        return f"model.layers.1.{norm}_layernorm:in"

    return plant


def stream_lost(model: Model) -> str:
    """A parallel block's outputs, without what it was given."""
    layer = layers(model)[1]

    def forward(h: Tensor, *rest: Any) -> Tensor:
        x = layer.input_layernorm(h)
        summed: Tensor = layer.self_attn(x, *rest) + layer.mlp(x)
        return summed

    layer.forward = named_as(layer.forward, forward)
    return "model.layers.1"


def sequential(model: Model) -> str:
    """The one norm a layer has, before each of its blocks."""
    for layer in layers(model):

        def forward(h: Tensor, *rest: Any, layer: Any = layer) -> Tensor:
            h = h + layer.self_attn(layer.input_layernorm(h), *rest)
            summed: Tensor = h + layer.mlp(layer.input_layernorm(h))
            return summed

        layer.forward = named_as(layer.forward, forward)
    return "model.layers.0.mlp:in"


PARALLEL = Need(
    "attention and feed-forward follow one another", lambda model: not SEQUENTIAL.holds(model)
)
PLANTINGS = (
    Planting(
        "residual.missing",
        _missing(of_attention=True),
        (SEQUENTIAL, ONE_STREAM),
        variant="of attention",
    ),
    Planting(
        "residual.missing",
        _missing(of_attention=False),
        (SEQUENTIAL, ONE_STREAM),
        variant="of the feed-forward",
    ),
    Planting("residual.missing", stream_lost, (PARALLEL,), variant="of a parallel block"),
    Planting("residual.sequential", sequential, (PARALLEL,)),
)
