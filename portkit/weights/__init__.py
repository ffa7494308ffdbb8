"""Which tensor of a checkpoint becomes which parameter, as data: rules, and plans made of them."""

from portkit.weights.plan import Claim, Plan, Tied, WeightMap
from portkit.weights.rules import Copy, CopyOfOne, Drop, Fuse, Slice, Stack, Template, Tie

__all__ = [
    "Claim",
    "Copy",
    "CopyOfOne",
    "Drop",
    "Fuse",
    "Plan",
    "Slice",
    "Stack",
    "Template",
    "Tie",
    "Tied",
    "WeightMap",
]
