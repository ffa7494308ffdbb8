"""All faults that are planted in our ports, in the order of the catalogue's classes."""

from parity_tests.faults.planted import (
    attention,
    cache,
    experts,
    head,
    loader,
    mlp,
    norms,
    precision,
    residual,
    rope,
    streams,
    unplaced,
)

PLANTINGS = (
    *loader.PLANTINGS,
    *rope.PLANTINGS,
    *attention.PLANTINGS,
    *unplaced.PLANTINGS,
    *norms.PLANTINGS,
    *mlp.PLANTINGS,
    *experts.PLANTINGS,
    *streams.PLANTINGS,
    *residual.PLANTINGS,
    *head.PLANTINGS,
    *cache.PLANTINGS,
    *precision.PLANTINGS,
)
