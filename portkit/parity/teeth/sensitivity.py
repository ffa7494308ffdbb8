"""Which fields of a config a probe can see: what moves when a field moves.

Of each field the words and the verdict, over all dtypes that were compared. Knows no model and
runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LOADING = "held by loading"
UNREAD = "no forward pass depends on it"
NO_ANGLE = "no rotary angle within the context depends on it"


@dataclass(frozen=True)
class Sensitivity:
    """Whether a probe sees one field that the model uses."""

    field: str
    seen: bool | None
    """None: it decides nothing in a forward pass."""
    by: str
    """Where it is seen, or why it is not."""
    moved: str | None = None
    """`24 read as 25`, where another value makes another model."""


def over_dtypes(
    comparisons: Sequence[tuple[Sensitivity, ...]],
) -> tuple[Sensitivity, ...]:
    """Of each field the first verdict by which it is seen, or else the first."""
    found: dict[str, Sensitivity] = {}
    for one in (each for comparison in comparisons for each in comparison):
        if one.field not in found or (one.seen and found[one.field].seen is False):
            found[one.field] = one
    return tuple(found.values())


def settled(*comparisons: tuple[Sensitivity, ...]) -> frozenset[str]:
    """The fields that no further comparison has to move."""
    return frozenset(one.field for each in comparisons for one in each if one.seen is not False)


def line(config: Sequence[Sensitivity]) -> str:
    """`sees 17 of 17 fields of the config`, of those that a forward pass depends on."""
    read = [one for one in config if one.seen is not None]
    return f"sees {sum(one.seen is True for one in read)} of {len(read)} fields of the config"


def as_fields(config: Sequence[Sensitivity]) -> list[dict[str, Any]]:
    """Plain values, as commands print them."""
    return [
        {"field": one.field, "seen": one.seen, "by": one.by, "moved": one.moved} for one in config
    ]
