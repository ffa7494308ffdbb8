"""Mistakes in the gated feed-forward: what is activated, and by which function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from parity_tests.faults.planted.planting import Model, Planting, acts_by, layers
from portkit.nn.mlp import gelu_tanh

PRODUCT = "model.layers.0.mlp.down_proj:in"


def gate_up_exchanged(model: Model) -> str:
    for layer in layers(model):

        def forward(x: Tensor, mlp: Any = layer.mlp) -> Tensor:
            down: Tensor = mlp.down_proj(mlp.act(mlp.up_proj(x)) * mlp.gate_proj(x))
            return down

        layer.mlp.forward = forward
    return PRODUCT


def _activated(act: Callable[[Tensor], Tensor]) -> Callable[[Model], str]:
    def plant(model: Model) -> str:
        for layer in layers(model):
            layer.mlp.act = act
        return PRODUCT

    return plant


SILU, GELU_TANH, GELU = acts_by("silu"), acts_by("gelu_tanh"), acts_by("gelu")

PLANTINGS = (
    Planting("mlp.gate_up_exchanged", gate_up_exchanged),
    Planting("mlp.gelu_exact", _activated(F.gelu), (GELU_TANH,)),
    Planting("mlp.gelu_tanh", _activated(gelu_tanh), (GELU,)),
    Planting("mlp.silu_for_gelu", _activated(F.silu), (acts_by("gelu_tanh", "gelu"),)),
    Planting("mlp.gelu_for_silu", _activated(F.gelu), (SILU,)),
    Planting("mlp.relu", _activated(F.relu)),
    Planting("mlp.gate_not_activated", _activated(lambda x: x)),
)
