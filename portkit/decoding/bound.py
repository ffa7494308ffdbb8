"""A region with what it is called with.

Knows which of a region's arguments are there for good and which come with each step.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from portkit.decoding.lowering import Kept, Region, Value, Weight
from portkit.decoding.packages import Function


class Bound:
    """A region with its arguments: weights for good, values and caches as they come."""

    def __init__(self, region: Region, weights: dict[Weight, Tensor], function: Function) -> None:
        self.region = region
        self.function = function
        self.arguments: list[Any] = [
            weights[one] if isinstance(one, Weight) else None for one in region.arguments
        ]
        self.kept = [(i, one) for i, one in enumerate(region.arguments) if isinstance(one, Kept)]
        self.is_heavy = bool(self.kept)
        self._read = [
            (i, one.name) for i, one in enumerate(region.arguments) if isinstance(one, Value)
        ]
        self._results = [one.name for one in region.results]

    def run(self, values: dict[str, Tensor]) -> None:
        for place, name in self._read:
            self.arguments[place] = values[name]
        values.update(zip(self._results, self.function(self.arguments), strict=True))
