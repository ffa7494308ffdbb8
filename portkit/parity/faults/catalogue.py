"""All faults, in the order in which they are told: one list that families to come join."""

from __future__ import annotations

from portkit.parity.faults import (
    attention,
    cache,
    experts,
    head,
    keys,
    loader,
    masks,
    mlp,
    norms,
    precision,
    rope,
    streams,
)
from portkit.parity.faults.fault import Fault

CATALOGUE: tuple[Fault, ...] = (
    *loader.FAULTS,
    *rope.FAULTS,
    *attention.FAULTS,
    *masks.FAULTS,
    *keys.FAULTS,
    *norms.FAULTS,
    *mlp.FAULTS,
    *experts.FAULTS,
    *streams.FAULTS,
    *head.FAULTS,
    *cache.FAULTS,
    *precision.FAULTS,
)
NAMED = {one.id: one for one in CATALOGUE}
