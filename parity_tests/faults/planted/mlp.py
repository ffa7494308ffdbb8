"""Mistakes in the gated feed-forward: what is activated, and by which function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from parity_tests.faults.planted.planting import (
    Model,
    Need,
    Planting,
    acts_by,
    feed_forwards,
    first,
    respell,
)
from portkit.nn.mlp import gelu_tanh


def first_product(model: Model) -> str:
    """What the first feed-forward gives its last matrix."""
    return f"{next(iter(feed_forwards(model)))}.down_proj:in"


def gate_up_exchanged(model: Model) -> str:
    for mlp in feed_forwards(model).values():

        def forward(x: Tensor, mlp: Any = mlp) -> Tensor:
            down: Tensor = mlp.down_proj(mlp.act(mlp.up_proj(x)) * mlp.gate_proj(x))
            return down

        mlp.forward = forward
    return first_product(model)


def _activated(act: Callable[[Tensor], Tensor]) -> Callable[[Model], str]:
    def plant(model: Model) -> str:
        for mlp in feed_forwards(model).values():
            if hasattr(mlp, "act"):
                mlp.act = act
            else:  # which has it in its code
                respell(mlp, gelu_tanh=act)
        return first_product(model)

    return plant


Deviations = list[float | None]


def _sparse_as(change: Callable[[Deviations], Deviations]) -> Callable[[Model], str]:
    """Other quantiles at which gates are cut off, as deviations from their mean."""

    def plant(model: Model) -> str:
        blocks = [*feed_forwards(model).items()]
        before = [mlp.deviations for _, mlp in blocks]
        after = change(before)
        for (_, mlp), deviations in zip(blocks, after, strict=True):
            mlp.deviations = deviations
        moved = first([a != b for a, b in zip(before, after, strict=True)], True)
        return f"{blocks[moved][0]}.down_proj:in"

    return plant


def _first_of(deviations: Deviations) -> float | None:
    return next(one for one in deviations if one is not None)


SPARSE_GATES = Need(
    "no feed-forward is sparse",
    lambda model: any(hasattr(one, "deviations") for one in feed_forwards(model).values()),
)
DENSE_GATES = Need("gates are sparse", lambda model: not SPARSE_GATES.holds(model))
SILU, GELU_TANH, GELU = acts_by("silu"), acts_by("gelu_tanh"), acts_by("gelu")

PLANTINGS = (
    Planting("mlp.gate_up_exchanged", gate_up_exchanged, (DENSE_GATES,)),
    Planting("mlp.gelu_exact", _activated(F.gelu), (GELU_TANH,)),
    Planting("mlp.gelu_tanh", _activated(gelu_tanh), (GELU,)),
    Planting("mlp.silu_for_gelu", _activated(F.silu), (acts_by("gelu_tanh", "gelu"),)),
    Planting("mlp.gelu_for_silu", _activated(F.gelu), (SILU,)),
    Planting("mlp.relu", _activated(F.relu)),
    Planting(
        "mlp.sparsity_missing", _sparse_as(lambda before: [None for _ in before]), (SPARSE_GATES,)
    ),
    Planting(
        "mlp.sparsity_everywhere",
        _sparse_as(lambda before: [_first_of(before) for _ in before]),
        (SPARSE_GATES,),
    ),
    Planting(
        "mlp.sparsity_cut",
        _sparse_as(lambda before: [one and 1.6448535 for one in before]),
        (SPARSE_GATES,),
    ),
    Planting("mlp.gate_not_activated", _activated(lambda x: x)),
)
