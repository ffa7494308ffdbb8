"""All faults that are planted in our ports, in the order of the catalogue's classes."""

from parity_tests.faults.planted import (
    attention,
    cache,
    head,
    loader,
    mlp,
    norms,
    precision,
    residual,
    rope,
)

PLANTINGS = (
    *loader.PLANTINGS,
    *rope.PLANTINGS,
    *attention.PLANTINGS,
    *norms.PLANTINGS,
    *mlp.PLANTINGS,
    *residual.PLANTINGS,
    *head.PLANTINGS,
    *cache.PLANTINGS,
    *precision.PLANTINGS,
)
